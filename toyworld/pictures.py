"""The pictures of the report: reward against KL under the exact frontier, gold against learned."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor

from rlhf.figures import COLORS

FRONTIER_BETAS = tuple(float(beta) for beta in np.geomspace(0.01, 100.0, 33))
MARKED_BETAS = (0.2, 0.5, 1.0)
KL_TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


class Point(NamedTuple):
    """A checkpoint under the frontier; both figures are exact."""

    kl: float  # nats from the reference
    reward: float  # gold, less the penalty for a missing EOS


class Told(NamedTuple):
    """What a run was told at an epoch, and what was true: means over samples, (N,) prompts."""

    epoch: int
    learned: Tensor
    gold: Tensor


class Course(NamedTuple):
    """A run: its checkpoints in order, and the one that stands for it in the table."""

    points: list[Point]
    chosen: Point


class Optimum(NamedTuple):
    """The best policy at one beta."""

    beta: float
    kl: float
    reward: float


def draw_frontier(axis: Axes, frontier: Sequence[Optimum]) -> None:
    """Draw the best reward at every KL, and grey out what no policy can reach."""
    curve = sorted(frontier, key=lambda best: best.kl)
    kl, reward = [best.kl for best in curve], [best.reward for best in curve]
    axis.plot(kl, reward, color="black", linewidth=1.5, label="optimum π* at every β")
    end = max(*axis.get_xlim(), kl[-1])
    top = reward[-1] + 0.12
    axis.plot([kl[-1], end], [reward[-1]] * 2, color="black", linewidth=1.5)
    axis.fill_between([*kl, end], [*reward, reward[-1]], top, color="0.92", linewidth=0)
    for best in curve:
        if best.beta in MARKED_BETAS:
            axis.plot(best.kl, best.reward, marker="o", color="black", markersize=4)
            axis.annotate(
                f"β={best.beta:g}",
                (best.kl, best.reward),
                textcoords="offset points",
                xytext=(-3, 5),
                ha="right",
                fontsize=8,
            )
    axis.set_ylim(top=top)
    axis.set_xscale("function", functions=(np.sqrt, np.square))
    axis.set_xlim(0, end)
    axis.xaxis.set_major_locator(FixedLocator([kl for kl in KL_TICKS if kl <= end]))
    axis.set_xlabel("exact KL from the reference, nats (square-root scale)")
    axis.set_ylabel("exact gold reward")
    axis.grid(alpha=0.25)


def frontier_picture(courses: Mapping[str, Course], frontier: Sequence[Optimum]) -> Figure:
    """Draw every checkpoint under the frontier; all courses start at the first one's end."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    start = next(iter(courses.values())).chosen
    for color, (name, course) in zip(cycle(COLORS), courses.items(), strict=False):
        xs, ys = zip(*((p.kl, p.reward) for p in (start, *course.points)), strict=True)
        axis.plot(xs, ys, ".--", markersize=5, linewidth=0.8, alpha=0.6, color=color)
        chosen = course.chosen
        axis.plot(chosen.kl, chosen.reward, "o", markersize=8, color=color, label=name)
    draw_frontier(axis, frontier)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def told_picture(runs: Mapping[str, Sequence[Told]], groups: Mapping[str, Tensor]) -> Figure:
    """Draw learned and gold reward over a run's epochs, for each group of prompts, a mask (N,)."""
    figure = Figure(figsize=(4.8 * len(runs), 3.8), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, (name, course) in zip(axes, runs.items(), strict=True):
        epochs = [told.epoch for told in course]
        for style, (group, rows) in zip(("o-", "s:"), groups.items(), strict=False):
            learned = [float(told.learned[rows].mean()) for told in course]
            gold = [float(told.gold[rows].mean()) for told in course]
            axis.plot(epochs, learned, style, color=COLORS[1], label=f"learned reward, {group}")
            axis.plot(epochs, gold, style, color=COLORS[0], label=f"gold reward, {group}")
        axis.set_title(name)
        axis.set_xlabel("epoch of PPO (0 = the reference)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(1, 5.1)
        axis.grid(alpha=0.25)
        axis.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("reward on held-out prompts")
    return figure
