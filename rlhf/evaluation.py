"""How well scores rank responses, and how varied texts are."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np


class PairAccuracy(NamedTuple):
    """How often the better of two responses to one prompt got the higher score."""

    accuracy: float  # over pairs that the annotators did not tie; a tie of the scores counts 1/2
    num_pairs: int
    num_ties: int  # pairs that the annotators tied: left out


def pair_accuracy(
    scores: Sequence[float], truth: Sequence[float], groups: Sequence[Hashable]
) -> PairAccuracy:
    """Compare every two responses of a group (a prompt).

    >>> pair_accuracy([1.0, 2.0, 3.0], [5.0, 7.0, 7.0], ["a", "a", "a"])
    PairAccuracy(accuracy=1.0, num_pairs=2, num_ties=1)
    """
    members = defaultdict(list)
    for score, true, group in zip(scores, truth, groups, strict=True):
        members[group].append((score, true))
    right, num_pairs, num_ties = 0.0, 0, 0
    for responses in members.values():
        for (score_a, true_a), (score_b, true_b) in combinations(responses, 2):
            if true_a == true_b:
                num_ties += 1
                continue
            num_pairs += 1
            agreement = (score_a - score_b) * (true_a - true_b)
            right += 1.0 if agreement > 0 else 0.5 if agreement == 0 else 0.0
    return PairAccuracy(right / num_pairs if num_pairs else float("nan"), num_pairs, num_ties)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Rank values from 0; equal ones share the mean of their ranks."""
    _, index, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts + 1) / 2)[index]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; nan if either side is constant.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 3)
    0.5
    """
    rank_x, rank_y = ranks(x), ranks(y)
    if len(rank_x) < 2 or rank_x.std() == 0 or rank_y.std() == 0:
        return float("nan")
    return float(np.corrcoef(rank_x, rank_y)[0, 1])


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of `n` words, of all texts together: 1 is no repeats.

    It falls with the number of texts, so compare equal numbers. nan if there is no run of n words.

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.

    >>> distinct(["the cat the cat"], 1), round(distinct(["the cat the cat"], 2), 3)
    (0.5, 0.667)
    """
    words = [text.lower().split() for text in texts]
    runs = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(runs)) / len(runs) if runs else float("nan")
