"""SOURCES: rows of a public data set, in any of its forms, to one form.

Forms are recognised by their columns. Scores end on the scale 1 to 10, whatever the form:

    UltraFeedback     instruction, completions[] with response and overall_score
    preference pairs  prompt, chosen, rejected: texts or lists of messages
    implicit prompt   chosen and rejected alone: what they have in common is the prompt
    HH-RLHF           chosen and rejected as transcripts of Human: and Assistant:
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from typing import Any, NamedTuple, TypedDict

SCALE = (1.0, 10.0)
# The columns that may hold the two scores of a pair, and their scale.
SCORE_COLUMNS = (
    ("chosen_score", "rejected_score", SCALE),  # our own
    ("score_chosen", "score_rejected", SCALE),  # UltraFeedback as Hugging Face's H4 and TRL have it
    ("chosen-rating", "rejected-rating", (1.0, 5.0)),  # as Argilla has it: means of four ratings
)
IMPLICIT_COLUMNS = {"chosen", "rejected", "source"}.union(*(names[:2] for names in SCORE_COLUMNS))
ROLES = {"Human": "user", "Assistant": "assistant"}
SURROGATE = re.compile("[\ud800-\udfff]")


class Message(TypedDict):
    role: str  # user or assistant; the first may be system
    content: str


Prompt = str | list[Message]


class Response(NamedTuple):
    text: str
    score: float


class Example(NamedTuple):
    """A prompt with its usable responses: the form that every source is brought to."""

    prompt: Prompt
    prompt_id: str
    source: str
    responses: list[Response]
    scored: bool  # False: a bare preference, given the two ends of the scale
    dropped: Counter[str]  # responses that cannot be used, by reason
    repaired: int  # scores of 10 that were a 1


class UnusablePrompt(Exception):
    """A prompt that cannot be used; the message is the reason."""


def form_of(row: dict[str, Any]) -> str | None:
    """Name the form of a row, recognised by its columns; None when it is none of ours."""
    if {"instruction", "completions"} <= row.keys():
        return "UltraFeedback"
    if not {"chosen", "rejected"} <= row.keys():
        return None
    if _is_transcript(row["chosen"]) or _is_transcript(row["rejected"]):
        return "HH-RLHF transcripts"
    if row.get("prompt") is not None:
        return "preference pairs"
    # Of two texts the common beginning is the prompt only if no other column may hold it.
    if isinstance(row["chosen"], list) or row.keys() <= IMPLICIT_COLUMNS:
        return "preference pairs with implicit prompt"
    return None


def num_responses(row: dict[str, Any]) -> int:
    """Count the responses in a row of a known form, usable or not."""
    if form_of(row) != "UltraFeedback":
        return 2
    return len(row["completions"]) if isinstance(row["completions"], list) else 0


def parse_row(row: dict[str, Any], default_source: str) -> Example:
    """Bring a row of a known form to the one form.

    Raises: UnusablePrompt with the reason.
    """
    repaired, scored = 0, True
    if form_of(row) == "UltraFeedback":
        prompt = as_prompt(_stripped(row["instruction"]))
        candidates, repaired = _graded(row["completions"])
    else:
        prompt, texts = _pair(row)
        scores = _pair_scores(row)
        scored = scores is not None
        candidates = list(zip(texts, scores or reversed(SCALE), strict=True))
    source = default_source if text_flaw(row.get("source")) else row["source"]
    responses, dropped = _usable(candidates)
    return Example(prompt, prompt_id(prompt), source, responses, scored, dropped, repaired)


def text_flaw(value: object) -> str | None:
    """Say why a value cannot be a text of a data set; None when it can."""
    if not isinstance(value, str):
        return "is not a text"
    if not value.strip():
        return "is empty"
    return "holds a lone surrogate" if not value.isascii() and SURROGATE.search(value) else None


def as_prompt(value: object) -> Prompt:
    """Return a text, or a list of messages that ends with the user's, as a prompt.

    Raises: UnusablePrompt with the reason.
    """
    if not isinstance(value, list):
        if flaw := text_flaw(value):
            raise UnusablePrompt(f"prompt {flaw}")
        return str(value)
    messages: list[Message] = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if flaw := text_flaw(content):
            raise UnusablePrompt(f"a message of the prompt {flaw}")
        messages.append({"role": str(message.get("role")), "content": str(content)})
    roles = [message["role"] for message in messages]
    if not {"system", "user", "assistant"}.issuperset(roles):
        raise UnusablePrompt("a message of the prompt has an unknown role")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise UnusablePrompt("turns of the prompt do not alternate from user to user")
    return messages


def prompt_id(prompt: Prompt) -> str:
    """Return 16 characters that prompts share if they differ only in case, width or spaces."""
    texts = [prompt] if isinstance(prompt, str) else [m["role"] + m["content"] for m in prompt]
    words = [unicodedata.normalize("NFKC", text).casefold().split() for text in texts]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _pair(row: dict[str, Any]) -> tuple[Prompt, list[object]]:
    """The prompt of a preference pair and its two responses, chosen first."""
    prompts, responses = [], []
    for name in ("chosen", "rejected"):
        prompt, response = row.get("prompt"), row[name]
        if isinstance(response, list):  # messages: the last answers those before it, or the prompt
            *before, last = response or [None]
            if not isinstance(last, dict) or last.get("role") != "assistant":
                raise UnusablePrompt(f"{name} does not end with the assistant's turn")
            prompt, response = before or prompt, last.get("content")
        elif _is_transcript(response):
            prompt, _, response = response.rpartition("\n\nAssistant:")
        elif prompt is None and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
            same = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=False)]
            common = response[: [*same, False].index(False)]
            start = max(common.rfind(space) for space in " \n") + 1  # between words
            prompt, response = response[:start], response[start:]
        prompts.append(_tidy(prompt))
        responses.append(_stripped(response))
    if prompts[0] != prompts[1]:
        raise UnusablePrompt("prompts of chosen and rejected differ")
    return as_prompt(prompts[0]), responses


def _tidy(prompt: object) -> object:
    """Transcripts to messages, without outer spaces; a single turn of the user to a text."""
    if _is_transcript(prompt):
        parts = re.split(r"\n\n(Human|Assistant):", f"\n\n{str(prompt).strip()}")[1:]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        prompt = [{"role": ROLES[name], "content": text} for name, text in pairs]
        if prompt[-1] == {"role": "assistant", "content": ""}:  # where the response will stand
            prompt.pop()
    if not isinstance(prompt, list):
        return _stripped(prompt)
    turns = [
        turn | {"content": _stripped(turn.get("content"))} if isinstance(turn, dict) else turn
        for turn in prompt
    ]
    alone = len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("role") == "user"
    return turns[0]["content"] if alone else turns


def _pair_scores(row: dict[str, Any]) -> list[float | None] | None:
    """The scores of chosen and rejected on the scale 1 to 10; None for a pair without columns."""
    for *names, (low, high) in SCORE_COLUMNS:
        if row.keys() >= set(names):
            unit = (SCALE[1] - SCALE[0]) / (high - low)
            found = [_number(row[name]) for name in names]
            chosen, rejected = (None if x is None else SCALE[0] + (x - low) * unit for x in found)
            if chosen is not None and rejected is not None and chosen < rejected:
                raise UnusablePrompt("chosen is scored below rejected")
            return [chosen, rejected]
    return None


def _graded(completions: object) -> tuple[list[tuple[object, float | None]], int]:
    """Text and overall score of UltraFeedback's completions; the count of repaired scores.

    Its first release wrote 10 for many a 1. Its authors' rule tells them apart: the mean of the
    four fine-grained ratings (1 to 5) is at most 2.
    """
    candidates, repaired = [], 0
    for completion in completions if isinstance(completions, list) else []:
        if not isinstance(completion, dict):
            completion = {}
        score = _number(completion.get("overall_score"))
        if score == SCALE[1] and _fine_grained_mean(completion) <= 2:
            score, repaired = SCALE[0], repaired + 1
        candidates.append((_stripped(completion.get("response")), score))
    return candidates, repaired


def _fine_grained_mean(completion: dict[str, Any]) -> float:
    mean = _number(completion.get("fine-grained_score"))
    if mean is not None:
        return mean
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else []
    found = [_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    ratings = [rating for rating in found if rating is not None]
    return sum(ratings) / len(ratings) if ratings else math.inf


def _usable(candidates: list[tuple[object, float | None]]) -> tuple[list[Response], Counter[str]]:
    responses: dict[str, Response] = {}
    dropped: Counter[str] = Counter()
    for text, score in candidates:
        if flaw := text_flaw(text):
            dropped[f"response {flaw}"] += 1
        elif score is None:
            dropped["score is missing or not a number"] += 1
        elif not SCALE[0] <= score <= SCALE[1]:
            dropped["score is outside its scale"] += 1
        elif str(text) in responses:
            dropped["response is identical to an earlier one"] += 1
        else:
            responses[str(text)] = Response(str(text), score)
    return list(responses.values()), dropped


def _number(value: object) -> float | None:
    """A finite number, also when written as a text ("7.5"); None for all else ("N/A", NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _stripped(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")
