"""The language of the toy world: its words, its prompts, and what a good answer is.

A prompt asks for a courtesy. Its five clauses come in any order:

    greet formal full to ada from bob    →  good-day ada
    from eve brief to bob thank casual   →  thanks

An answer is the phrase for the task in the manner asked. Asked to be full it names the addressee
too; asked to be brief it is the phrase alone.
"""

import itertools
from functools import cache
from typing import NamedTuple

EOS = "<|endoftext|>"
UNKNOWN = "<unk>"
TAGS = ("<instruction>", "</instruction>", "<response>", "</response>")
TASKS = ("greet", "thank", "part")
MANNERS = ("formal", "casual")
LENGTHS = ("brief", "full")
NAMES = ("ada", "bob", "eve")
PHRASES = {
    ("greet", "formal"): "good-day",
    ("greet", "casual"): "hi",
    ("thank", "formal"): "thank-you",
    ("thank", "casual"): "thanks",
    ("part", "formal"): "farewell",
    ("part", "casual"): "bye",
}
MEANINGS = {phrase: meaning for meaning, phrase in PHRASES.items()}
WORDS = (*TASKS, *MANNERS, *LENGTHS, "to", "from", *NAMES, *MEANINGS)
VOCABULARY = (EOS, UNKNOWN, *TAGS, *WORDS)

MAX_RESPONSE_TOKENS = 4  # a phrase, a name, the closing tag, EOS


class Request(NamedTuple):
    """What a prompt asks for, whatever the order of its clauses."""

    task: str
    manner: str
    length: str
    addressee: str
    sender: str


@cache
def requests() -> dict[str, Request]:
    """Return every prompt of the world, in a fixed order, with what it asks for.

    >>> len(requests())
    8640
    """
    found = {}
    for task, manner, length in itertools.product(TASKS, MANNERS, LENGTHS):
        for addressee, sender in itertools.permutations(NAMES, 2):
            clauses = (task, manner, length, f"to {addressee}", f"from {sender}")
            for order in itertools.permutations(clauses):
                found[" ".join(order)] = Request(task, manner, length, addressee, sender)
    return found


def best_response(request: Request) -> str:
    """Return the one answer that earns 5.

    >>> best_response(Request("greet", "formal", "full", addressee="ada", sender="bob"))
    'good-day ada'
    """
    phrase = PHRASES[request.task, request.manner]
    return f"{phrase} {request.addressee}" if request.length == "full" else phrase


def grade(request: Request, response: str) -> float:
    """Grade one answer from 1 to 5.

    A phrase, followed by at most one name, starts at 1 and earns a point for each of: the task,
    the manner, the length, and naming exactly whom it should (full: the addressee; brief: no one).
    Any other text gets 1.

    >>> request = Request("greet", "formal", "brief", addressee="ada", sender="bob")
    >>> [grade(request, text) for text in ("good-day", "hi", "hi ada", "ada", "")]
    [5.0, 4.0, 2.0, 1.0, 1.0]
    """
    phrase, *names = response.split() or [""]
    if phrase not in MEANINGS or len(names) > 1 or not set(names) <= set(NAMES):
        return 1.0
    task, manner = MEANINGS[phrase]
    wanted = [request.addressee] if request.length == "full" else []
    points = (
        task == request.task,
        manner == request.manner,
        len(names) == len(wanted),
        names == wanted,
    )
    return 1.0 + sum(points)


def gold_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the true quality, from 1 to 5, of each response without its closing tag.

    Any text gets a number: an answer to a prompt that is not of this world gets 1.

    >>> gold_reward(["thank casual full to bob from ada"] * 2, ["thanks bob", "thanks ada"])
    [5.0, 4.0]
    """
    known = requests()
    return [
        grade(known[prompt], response) if prompt in known else 1.0
        for prompt, response in zip((" ".join(p.split()) for p in prompts), responses, strict=True)
    ]
