"""Metrics: means of what was seen since the last line, in a file, on the console, in a picture."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rlhf.curves import Panel
from rlhf.disk import without_nan
from rlhf.metrics import Metrics, Samples, format_number, format_table, say, show_samples

NAN = float("nan")


class Sink(list):
    """Stands for the trackers: keeps what is reported."""

    def log(self, values: dict[str, float], step: int) -> None:
        self.append((values, step))

    def show(self, samples: Samples, step: int) -> None:
        self.append((samples, step))

    def finish(self) -> None:
        self.append("finished")


def collector(folder: Path, *, num_steps: int, log_step: int, **changes: Any) -> Metrics:
    options = {"report": Sink(), "console": ["loss"]} | changes
    return Metrics(folder, num_steps=num_steps, log_step=log_step, **options)


def logged(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def add_losses(metrics: Metrics, losses: list[float]) -> list[bool]:
    return [metrics.add({"loss": torch.tensor(x)}, epoch=0.5, num_tokens=10) for x in losses]


def test_a_line_holds_the_means_since_the_last_line(tmp_path):
    metrics = collector(tmp_path, num_steps=4, log_step=2)
    assert add_losses(metrics, [1.0, 4.0, 6.0, 7.0]) == [False, True, False, True]
    assert [(row["step"], row["loss"]) for row in logged(tmp_path)] == [(2, 2.5), (4, 6.5)]


def test_the_last_line_comes_even_if_its_window_is_not_full(tmp_path):
    metrics = collector(tmp_path, num_steps=5, log_step=3)
    assert add_losses(metrics, [1.0, 2.0, 3.0, 4.0, 6.0]) == [False, False, True, False, True]
    assert [(row["step"], row["loss"]) for row in logged(tmp_path)] == [(3, 2.0), (5, 5.0)]


def test_a_run_shorter_than_a_window_is_logged(tmp_path):
    assert add_losses(collector(tmp_path, num_steps=1, log_step=100), [3.0]) == [True]
    assert logged(tmp_path)[0]["loss"] == 3.0


def test_numbers_and_tensors_of_any_type_are_averaged(tmp_path):
    metrics = collector(tmp_path, num_steps=2, log_step=2)
    for loss, eos in ((0.25, torch.tensor(3)), (0.75, torch.tensor(4))):
        weight = torch.tensor(loss, dtype=torch.bfloat16, requires_grad=True)
        metrics.add({"loss": loss, "eos": eos, "w": weight}, epoch=1, num_tokens=1)
    (row,) = logged(tmp_path)
    assert (row["loss"], row["eos"], row["w"]) == (0.5, 3.5, 0.5)


def test_no_graph_is_kept_alive_until_the_line_is_due(tmp_path):
    metrics = collector(tmp_path, num_steps=9, log_step=9)
    metrics.add({"loss": torch.ones((), requires_grad=True) * 2}, epoch=0, num_tokens=1)
    assert not metrics.pending["loss"][0].requires_grad


def test_tokens_per_second_is_tokens_over_time(tmp_path, monkeypatch):
    clock = iter([100.0, 104.0, 104.0, 109.0, 109.0])
    monkeypatch.setattr("rlhf.metrics.time.monotonic", lambda: next(clock))
    metrics = collector(tmp_path, num_steps=4, log_step=2)  # starts at 100
    add_losses(metrics, [1.0] * 4)  # 20 tokens until 104, 20 more until 109
    assert [row["tokens_per_second"] for row in logged(tmp_path)] == [5.0, 4.0]


def test_the_time_of_an_evaluation_and_what_came_before_it_are_left_out(tmp_path, monkeypatch):
    clock = iter([0.0, 90.0, 92.0, 92.0])
    monkeypatch.setattr("rlhf.metrics.time.monotonic", lambda: next(clock))
    metrics = collector(tmp_path, num_steps=2, log_step=2)
    add_losses(metrics, [1.0])
    metrics.add_epoch(1, {"eval_loss": 1.0})  # over at 90
    add_losses(metrics, [1.0])  # its 10 tokens took 2 seconds
    assert logged(tmp_path)[-1]["tokens_per_second"] == 5.0


def test_a_learning_rate_is_logged_as_it_is(tmp_path):
    collector(tmp_path, num_steps=1, log_step=1).add({"lr": 2e-5, "loss": 1}, epoch=1, num_tokens=1)
    assert logged(tmp_path)[0]["lr"] == 2e-5


def test_what_is_not_finite_is_null_in_the_file_and_nan_for_trackers(tmp_path):
    metrics = collector(tmp_path, num_steps=1, log_step=1)
    values = {"loss": torch.tensor(NAN), "kl": float("inf"), "lr": 0.5}
    metrics.add(values, epoch=0.12345678, num_tokens=1)
    (row,) = logged(tmp_path)
    assert (row["loss"], row["kl"], row["lr"], row["epoch"]) == (None, None, 0.5, 0.1235)
    ((reported, step),) = metrics.report
    assert step == 1 and math.isnan(reported["loss"]) and "step" not in reported


def test_the_console_shows_only_what_is_named(tmp_path, capsys):
    metrics = collector(tmp_path, num_steps=2, log_step=1, console=["loss", "lr"])
    metrics.add({"lr": 2e-5, "hidden": 7.0, "loss": 0.5}, epoch=0.5, num_tokens=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1/2  epoch 0.5000  loss 0.5000  lr 2.00e-05  tokens_per_second ")
    assert "hidden" not in line and logged(tmp_path)[0]["hidden"] == 7.0


def test_rows_of_epochs_start_before_training_and_go_everywhere(tmp_path, capsys):
    metrics = collector(tmp_path, num_steps=1, log_step=1)
    metrics.add_epoch(0, {"eval_loss": 3.0})
    add_losses(metrics, [2.5])
    metrics.add_epoch(1, {"eval_loss": NAN})
    assert [row["epoch"] for row in metrics.rows] == [0, 1]
    rows = logged(tmp_path)
    assert rows[0] == {"step": 0, "epoch": 0, "eval_loss": 3.0}
    assert rows[2] == {"step": 1, "epoch": 1, "eval_loss": None}
    assert [step for values, step in metrics.report if values] == [0, 1, 1]
    assert metrics.report[0][0] == {"epoch": 0, "eval_loss": 3.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 0  eval_loss 3" and lines[-1] == "epoch 1  eval_loss nan"


def test_the_end_shows_the_table_the_best_checkpoint_and_the_next_step(tmp_path, capsys):
    (tmp_path / "best").symlink_to("gpt2_sft_epoch=1_loss=2.0000")
    metrics = collector(tmp_path, num_steps=1, log_step=1)
    metrics.add_epoch(0, {"eval_loss": 2.5})
    add_losses(metrics, [2.0])
    metrics.add_epoch(1, {"eval_loss": 2.125})
    capsys.readouterr()
    best = tmp_path / "best"
    panels = [Panel("loss", ["loss", "eval_loss"])]
    metrics.finish(panels, best=best, next_step="sh exec_run_rm.sh")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "epoch  eval_loss",
        "    0     2.5000",
        "    1     2.1250",
        "",
        f"best checkpoint: {best} -> gpt2_sft_epoch=1_loss=2.0000",
        "next: sh exec_run_rm.sh",
    ]
    assert (tmp_path / "training.png").is_file() and metrics.report[-1] == "finished"


def test_a_picture_is_told_which_epoch_is_the_best_and_where_each_ended(tmp_path, monkeypatch):
    (tmp_path / "best").symlink_to("run_epoch=7_sft_epoch=2_loss=1.0000")
    told = mock.Mock()
    monkeypatch.setattr("rlhf.metrics.draw_panels", told)
    metrics = collector(tmp_path, num_steps=6, log_step=2)
    metrics.add_epoch(0, {"eval_loss": 3.0})
    for epoch in (1, 2):
        add_losses(metrics, [2.0, 2.0, 2.0])
        metrics.add_epoch(epoch, {"eval_loss": 1.0})
    metrics.finish([], best=tmp_path / "best", next_step="")
    assert told.call_args.kwargs == {"epochs": {0: 0, 1: 3, 2: 6}, "best": 2}


def test_samples_go_to_the_trackers_beside_their_epoch(tmp_path):
    metrics = collector(tmp_path, num_steps=1, log_step=1)
    metrics.add_epoch(0, {"eval_loss": 3.0}, [{"prompt": "Hi", "response": "Ho"}])
    values = {"epoch": 0, "eval_loss": 3.0}
    assert metrics.report == [(values, 0), ([{"prompt": "Hi", "response": "Ho"}], 0)]


def test_a_run_that_goes_on_tells_the_trackers_all_that_its_state_knows(tmp_path):
    metrics = collector(tmp_path, num_steps=9, log_step=1)
    metrics.add_epoch(0, {"eval_loss": 3.0}, [{"prompt": "Hi", "score": NAN}])
    add_losses(metrics, [2.0])
    metrics.add_epoch(1, {"eval_loss": 2.0}, [{"prompt": "Hi", "score": 4.5}])
    state = json.loads(json.dumps(without_nan(metrics.state())))
    add_losses(metrics, [1.0])  # which the state does not know
    again = collector(tmp_path, num_steps=9, log_step=1)
    again.restore(state)
    assert str(again.report) == str(metrics.report[:-1])  # nan is not equal to itself
    assert [step for _, step in again.report] == [0, 0, 1, 1, 1]
    del state["samples"]  # as states were before there were any
    older = collector(tmp_path, num_steps=9, log_step=1)
    older.restore(state)
    assert [step for shown, step in older.report if shown] == [0, 1, 1]


def test_samples_are_printed_short(capsys):
    show_samples([{"prompt": "x" * 61, "response": "Ho\n", "score": 1.0, "kl": -0.046}])
    expected = f"    '{'x' * 57}...' -> 'Ho\\n'  score 1.00  kl -0.05\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12, "12"),
        (3.0, "3"),
        (0.5, "0.5000"),
        (-0.123456, "-0.1235"),
        (0.001, "0.0010"),
        (0.000999, "9.99e-04"),
        (-2e-5, "-2.00e-05"),
        (1234.5678, "1235"),
        (1.5e304, "1.50e+304"),
        (2e20, "2.00e+20"),
        (NAN, "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert format_number(value) == text


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    rows = [{"stage": "sft", "loss": 12345.6}, {"stage": "reward", "loss": NAN}]
    assert format_table(rows).splitlines() == [" stage   loss", "   sft  12346", "reward    nan"]


def test_text_goes_to_stdout_and_nothing_prints_nothing(capsys):
    say("")
    say("é ≥ 1")
    assert capsys.readouterr() == ("é ≥ 1\n", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(tmp_path, monkeypatch):
    for stream, out in (
        (Terminal(), Terminal()),
        (Terminal(), io.StringIO()),  # python run_sft.py | tee log
        (io.StringIO(), Terminal()),
    ):
        bar = stream.isatty() and out.isatty()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", out)
        metrics = collector(tmp_path, num_steps=1, log_step=1)
        add_losses(metrics, [0.5])
        metrics.bar.close()
        assert ("loss 0.5000" in stream.getvalue()) == bar
        assert ("step 1/1  epoch 0.5000  loss 0.5000" in out.getvalue()) != bar


SPEAKER = """
import sys
from pathlib import Path
from rlhf.metrics import say
for _ in range(200):
    say("x" * 1000)
Path(sys.argv[1]).touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| head -1", "> /dev/full"])
def test_a_run_goes_on_when_nobody_takes_its_output(output, tmp_path):
    done = tmp_path / "done"
    command = f"{sys.executable} -c '{SPEAKER}' {done} {output}"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.exists() and "Traceback" not in ended.stderr
    assert ended.stderr.count("stdout takes nothing more") == 1
