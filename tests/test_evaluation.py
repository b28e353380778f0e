"""Pair accuracy against a hand count, rank correlation against its definition."""

import math
import random

import numpy as np
import pytest

from rlhf.evaluation import PairAccuracy, pair_accuracy, ranks, spearman


def naive_ranks(values: list[float]) -> list[float]:
    """The number of smaller values, plus half the number of other equal ones: O(n^2)."""
    return [sum(v < x for v in values) + (values.count(x) - 1) / 2 for x in values]


def naive_spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of the ranks, written out."""
    a, b = naive_ranks(x), naive_ranks(y)
    mean = (len(x) - 1) / 2
    covariance = sum((i - mean) * (j - mean) for i, j in zip(a, b, strict=True))
    spread = sum((i - mean) ** 2 for i in a) * sum((j - mean) ** 2 for j in b)
    return covariance / math.sqrt(spread)


@pytest.mark.claim(8)
def test_pairs_are_counted_within_a_prompt_only():
    # p: (9, 2), (9, 5), (5, 2): scores 3, 1, 2 -> right, right, wrong. q has one response.
    scores, truth = [3.0, 1.0, 2.0, 99.0], [9.0, 2.0, 5.0, 1.0]
    accuracy = pair_accuracy(scores, truth, ["p", "p", "p", "q"])
    assert accuracy == PairAccuracy(accuracy=1.0, num_pairs=3, num_ties=0)
    accuracy = pair_accuracy([3.0, 2.0, 1.0, 99.0], truth, ["p", "p", "p", "q"])
    assert accuracy == PairAccuracy(accuracy=2 / 3, num_pairs=3, num_ties=0)


@pytest.mark.claim(8)
def test_pairs_that_the_annotators_tied_are_counted_apart():
    accuracy = pair_accuracy([1.0, 2.0, 3.0], [7.0, 7.0, 5.0], ["p"] * 3)
    assert accuracy == PairAccuracy(accuracy=0.0, num_pairs=2, num_ties=1)


@pytest.mark.claim(8)
def test_a_model_that_scores_all_alike_is_right_half_of_the_time():
    accuracy = pair_accuracy([4.0] * 3, [1.0, 2.0, 2.0], ["p"] * 3)
    assert accuracy == PairAccuracy(accuracy=0.5, num_pairs=2, num_ties=1)


@pytest.mark.claim(8)
def test_accuracy_of_the_opposite_scores_is_the_complement():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(60)]
    truth = [float(rng.randrange(4)) for _ in range(60)]
    groups = [rng.randrange(9) for _ in range(60)]
    right = pair_accuracy(scores, truth, groups)
    wrong = pair_accuracy([-score for score in scores], truth, groups)
    assert right.accuracy + wrong.accuracy == pytest.approx(1.0)
    same_group = sum(groups.count(g) * (groups.count(g) - 1) // 2 for g in set(groups))
    assert right.num_pairs + right.num_ties == same_group


@pytest.mark.claim(8)
def test_accuracy_of_no_pairs_is_unknown_rather_than_a_number():
    for truth in ([], [3.0], [3.0, 3.0]):
        accuracy = pair_accuracy(truth, truth, ["p"] * len(truth))
        assert math.isnan(accuracy.accuracy) and accuracy.num_pairs == 0


def test_scores_truth_and_groups_must_be_as_many():
    with pytest.raises(ValueError):
        pair_accuracy([1.0, 2.0], [1.0, 2.0], ["p"])


@pytest.mark.claim(8)
def test_equal_values_share_the_mean_of_their_ranks():
    # 10 is the smallest; the two 20s hold ranks 1 and 2; the three 30s hold 3, 4 and 5.
    values = [30.0, 10.0, 20.0, 30.0, 20.0, 30.0]
    assert ranks(values).tolist() == [4.0, 0.0, 1.5, 4.0, 1.5, 4.0]


@pytest.mark.claim(8)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_is_the_correlation_of_ranks(seed, levels):
    rng = random.Random(seed)
    x = [float(rng.randrange(levels)) for _ in range(40)]
    y = [value + rng.randrange(levels) for value in x]
    assert spearman(x, y) == pytest.approx(naive_spearman(x, y), abs=1e-12)


@pytest.mark.claim(8)
def test_spearman_without_ties_is_the_textbook_formula():
    # Ranks of y: 1 0 3 2 4, differences to 0..4: 1 -1 1 -1 0; 1 - 6 * 4 / (5 * 24) = 0.8.
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)


@pytest.mark.claim(8)
def test_spearman_sees_order_and_nothing_else():
    x = [0.1, 5.0, 2.0, -3.0, 0.2]
    assert spearman(x, [math.exp(9 * value) for value in x]) == pytest.approx(1.0)
    assert spearman(x, [-value for value in x]) == pytest.approx(-1.0)


@pytest.mark.claim(8)
def test_spearman_of_a_constant_or_of_one_response_is_unknown():
    for x, y in (([1, 2, 3], [4, 4, 4]), ([4, 4], [1, 2]), ([1], [1]), ([], [])):
        assert math.isnan(spearman(x, y))


def test_ranks_sum_to_the_same_with_and_without_ties():
    for values in ([1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 3.0, 2.0], [2.0, 2.0, 1.0, 3.0]):
        assert float(np.sum(ranks(values))) == 0 + 1 + 2 + 3
