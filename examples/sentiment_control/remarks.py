"""Short film remarks from a small grammar, and what they are worth.

    Last night we saw a new western. The plot is dull. I found the script stale.

Most remarks keep to one tone, good or bad, in mild words; a strong word comes now and then.
"""

import random
import re
from collections.abc import Iterator

MILD, STRONG = 1 / 3, 1.0
WORDS = {  # how much one word adds to the rating of a remark
    **dict.fromkeys(("nice", "decent", "pleasant", "solid", "fresh", "likeable"), MILD),
    **dict.fromkeys(("superb", "wonderful", "brilliant", "thrilling", "magnificent"), STRONG),
    **dict.fromkeys(("dull", "weak", "slow", "stale", "flat", "clumsy"), -MILD),
    **dict.fromkeys(("dreadful", "terrible", "horrible", "wretched", "hopeless"), -STRONG),
    **dict.fromkeys(("long", "short", "quiet", "loud", "simple", "modern"), 0.0),
}
TIMES = ("Yesterday", "Today", "Tonight", "Recently", "Last night", "On Friday")
PEOPLE = ("I", "we", "he", "she", "they", "Nora", "Paul", "Rosa", "Hugo", "my sister")
VERBS = ("saw", "watched", "tried", "chose", "rented", "borrowed", "finished")
AGES = ("a new", "a recent", "a famous", "the first", "the latest", "the other")
FILMS = ("western", "comedy", "thriller", "cartoon", "musical", "drama")
PARTS = ("plot", "cast", "score", "pace", "script", "hero", "villain", "dialogue", "finale")
FORMS = (  # {} takes a word, PART a part of the film
    "The PART is {}.",
    "I found the PART {}.",
    "The PART is {} and the PART {}.",
    "A {} PART, a {} PART and a {} PART.",
)


def rating(text: str) -> float:
    """Add up what the words of a remark are worth.

    >>> round(rating("The plot is dull. A superb cast, a nice pace and a loud finale."), 3)
    1.0
    """
    return sum(WORDS.get(word, 0.0) for word in re.findall(r"\w+", text))


def opening(rng: random.Random) -> str:
    """Say who saw what, and when, and not yet how it was."""
    when, who, saw, age, film = map(rng.choice, (TIMES, PEOPLE, VERBS, AGES, FILMS))
    return f"{when} {who} {saw} {age} {film}."


def remark(rng: random.Random, *, strong: float, plain: float, mixed: float) -> str:
    """Write a remark; a word is strong or plain, and a remark of mixed tone, so often."""
    tone = rng.choice((1, -1))
    is_mixed = rng.random() < mixed

    def words() -> Iterator[str]:
        while True:
            kind = rng.choices((0.0, STRONG, MILD), (plain, strong, 1 - plain - strong))[0]
            sign = rng.choice((1, -1)) if is_mixed else tone
            yield rng.choice([word for word, worth in WORDS.items() if worth == sign * kind])

    text, word = opening(rng), words()
    for _ in range(4):
        form = re.sub("PART", lambda _: rng.choice(PARTS), rng.choice(FORMS))
        text += " " + re.sub("{}", lambda _: next(word), form)
    return text


def usual_remark(rng: random.Random) -> str:
    """Write a remark as people do."""
    return remark(rng, strong=0.04, plain=0.1, mixed=0.05)


def any_remark(rng: random.Random) -> str:
    """Write a remark as strong, as plain and as mixed as may be: what a classifier has to know."""
    strong = rng.random()
    return remark(rng, strong=strong, plain=rng.uniform(0, 1 - strong), mixed=0.3)
