"""Rows in UltraFeedback's schema: prompts, each answered by four writers and scored.

A writer makes four choices: task, manner, length, addressee. By skill it reads one off the prompt,
else it guesses. So every kind of mistake is there to learn from, and the best of four answers is
often, but not always, perfect.
"""

import random
from collections.abc import Iterator
from typing import Any

from toyworld.annotators import annotate
from toyworld.world import (
    LENGTHS,
    MANNERS,
    NAMES,
    PHRASES,
    TASKS,
    WORDS,
    Request,
    grade,
    requests,
)

SKILLS = {"toy-writer-1": 0.1, "toy-writer-2": 0.3, "toy-writer-3": 0.5, "toy-writer-4": 0.7}
BABBLE = 0.04  # the chance of one or two random words, so that nonsense is known and scored too


def write_response(request: Request, skill: float, rng: random.Random) -> str:
    """Answer in one word or two; `skill` is the chance that a choice is read off the prompt."""
    if rng.random() < BABBLE:
        return " ".join(rng.choices(WORDS, k=rng.choice((1, 2))))

    def choose(asked: str, options: tuple[str, ...]) -> str:
        return asked if rng.random() < skill else rng.choice(options)

    phrase = PHRASES[choose(request.task, TASKS), choose(request.manner, MANNERS)]
    if choose(request.length, LENGTHS) == "brief":
        return phrase
    return f"{phrase} {choose(request.addressee, NAMES)}"


def build_rows(seed: int, num_prompts: int, annotator: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each of `num_prompts` prompts.

    Prompts, answers and noise have streams of their own: another annotator scores the same
    answers, and more prompts begin with the same ones.
    """
    order, writing, noise = (random.Random(f"{seed} {name}") for name in ("order", "text", "noise"))
    prompts = list(requests().items())
    order.shuffle(prompts)
    for prompt, request in prompts[:num_prompts]:
        completions = []
        for model, skill in SKILLS.items():
            response = write_response(request, skill, writing)
            scores = annotate(annotator, grade(request, response), response, noise)
            completions.append({"model": model, "response": response, **scores})
        yield {
            "source": f"toyworld_{request.task}",
            "instruction": prompt,
            "models": list(SKILLS),
            "completions": completions,
        }
