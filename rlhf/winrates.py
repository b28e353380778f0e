"""WIN RATES: how often a model's responses beat those of another, and how sure that is.

Both models answer the same prompts, so a win is a matter of one prompt. Prompts are what is drawn
at random; an interval tells what other prompts of the same kind might have shown.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 10_000
RIDGE = 1e-3  # of what one prompt tells: keeps the fit of nothing but wins finite
NUM_CELLS = 2_000_000  # of an array at a time: 16 MB


class Interval(NamedTuple):
    """A mean, and the interval that would hold the true one in 95 of 100 evaluations."""

    mean: float
    low: float
    high: float


def wins(scores: ArrayLike, ref_scores: ArrayLike) -> np.ndarray:
    """Compare scores one by one: 1 for the higher, 0.5 for equal ones, 0 for the lower.

        win = [score > ref_score] + [score = ref_score] / 2

    Source: Mann and Whitney 1947. Raises: ValueError on shapes that differ, or nan.

    >>> wins([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    ours, theirs = numbers(scores), numbers(ref_scores)  # (N,) prompts or (N, K) samples
    if ours.shape != theirs.shape:
        raise ValueError(f"scores {ours.shape} against ref_scores {theirs.shape}")
    return (ours > theirs) + 0.5 * (ours == theirs)


def paired_bootstrap(
    values: ArrayLike,  # (N,), or (N, K) with K samples of each prompt
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Mean of what was measured on N prompts: wins, or differences of two models' scores.

        mean_b = mean over N prompts drawn with replacement, for each resample b
        low, high = the quantiles a and 1 - a of mean_b, with a as in `tail`

    The K samples of a prompt are drawn together: they share its difficulty, and as N * K values of
    their own would make the interval too narrow. Values that are all equal give an interval without
    width, since resampling cannot show what did not happen; N prompts without a loss are compatible
    with 3 / N of them. No values give nan.

    Raises: ValueError on other shapes, or values that are not finite.

    Source: Efron and Tibshirani 1993, chapter 13; the quantiles: Hesterberg, 1411.5279, section 4.

    >>> paired_bootstrap([1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.5], seed=0)
    Interval(mean=0.75, low=0.375, high=1.0)
    """
    samples = numbers(values)
    if samples.ndim not in (1, 2):
        raise ValueError(f"values {samples.shape}: expected (N,) or (N, K)")
    if samples.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    per_prompt = samples.mean(axis=1) if samples.ndim == 2 else samples  # (N,)
    num_prompts = len(per_prompt)
    # Equal values need not be told apart: how often each is drawn has the same distribution.
    levels, counts = np.unique(per_prompt, return_counts=True)
    means = np.empty(num_resamples)
    rng = np.random.default_rng(seed)
    for rows in chunks(num_resamples, len(levels)):
        size = rows.stop - rows.start
        drawn = rng.multinomial(num_prompts, counts / num_prompts, size=size)  # (size, levels)
        means[rows] = drawn @ levels / num_prompts
    return interval(float(per_prompt.mean()), means, means, num_prompts)


def interval(
    estimate: float,
    lowest: np.ndarray,  # (M,) estimates of the resamples, or the least that they may be
    highest: np.ndarray,  # (M,) the same, or the most
    num_prompts: int,
) -> Interval:
    """Cut the tails of the resamples off."""
    share = tail(num_prompts)
    low, high = np.quantile(lowest, share), np.quantile(highest, 1 - share)
    # Sums of equal numbers round: an interval without width would miss its own mean.
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))


def tail(num_prompts: int) -> float:
    """Return the share of resamples to leave out at either end of a 95% interval.

        a = Phi(-sqrt(N / (N - 1)) * t),  t = the 97.5% quantile of Student's t, N - 1 degrees

    Means of resamples spread like sqrt((N - 1) / N) times an unbiased estimate, and a normal
    quantile takes that estimate for the truth. Both make 2.5% a little too much: at N = 50 it is
    2.1%. Source: Hesterberg, 1411.5279, section 4; t by Abramowitz and Stegun 26.7.5, whose first
    terms are right to 0.05 from N = 5 on.

    >>> [round(100 * tail(n), 2) for n in (50, 200, 805)]
    [2.12, 2.4, 2.48]
    """
    if num_prompts < 2:
        return 0.0
    z, degrees = NormalDist().inv_cdf(0.975), num_prompts - 1
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return NormalDist().cdf(-math.sqrt(num_prompts / degrees) * t)


def length_controlled(
    wins: ArrayLike,  # (N,) from 0 to 1
    lengths: ArrayLike,  # (N,) of the model's responses
    ref_lengths: ArrayLike,  # (N,) of the other's
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Win rate as it would be if the responses to every prompt were equally long.

        x = tanh((length - ref_length) / std(length - ref_length))
        logit P(win) = a + b x, fitted to all prompts;  rate = sigmoid(a)

    The difference is not centred: x = 0 means equal lengths. The interval is that of
    `paired_bootstrap`, with a fit to each resample. Where less is known about equal lengths than
    one prompt with equal lengths would tell, as when one side is longer by the same everywhere, the
    rate is nan; a resample of that kind may stand for any rate.

    Source: Dubois et al., 2404.04475, section 3, without its term for the prompt's difficulty,
    which is learned from many models.

    >>> won, lengths = [1, 1, 1, 0, 1, 0, 1, 0], [9, 9, 9, 9, 1, 1, 1, 1]
    >>> round(length_controlled(won, lengths, [5] * 8, seed=0).mean, 3)
    0.634
    """
    won = numbers(wins)
    difference = numbers(lengths) - numbers(ref_lengths)
    if won.ndim != 1 or won.shape != difference.shape:
        raise ValueError(f"wins {won.shape} and lengths {difference.shape}: expected (N,) each")
    if ((won < 0) | (won > 1)).any():
        raise ValueError("wins lie between 0 and 1")
    if won.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.sign(difference)  # (N,)
    (rate,) = rates_at_equal_length(won, x, np.ones((1, won.size)))
    if math.isnan(rate):
        return Interval(math.nan, math.nan, math.nan)
    rates = np.empty(num_resamples)
    rng = np.random.default_rng(seed)
    for rows in chunks(num_resamples, won.size):
        size = rows.stop - rows.start
        drawn = rng.multinomial(won.size, np.full(won.size, 1 / won.size), size=size)
        rates[rows] = rates_at_equal_length(won, x, drawn)
    lowest, highest = np.nan_to_num(rates, nan=0.0), np.nan_to_num(rates, nan=1.0)
    return interval(float(rate), lowest, highest, won.size)


def rates_at_equal_length(wins: np.ndarray, x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sigmoid(a) of the fits to resamples (M, N), nan where a cannot be told from b.

    Of N prompts, N (1 - mean(x)^2 / mean(x^2)) is how many with x = 0 would tell as much about a.
    """
    first, second = counts @ x, counts @ (x * x)  # (M,)
    worth = counts.sum(axis=1) - np.divide(
        first**2, second, out=np.zeros_like(second), where=second > 0
    )
    intercepts = logistic_fit(wins, x, counts, ridge=RIDGE)[:, 0]
    return np.where(worth > 1 - 1e-9, sigmoid(intercepts), math.nan)


def logistic_fit(
    wins: np.ndarray,  # (N,) from 0 to 1; 0.5 is half a win
    x: np.ndarray,  # (N,) from -1 to 1
    counts: np.ndarray,  # (M, N) how often each prompt counts, in each of M fits
    *,
    ridge: float,
) -> np.ndarray:  # (M, 2): a and b
    """Fit logit P(win) = a + b x by maximum likelihood.

        minimise  - sum count (win log p + (1 - win) log(1 - p)) + ridge / 2 (a^2 + b^2)

    Newton's method. A whole step may overshoot where wins and losses are separated; a step of
    log(1 + d) / d, with d the most that a logit could change, never does.

    Source: the step, Sun and Tran-Dinh, 1703.04599, section 3.

    >>> wins, x = np.array([0.75, 0.5]), np.array([1.0, -1.0])  # logits log 3 and 0
    >>> logistic_fit(wins, x, np.array([[4, 4]]), ridge=1e-9).round(4)  # log(3) / 2 = 0.5493
    array([[0.5493, 0.5493]])
    """
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(100):
        p = sigmoid(a[:, None] + b[:, None] * x)  # (M, N)
        gap, weight = counts * (wins - p), counts * p * (1 - p)
        slope_a, slope_b = gap.sum(axis=1) - ridge * a, gap @ x - ridge * b
        h_aa, h_ab = weight.sum(axis=1) + ridge, weight @ x
        h_bb = weight @ (x * x) + ridge
        determinant = h_aa * h_bb - h_ab**2
        step_a = (h_bb * slope_a - h_ab * slope_b) / determinant
        step_b = (h_aa * slope_b - h_ab * slope_a) / determinant
        most = np.abs(step_a) + np.abs(step_b)
        if most.max() < 1e-9:
            break
        damping = np.divide(np.log1p(most), most, out=np.ones_like(most), where=most > 0)
        a, b = a + damping * step_a, b + damping * step_b
    return np.stack([a, b], axis=1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), by a function that no logit overflows.

    >>> sigmoid(np.array([-2000.0, 0.0, 2000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (1 + np.tanh(logits / 2)) / 2


def chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Cut the rows of a large array into parts that fit into memory."""
    step = max(1, NUM_CELLS // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def numbers(values: ArrayLike) -> np.ndarray:
    """Return values as float64. Raises: ValueError if one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("expected finite numbers: leave out prompts without a score or a verdict")
    return array
