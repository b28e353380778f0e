"""SPLITS: which prompt goes to which split and side, and the account of those that go to none."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from rlhf.errors import InputError
from rlhf.sources import Example

SPLITS = ("sft", "rm", "pref")
SIDES = ("train", "eval")

Splits = dict[str, dict[str, list[Example]]]  # split to side to prompts


@dataclass
class Ledger:
    """What became of all that was read: read = kept + dropped."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason

    def as_dict(self) -> dict[str, Any]:
        """Return it as the manifest has it, the most frequent reason first."""
        dropped = {reason: n for reason, n in self.dropped.most_common() if n}
        return {"read": self.read, "kept": self.kept, "dropped": dropped}


@dataclass
class Counts:
    """What is counted on the way from rows to splits."""

    rows: Ledger = field(default_factory=Ledger)
    prompts: Ledger = field(default_factory=Ledger)
    responses: Ledger = field(default_factory=Ledger)
    forms: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    repaired_scores: int = 0

    def drop_prompt(self, example: Example, reason: str) -> None:
        """Count a prompt and its responses as dropped, after all."""
        self.prompts.dropped[reason] += 1
        self.responses.dropped["prompt is dropped"] += len(example.responses)


def divide_into_splits(
    examples: list[Example],
    counts: Counts,
    *,
    seed: int,
    max_samples: int,  # 0 = all
    sft_ratio: float,
    rm_ratio: float,
    train_ratio: float,
    min_score_gap: float,
) -> Splits:
    """Give each prompt to one split and one side, whatever the order of the rows.

    The prompts left over by `max_samples`, and those in pref whose responses cannot be compared,
    are counted as dropped. A ratio of 0 makes no split.

    Raises: InputError if a split gets too few prompts to have both sides.
    """

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed} {example.prompt_id}".encode()).digest()

    ordered = sorted(examples, key=place)
    end = max_samples or len(ordered)
    for example in ordered[end:]:
        counts.drop_prompt(example, "beyond --max_samples")
    usable = ordered[:end]
    sft, rest = divide(usable, sft_ratio)
    rm, candidates = divide(rest, rm_ratio / (1 - sft_ratio))
    pref = []
    for example in candidates:
        if flaw := pair_flaw(example, min_score_gap):
            counts.drop_prompt(example, flaw)
        else:
            pref.append(example)
    shares = (sft_ratio, rm_ratio, 1 - sft_ratio - rm_ratio)
    splits: Splits = {}
    for name, part, share in zip(SPLITS, (sft, rm, pref), shares, strict=True):
        if share == 0:
            continue
        sides = divide(part, train_ratio)
        if not all(sides):
            # From this number on, rounding to the nearest prompt leaves one to each side.
            least = next(n for n in count(2) if 0 < math.floor(n * train_ratio + 0.5) < n)
            flag = f"--{name}_ratio={share}"
            if name == "pref":
                flag = f"--sft_ratio, --rm_ratio, --min_score_gap={min_score_gap} and ties"
            if name == "pref" and len(candidates) - len(pref) > len(pref):
                raise InputError(
                    f"--min_score_gap={min_score_gap}: {len(candidates) - len(pref)} of"
                    f" {len(candidates)} prompts for pref have no two responses whose scores differ"
                    " enough; lower it, or give data in which they do"
                )
            raise InputError(
                f"{flag}: of {len(usable)} usable prompts {name} gets {len(part)}, and train and "
                f"eval at --train_ratio={train_ratio} take {least}: change a ratio, or give "
                f"about {math.ceil(least / share)} prompts"
            )
        # The head of a file is a sample of all sources, which `divide` puts one after the other.
        ordered_sides = (sorted(side, key=place) for side in sides)
        splits[name] = dict(zip(SIDES, ordered_sides, strict=True))
    return splits


def divide(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Cut the prompts of each source at `share`, as their order stands.

    What rounding adds or takes at one source carries over to the next: the whole is divided to the
    nearest prompt, each source to within one, and a hundred sources of one prompt each still give
    ten prompts to a share of 0.1.
    """
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    first: list[Example] = []
    second: list[Example] = []
    passed = 0
    for group in by_source.values():
        cut = math.floor((passed + len(group)) * share + 0.5) - math.floor(passed * share + 0.5)
        first += group[:cut]
        second += group[cut:]
        passed += len(group)
    return first, second


def pair_flaw(example: Example, min_score_gap: float) -> str | None:
    """Say why the best and the worst response make no pair; None when they do."""
    scores = [response.score for response in example.responses]
    gap = max(scores) - min(scores)
    if gap == 0:
        return "scores tie (pref)"
    return "score gap too small (pref)" if gap < min_score_gap else None
