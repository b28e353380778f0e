"""training.png: its panels, and what is marked in them."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rlhf.curves
import run_ppo
from rlhf.curves import Panel, draw_panels

NAN = math.nan


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a picture, and give the axes on which something stands."""
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(rlhf.curves, "Figure", Kept)

    def draw(rows: list[dict[str, float]], *panels: Panel, **options: Any) -> list[Axes]:
        options = {"epochs": {0: 0, 1: 1}, "best": 1} | options
        draw_panels(tmp_path / "training.png", rows, panels, **options)
        return [axis for axis in figures[-1].axes if axis.axison]

    return draw


def line(axis: Axes, label: str) -> list[tuple[float, float]]:
    (found,) = [line for line in axis.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in found.get_xydata()]


def upright(axis: Axes) -> dict[float, str]:
    """The upright lines by step, and their styles."""
    found = (x for x in axis.lines if len(x.get_xdata()) == 2 and len({*x.get_xdata()}) == 1)
    return {float(x.get_xdata()[0]): x.get_linestyle() for x in found}


def labels(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header that every PNG begins with."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(("number", "size"), [(1, (506, 374)), (2, (1012, 374)), (4, (1518, 748))])
def test_a_picture_has_three_panels_in_a_row(number, size, drawn, tmp_path):
    rows = [{"step": step, "a": 1.0 / (step + 1)} for step in range(30)]
    axes = drawn(rows, *[Panel(f"panel {i}", ["a"]) for i in range(number)])
    assert [axis.get_title("left") for axis in axes] == [f"panel {i}" for i in range(number)]
    assert png_size(tmp_path / "training.png") == size
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]


def test_what_has_no_value_has_no_panel(drawn):
    rows = [{"step": 1, "a": 1.0, "never": NAN}]
    axes = drawn(rows, Panel("one", ["a", "b"]), Panel("none", ["b"]), Panel("nan", ["never"]))
    assert [axis.get_title("left") for axis in axes] == ["one"]
    assert labels(axes[0]) == ["a"]


def test_a_run_without_a_single_value_has_a_picture(drawn):
    assert drawn([], Panel("loss", ["loss"])) == []


def test_ppo_without_a_critic_has_no_panels_of_one(drawn):
    told = ["--sft_model_path=x", "--rm_model_path=x", "--kl_controller=adaptive"]
    args = run_ppo.parse_args([*told, "--target_kl=3", "--early_stop_kl=0.01"])
    of_policy = {"objective/kl": 1.0, "policy/approxkl_avg": 0.1, "objective/beta": 0.2}
    axes = drawn([{"step": 1, **of_policy}], *run_ppo.build_panels(args))
    titles = ["KL from the SFT model, nats a response", "KL of the updates, nats a token"]
    assert [axis.get_title("left") for axis in axes] == [*titles, "weight of the KL"]
    assert line(axes[0], "--target_kl=3") == [(0, 3), (1, 3)]
    assert line(axes[1], "--early_stop_kl=0.01") == [(0, 0.01), (1, 0.01)]
    of_critic = {"loss/value_avg": 1.0, "explained_variance": 0.5}
    fixed = run_ppo.build_panels(run_ppo.parse_args(told[:2]))
    axes = drawn([{"step": 1, "objective/kl": 1.0, **of_critic}], *fixed)
    assert [axis.get_title("left") for axis in axes] == [
        titles[0],
        "value loss",
        "variance that the critic explains",
    ]
    assert labels(axes[0]) == ["objective/kl"]


def test_epochs_and_the_best_of_them_are_marked(drawn):
    rows = [{"step": step, "a": 1.0} for step in (5, 10, 15)]
    (axis,) = drawn(rows, Panel("a", ["a"]), epochs={0: 0, 1: 7, 2: 14}, best=1)
    assert upright(axis) == {0.0: ":", 7.0: "-", 14.0: ":"}


def test_a_value_that_is_not_finite_is_a_cross_and_no_point(drawn):
    rows = [{"step": s, "a": a} for s, a in ((1, 0.5), (2, NAN), (3, 2.0), (4, math.inf))]
    (axis,) = drawn(rows, Panel("a", ["a"]))
    assert line(axis, "a") == [(1, 0.5), (3, 2.0)]
    assert [x for x, _ in line(axis, "a: not finite")] == [2, 4]


def test_few_points_are_marked_each(drawn):
    for number, marker in ((1, "o"), (20, "o"), (21, "None")):
        (axis,) = drawn([{"step": s, "a": 1.0} for s in range(number)], Panel("a", ["a"]))
        (found,) = [line for line in axis.lines if line.get_label() == "a"]
        assert str(found.get_marker()) == marker


def test_a_crowd_of_points_has_a_running_mean(drawn):
    rows = [{"step": 10 * s, "a": 2.0 * (s % 2)} for s in range(200)]  # 0, 2, 0, 2 ...
    (axis,) = drawn(rows, Panel("a", ["a"]))
    means = line(axis, "a, mean of 4")
    assert len(means) == 197 and {value for _, value in means} == {1.0}
    assert (means[0][0], means[-1][0]) == (20, 1980)


def test_a_deviation_is_shaded_on_both_sides(drawn):
    rows = [
        {"step": 0, "mean": 3.0, "std": NAN},
        {"step": 1, "mean": 3.0, "std": 0.5},
        {"step": 2, "mean": 4.0, "std": 1.0},
        {"step": 2, "loss": 1.0},
    ]
    (axis,) = drawn(rows, Panel("reward", ["mean"], spread="std"))
    (band,) = axis.collections
    corners = {(float(x), float(y)) for path in band.get_paths() for x, y in path.vertices}
    assert corners == {(1, 2.5), (1, 3.5), (2, 3.0), (2, 5.0)}


def test_a_legend_lies_beneath_its_panel_and_not_over_the_lines(drawn):
    rows = [{"step": s, "a": 1.0, "b": 2.0, "c": 3.0} for s in range(3)]
    for axis in drawn(rows, *[Panel("x", ["a", "b", "c"])] * 4):
        assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0
