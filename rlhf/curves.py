"""CURVES: training.png, what an expert looks at first, from the rows of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.disk import commit, hidden

COLUMNS = 3
rcParams["text.parse_math"] = False  # a folder may be called $x_{$
FEW = 20  # points of a metric, up to which each is marked
MANY = 200  # from which on their running mean is what can be seen


class Panel(NamedTuple):
    """One picture: what it shows, and the metrics in it."""

    title: str
    names: Sequence[str]
    level: tuple[str, float] | None = None  # the flag and the value that it is steered to
    spread: str = ""  # a metric that is the standard deviation of the first


def draw_panels(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    panels: Sequence[Panel],
    *,
    epochs: Mapping[int, int],  # the step after which each ended
    best: int,
) -> None:
    """Draw each panel of which any value is known, against the step."""
    curves = {name: values_of(name, rows) for panel in panels for name in panel.names}
    known = {name for name, (good, _) in curves.items() if good}
    panels = [panel for panel in panels if known & {*panel.names}]
    columns = max(1, min(len(panels), COLUMNS))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    figure.suptitle(f"{path.parent}\nepochs end at the dotted lines, the best at the green one")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        for step in epochs.values():
            axis.axvline(step, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
        axis.axvline(epochs[best], color="tab:green", linewidth=1.2, zorder=0)
        for name in panel.names:
            if name in known:
                draw_curve(axis, name, *curves[name])
        if panel.spread:
            draw_spread(axis, panel, rows)
        if panel.level:
            flag, value = panel.level
            axis.axhline(value, color="0.4", linestyle="--", label=f"--{flag}={value:g}")
        axis.set_title(panel.title, loc="left", fontsize="medium")
        axis.set_xlabel("step", loc="right", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        axis.grid(axis="y", alpha=0.3)
        axis.legend(
            loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, fontsize="small", frameon=False
        )
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(hidden(path), dpi=110, format="png")
    commit(hidden(path), path)


def values_of(
    name: str, rows: Sequence[Mapping[str, float]]
) -> tuple[list[tuple[float, float]], list[float]]:
    """Give a metric's points (step, value), and the steps at which it was not a finite number.

    >>> values_of("a", [{"step": 1, "a": 0.5}, {"step": 2, "b": 1}, {"step": 3, "a": math.nan}])
    ([(1, 0.5)], [3])
    """
    points = [(row["step"], row[name]) for row in rows if name in row]
    good = [(step, value) for step, value in points if math.isfinite(value)]
    return good, [step for step, value in points if not math.isfinite(value)]


def draw_curve(
    axis: Axes, name: str, good: Sequence[tuple[float, float]], bad: Sequence[float]
) -> None:
    """Draw a metric: a cross at the lower edge where it was not finite, a mean if it is crowded."""
    steps, values = zip(*good, strict=True)
    is_crowded = len(good) >= MANY
    marker, width = ("o" if len(good) <= FEW else None), (0.5 if is_crowded else 1.5)
    alpha, label = (0.4, None) if is_crowded else (1.0, name)
    (line,) = axis.plot(
        steps, values, marker=marker, markersize=4, linewidth=width, alpha=alpha, label=label
    )
    if is_crowded:
        window = len(good) // (MANY // 4)
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        start, label = window // 2, f"{name}, mean of {window}"
        axis.plot(steps[start : start + len(means)], means, color=line.get_color(), label=label)
    if bad:
        edge = axis.get_xaxis_transform()
        label = f"{name}: not finite"
        axis.plot(bad, [0.03] * len(bad), "x", color=line.get_color(), transform=edge, label=label)


def draw_spread(axis: Axes, panel: Panel, rows: Sequence[Mapping[str, float]]) -> None:
    """Shade one standard deviation on either side of a panel's first metric."""
    name, spread = panel.names[0], panel.spread
    points = [(row["step"], row[name], row[spread]) for row in rows if name in row]
    steps, means, stds = zip(*points, strict=True)
    low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, low, high, alpha=0.2, label=f"± {spread}")
