"""FIGURES: how checkpoints stand beside each other, drawn."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.winrates import Interval

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
BINS = 30
rcParams["text.parse_math"] = False  # a name may hold dollars
WHOLE, HALF = 7.5, (3.7, 3.2)  # inches: the width of a page, and half of it


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Give each checkpoint the color that it has in all figures."""
    return dict(zip(names, cycle(COLORS), strict=False))


def error_bar(axis: Axes, x: float | Interval, y: float | Interval, **style: Any) -> None:
    """Draw a point with a bar for each coordinate that is an interval."""

    def split(value: float | Interval) -> tuple[float, list[list[float]] | None]:
        if not isinstance(value, Interval):
            return value, None
        return value.mean, [[value.mean - value.low], [value.high - value.mean]]

    (at_x, xerr), (at_y, yerr) = split(x), split(y)
    axis.errorbar(at_x, at_y, yerr, xerr, "o", capsize=3, **style)


def draw_win_rates(rates: Mapping[str, Mapping[str, Interval]], reference: str) -> Figure:
    """Draw each checkpoint's win rates over the reference, of several kinds, with intervals."""
    kinds = list(dict.fromkeys(kind for known in rates.values() for kind in known))
    figure = Figure(figsize=(WHOLE, 1.1 + 0.5 * len(rates)), layout="constrained")
    axis = figure.subplots()
    shifts = np.linspace(-0.12, 0.12, len(kinds))
    for kind, color, shift in zip(kinds, COLORS, shifts, strict=False):
        known = [(row, of[kind]) for row, of in enumerate(rates.values()) if kind in of]
        for number, (row, rate) in enumerate(known):
            label = None if number else kind
            error_bar(axis, rate, row + float(shift), color=color, label=label)
    axis.axvline(0.5, color="0.4", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rates)), list(rates))
    axis.set_ylim(len(rates) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel(f"win rate over {reference}, with 95% interval")
    axis.grid(axis="x", alpha=0.25)
    if len(kinds) > 1:
        figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_reward_against_kl(
    points: Mapping[str, tuple[Interval, Interval]], reference: str, score: str
) -> Figure:
    """Draw each checkpoint at its KL from the reference (nats) and its mean score."""
    figure = Figure(figsize=HALF, layout="constrained")
    axis = figure.subplots()
    colors = colors_of(list(points))
    for name, (kl, mean) in points.items():
        error_bar(axis, kl, mean, color=colors[name], label=name)
    axis.set_xlabel(f"KL from {reference}, nats a response")
    axis.set_ylabel(f"mean {score}")
    axis.grid(alpha=0.25)
    axis.legend(loc="best", fontsize=9)
    return figure


def draw_distributions(scores: Mapping[str, np.ndarray], score: str) -> Figure:
    """Draw how each checkpoint's scores (N,) are spread, one above the other, and their means."""
    figure = Figure(figsize=HALF, layout="constrained")
    axes = figure.subplots(len(scores), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), bins=BINS)
    colors = colors_of(list(scores))
    for axis, (name, own) in zip(axes, scores.items(), strict=True):
        axis.hist(own, list(edges), color=colors[name], alpha=0.75)
        axis.axvline(own.mean(), color="black", linewidth=1, linestyle=":")
        axis.set_ylabel(name)
    axes[-1].set_xlabel(f"{score} (dotted: mean), responses")
    return figure
