"""Every prompt has one place, sources get their shares, and who has no place is counted."""

import random
from collections import Counter
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.sources import Example, Response
from rlhf.splits import Counts, Ledger, Splits, divide, divide_into_splits, pair_flaw


def example(prompt_id: str, *scores: float, source: str = "a") -> Example:
    responses = [Response(f"answer {n}", score) for n, score in enumerate(scores or (7, 3))]
    return Example("?", prompt_id, source, responses, True, Counter(), 0)


def split(examples: list[Example], counts: Counts | None = None, **changes: Any) -> Splits:
    options = {"seed": 42, "max_samples": 0, "sft_ratio": 0.1, "rm_ratio": 0.1}
    options |= {"train_ratio": 0.8, "min_score_gap": 0.0}
    return divide_into_splits(examples, counts or Counts(), **(options | changes))


def ids(splits: Splits) -> list[str]:
    return [e.prompt_id for sides in splits.values() for side in sides.values() for e in side]


HUNDRED = [example(str(n), source="aab"[n % 3]) for n in range(100)]


def test_every_prompt_has_one_place():
    splits = split(HUNDRED)
    assert sorted(ids(splits)) == sorted(e.prompt_id for e in HUNDRED)
    sizes = {name: [len(side) for side in sides.values()] for name, sides in splits.items()}
    assert sizes == {"sft": [8, 2], "rm": [8, 2], "pref": [64, 16]}


def test_a_seed_gives_each_prompt_its_place_and_the_order_of_rows_does_not():
    one_source = [example(str(n)) for n in range(100)]
    shuffled = random.Random(1).sample(one_source, 100)
    assert split(one_source) == split(shuffled)
    assert split(one_source) != split(one_source, seed=43)


def test_a_share_of_zero_makes_no_split():
    assert set(split(HUNDRED, sft_ratio=0.0)) == {"rm", "pref"}
    assert set(split(HUNDRED, sft_ratio=0.0, rm_ratio=0.0)) == {"pref"}


def test_prompts_beyond_max_samples_are_counted_with_their_responses():
    counts = Counts()
    assert len(ids(split(HUNDRED, counts, max_samples=40))) == 40
    assert counts.prompts.dropped == {"beyond --max_samples": 60}
    assert counts.responses.dropped == {"prompt is dropped": 120}
    assert len(ids(split(HUNDRED, max_samples=1000))) == 100


def test_ties_leave_pref_alone_and_are_counted():
    counts = Counts()
    examples = [example(str(n), 5, 5, 6 if n % 2 else 5) for n in range(100)]
    splits = split(examples, counts)
    kept = splits["pref"]["train"] + splits["pref"]["eval"]
    assert all(int(e.prompt_id) % 2 for e in kept)
    assert counts.prompts.dropped == {"scores tie (pref)": 80 - len(kept)}
    assert counts.responses.dropped == {"prompt is dropped": 3 * (80 - len(kept))}
    assert len(splits["sft"]["train"]) == len(splits["rm"]["train"]) == 8


@pytest.mark.parametrize(
    ("scores", "gap", "flaw"),
    [
        ((5, 5, 5), 0.0, "scores tie (pref)"),
        ((5, 5), 2.0, "scores tie (pref)"),
        ((5, 6, 4), 2.0, None),
        ((5, 6, 4.5), 2.0, "score gap too small (pref)"),
        ((5, 5.01), 0.0, None),
    ],
)
def test_a_pair_needs_a_gap_and_a_tie_is_none(scores, gap, flaw):
    assert pair_flaw(example("1", *scores), gap) == flaw


@pytest.mark.parametrize("train_ratio", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_the_number_that_a_split_is_told_to_need_is_the_least_that_serves(train_ratio):
    rows = [example(str(n)) for n in range(100)]
    only_pref = {"sft_ratio": 0.0, "rm_ratio": 0.0, "train_ratio": train_ratio}
    with pytest.raises(InputError) as caught:
        split(rows[:1], **only_pref)
    least = int(str(caught.value).split("take ")[1].split(":")[0])
    assert len(ids(split(rows[:least], **only_pref))) == least
    with pytest.raises(InputError, match=f"pref gets {least - 1}, and train and eval"):
        split(rows[: least - 1], **only_pref)


def test_each_source_gets_its_share_to_within_one_prompt():
    sizes = {f"source {n}": n for n in range(1, 30)}
    examples = [
        example(f"{source} {n}", source=source)
        for source, size in sizes.items()
        for n in range(size)
    ]
    for share in (0.0, 0.1, 1 / 3, 0.5, 0.95):
        first, second = divide(examples, share)
        assert len(first) == int(len(examples) * share + 0.5)
        assert {e.prompt_id for e in first + second} == {e.prompt_id for e in examples}
        taken = Counter(e.source for e in first)
        assert all(abs(taken[source] - size * share) < 1 for source, size in sizes.items())


def test_a_ledger_tells_the_most_frequent_reason_first_and_none_that_never_came():
    ledger = Ledger(read=7, kept=3, dropped=Counter({"rare": 1, "never": 0, "often": 3}))
    told = ledger.as_dict()
    assert told == {"read": 7, "kept": 3, "dropped": {"often": 3, "rare": 1}}
    assert list(told["dropped"]) == ["often", "rare"]
