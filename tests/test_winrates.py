"""Win rates by hand, intervals by how often they hold the truth, length control by simulation."""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from rlhf.winrates import (
    Interval,
    length_controlled,
    logistic_fit,
    paired_bootstrap,
    tail,
    wins,
)

Generator = np.random.Generator


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- wins


def test_wins_worked_by_hand():
    scores, ref_scores = [[3.0, 1.0], [2.0, -1.0]], [[1.0, 3.0], [2.0, -2.0]]
    assert wins(scores, ref_scores).tolist() == [[1.0, 0.0], [0.5, 1.0]]
    assert wins(ref_scores, scores).tolist() == [[0.0, 1.0], [0.5, 0.0]]


@pytest.mark.parametrize("scores", [[1.0], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_scores_without_a_counterpart_or_a_value_are_refused(scores):
    with pytest.raises(ValueError, match=r"against ref_scores|expected finite numbers"):
        wins(scores, [1.0, 2.0])


# --- the bootstrap


def test_interval_worked_by_hand():
    # Eight prompts, half of them won. The mean of a resample is Binomial(8, 1/2) / 8; a is
    # Phi(-sqrt(8 / 7) 2.365) = 0.0057 and 1/256 = 0.0039 < a < 9/256 = 0.035: 1/8 and 7/8.
    assert tail(8) == pytest.approx(NormalDist().cdf(-math.sqrt(8 / 7) * 2.3646), rel=0.03)
    assert paired_bootstrap([1.0] * 4 + [0.0] * 4, seed=0) == Interval(0.5, 1 / 8, 7 / 8)


@pytest.mark.parametrize(("degrees", "t"), [(4, 2.776), (9, 2.262), (49, 2.0096), (804, 1.9629)])
def test_tail_has_students_quantile_of_the_tables(degrees, t):
    n = degrees + 1
    told = -NormalDist().inv_cdf(tail(n)) / math.sqrt(n / degrees)
    assert told == pytest.approx(t, abs=0.05 if degrees < 9 else 0.005)


@pytest.mark.parametrize("levels", [1, 50])
def test_counting_equal_values_equals_drawing_prompts(levels):
    rng = np.random.default_rng(1)
    values = np.round(rng.normal(size=60) * levels) / levels
    drawn = np.sort(values[rng.integers(60, size=(40_000, 60))].mean(axis=1))
    low, high = np.quantile(drawn, [tail(60), 1 - tail(60)])
    told = paired_bootstrap(values, seed=0)
    assert told.mean == pytest.approx(values.mean())
    # Two quantiles of the same distribution, each with a standard error of about 0.003.
    assert (told.low, told.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))


def test_samples_of_a_prompt_are_drawn_together():
    # Samples that are all alike tell no more than one of them.
    values = np.random.default_rng(0).integers(0, 2, size=100).astype(float)
    alike = paired_bootstrap(np.repeat(values[:, None], 8, axis=1), seed=0)
    assert alike == paired_bootstrap(values, seed=0)
    apart = paired_bootstrap(np.repeat(values, 8), seed=0)
    assert (apart.high - apart.low) < 0.5 * (alike.high - alike.low)


def test_an_interval_is_a_function_of_values_and_seed():
    values = np.random.default_rng(0).normal(size=40)
    first = paired_bootstrap(values, seed=1)
    assert first == paired_bootstrap(values, seed=1) == paired_bootstrap(list(values), seed=1)
    assert first != paired_bootstrap(values, seed=2)


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.5] * 3, [1.0] * 50, [0.1] * 7, [[0.5, 1.0]], [1e300] * 3]
)
def test_equal_values_have_an_interval_without_width(values):
    mean = float(np.mean(values))
    told = paired_bootstrap(values, seed=0)
    assert told == pytest.approx((mean, mean, mean), rel=1e-12)
    assert told.low <= told.mean <= told.high


@pytest.mark.parametrize("values", [[], [[]], [[], []]])
def test_no_values_have_no_mean(values):
    assert all(math.isnan(number) for number in paired_bootstrap(values, seed=0))
    assert all(math.isnan(number) for number in length_controlled([], [], [], seed=0))


@pytest.mark.parametrize("values", [0.5, [[[0.5]]], [1.0, math.nan]])
def test_values_of_another_shape_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        paired_bootstrap(values, seed=0)


def same_model(rng: Generator, num_prompts: int, num_samples: int, *, levels: float) -> np.ndarray:
    """Wins of a model against itself: two samples each, of prompts of their own difficulty."""
    shape, difficulty = (num_prompts, num_samples), rng.normal(size=(num_prompts, 1))
    scores = [difficulty + rng.normal(size=shape) for _ in range(2)]
    if levels:
        scores = [np.round(score * levels) for score in scores]
    return wins(*scores)


def hard_and_easy(rng: Generator, num_prompts: int, num_samples: int) -> np.ndarray:
    """Half of the prompts on the whole are won, each by its own rate."""
    rate = sigmoid(2 * rng.normal(size=(num_prompts, 1)))
    return (rng.random((num_prompts, num_samples)) < rate).astype(float)


KINDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "continuous scores": lambda rng, n: same_model(rng, n, 1, levels=0)[:, 0],
    "scores 1 to 5, with ties": lambda rng, n: same_model(rng, n, 1, levels=1)[:, 0],
    "four samples": lambda rng, n: same_model(rng, n, 4, levels=1),
    "four samples that agree": lambda rng, n: hard_and_easy(rng, n, 4),
}


def hits(kind: str, num_prompts: int, num_evaluations: int) -> int:
    """How many of so many evaluations have an interval that holds the truth, 50%."""
    rng = np.random.default_rng(0)
    intervals = [
        paired_bootstrap(KINDS[kind](rng, num_prompts), seed=seed, num_resamples=1_000)
        for seed in range(num_evaluations)
    ]
    return sum(low <= 0.5 <= high for _, low, high in intervals)


CASES = list(itertools.product(KINDS, (50, 200, 805)))


def test_a_model_ties_with_itself_in_94_of_100_evaluations():
    # Of a hundred evaluations alone, an interval that is right has 94 in three cases of four.
    counts = [hits(kind, num_prompts, 100) for kind, num_prompts in CASES]
    assert min(counts) >= 90
    assert 94 <= np.mean(counts) <= 97


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_prompts"), CASES)
def test_an_interval_of_95_percent_holds_the_truth_in_95_percent(kind, num_prompts):
    coverage = hits(kind, num_prompts, 2_000) / 2_000
    if (kind, num_prompts) == ("continuous scores", 50):
        # Fifty wins or losses: an interval around the rate that holds 1/2 for 18 to 32 wins does
        # so in 96.7%, for 19 to 31 in 93.5%. There is nothing between.
        within = sum(math.comb(50, won) for won in range(18, 33)) / 2**50
        assert within == pytest.approx(0.967, abs=5e-4)
        assert coverage == pytest.approx(within, abs=0.01)
    else:
        assert 0.94 <= coverage <= 0.96


# --- length control


def penalised_slopes(won, x, counts, ridge, a, b) -> tuple[float, float]:
    """Derivatives by a and b of what `logistic_fit` makes least, as a sum over prompts."""
    terms = [
        (n * (1 / (1 + math.exp(-(a + b * t))) - w), t)
        for w, t, n in zip(won, x, counts, strict=True)
    ]
    return sum(g for g, _ in terms) + ridge * a, sum(g * t for g, t in terms) + ridge * b


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_fit_has_no_slope_left_in_any_resample(ridge):
    rng = np.random.default_rng(0)
    won, x = rng.choice([0.0, 0.5, 1.0], size=12), np.tanh(rng.normal(size=12))
    # The last three: one prompt alone, wins alone, and the longer one always.
    counts = np.concatenate([rng.multinomial(12, [1 / 12] * 12, size=20), np.zeros((3, 12), int)])
    counts[20, 3] = 12
    counts[21] = won == 1
    counts[22] = (won == 1) & (x > 0) | (won == 0) & (x < 0)
    for row, (a, b) in zip(counts, logistic_fit(won, x, counts, ridge=ridge), strict=True):
        assert penalised_slopes(won, x, row, ridge, a, b) == pytest.approx((0, 0), abs=1e-6)


def test_rate_at_equal_length_worked_by_hand():
    # Four responses longer by 4, three of them win; four shorter by 4, two win. std = 4, so x is
    # tanh(1) and -tanh(1); a + b x = log 3 and a - b x = 0, so a = log(3) / 2 whatever x is.
    won, lengths = [1, 1, 1, 0, 1, 1, 0, 0], [9] * 4 + [1] * 4
    rate = length_controlled(won, lengths, [5] * 8, seed=0)
    assert rate.mean == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)), abs=1e-3)
    # Where all are longer, x is not 0 at their mean. Half are longer by 3, and half of those win;
    # half by 1, and a quarter wins: std = 1, a + b tanh(3) = 0, a + b tanh(1) = -log 3.
    won, lengths = [1, 1, 0, 0, 1, 0, 0, 0] * 50, ([8] * 4 + [6] * 4) * 50
    rate = length_controlled(won, lengths, [5] * 400, seed=0, num_resamples=100)
    slope = math.log(3) / (math.tanh(3) - math.tanh(1))
    assert rate.mean == pytest.approx(sigmoid(-slope * math.tanh(3)), abs=1e-3)


def test_without_a_difference_in_length_the_rate_is_the_win_rate():
    won = [1.0] * 6 + [0.5] * 2 + [0.0] * 2
    told, raw = length_controlled(won, [7] * 10, [7] * 10, seed=0), paired_bootstrap(won, seed=0)
    assert told == pytest.approx(raw, abs=1e-3)


def test_the_other_models_rate_is_the_rest():
    rng = np.random.default_rng(0)
    won, lengths, ref_lengths = rng.integers(0, 2, 90), rng.poisson(60, 90), rng.poisson(50, 90)
    ours = length_controlled(won, lengths, ref_lengths, seed=0)
    theirs = length_controlled(1 - won, ref_lengths, lengths, seed=0)
    assert ours == pytest.approx((1 - theirs.mean, 1 - theirs.high, 1 - theirs.low), abs=1e-3)
    assert ours.low < ours.mean < ours.high


def test_length_control_of_little_is_a_number_where_there_is_one():
    for won, lengths in (([1.0], [5]), ([1.0] * 30, [5] * 30), ([1.0] * 30, [2, 9] * 15)):
        rate = length_controlled(won, lengths, [5] * len(won), seed=0)
        assert rate == pytest.approx((1, 1, 1), abs=0.01)
    ties = length_controlled([0.5] * 30, [2, 9] * 15, [5] * 30, seed=0)
    assert ties == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    # The longer one always wins: nothing speaks for either model.
    longer = length_controlled([0, 1] * 15, [2, 8] * 15, [5] * 30, seed=0)
    assert longer.mean == pytest.approx(0.5) and 0 <= longer.low < 0.5 < longer.high <= 1


@pytest.mark.parametrize("lengths", [[9] * 40, [105, 106] * 20, [9]])
def test_where_one_side_is_always_longer_by_the_same_nothing_is_known_of_equal_lengths(lengths):
    won = [1.0, 1.0, 0.0, 1.0] * 10
    rate = length_controlled(won[: len(lengths)], lengths, [5] * len(lengths), seed=0)
    assert all(math.isnan(number) for number in rate)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_an_interval_is_wide_where_few_are_equally_long(last):
    won, lengths = [1.0, 1.0, 0.0] * 13 + [last], [9] * 39 + [5]
    told = length_controlled(won, lengths, [5] * 40, seed=0)
    assert told.low < 0.05 and told.high > 0.95


@pytest.mark.parametrize(
    ("won", "lengths"), [([1.0], [1, 2]), ([[1.0]], [[1]]), ([2.0], [1]), ([math.nan], [1])]
)
def test_wins_and_lengths_must_fit(won, lengths):
    with pytest.raises(ValueError, match=r"expected|between"):
        length_controlled(won, lengths, lengths, seed=0)


def judged_by_length(
    rng: Generator, bias: Callable[[np.ndarray], np.ndarray], *, difficulty: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """805 comparisons of equally good models, one of which writes half as much again.

    The judge's logit is the quality of the responses to this prompt plus a function of the
    difference of their lengths in standard deviations. So at equal lengths half are won.
    """
    ref_lengths = np.exp(rng.normal(5, 0.5, 805)).round()
    lengths = (ref_lengths * np.exp(rng.normal(0.45, 0.5, 805))).round()
    difference = lengths - ref_lengths
    logits = rng.normal(0, difficulty, 805) + bias(difference / difference.std())
    return (rng.random(805) < sigmoid(logits)).astype(float), lengths, ref_lengths


BIASES = {
    "tanh": lambda d: 1.2 * np.tanh(d),
    "linear": lambda d: 1.2 * d,
    "step": lambda d: 1.2 * np.sign(d),
}


@pytest.mark.parametrize("shape", BIASES)
def test_a_judge_that_likes_length_is_seen_through(shape):
    rng = np.random.default_rng(0)
    evaluations = [judged_by_length(rng, BIASES[shape]) for _ in range(40)]
    raw = np.mean([won for won, _, _ in evaluations])
    rates = [length_controlled(*x, seed=0, num_resamples=1).mean for x in evaluations]
    assert raw > 0.60
    assert np.mean(rates) == pytest.approx(0.5, abs=0.03)
    # One evaluation of 805 prompts has a standard error of its own, and it is larger than without
    # length control: 1.8 points there.
    assert 0.018 < np.std(rates) < 0.035


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", [0.0, 1.5])
def test_the_length_controlled_interval_holds_the_truth(difficulty):
    rng = np.random.default_rng(0)
    intervals = [
        length_controlled(
            *judged_by_length(rng, BIASES["tanh"], difficulty=difficulty),
            seed=seed,
            num_resamples=300,
        )
        for seed in range(200)
    ]
    assert 0.92 <= np.mean([low <= 0.5 <= high for _, low, high in intervals]) <= 0.98


def test_quality_that_grows_with_length_is_taken_for_bias():
    # This judge is right: the longer response is better. The model wins 60%, and earns it.
    rng = np.random.default_rng(0)
    won, lengths, ref_lengths = judged_by_length(rng, BIASES["tanh"])
    assert won.mean() > 0.58
    assert length_controlled(won, lengths, ref_lengths, seed=0, num_resamples=1).mean < 0.55
