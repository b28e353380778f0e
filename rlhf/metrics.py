"""Running means of a stage: to the console, metrics.jsonl, trackers and training.png."""

import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.curves import Panel, draw_panels
from rlhf.disk import commit, hidden, without_nan
from rlhf.processes import is_main_process

Row = dict[str, float]
Samples = Sequence[Mapping[str, str | float]]  # prompts, responses, and what was found of them


class Report(Protocol):
    """Who else is told: the trackers. It is true if there are any."""

    def log(self, values: Row, step: int) -> None:
        """Take numbers."""

    def show(self, samples: Samples, step: int) -> None:
        """Take texts."""

    def finish(self) -> None:
        """Take no more."""


def say(text: str) -> None:
    """Print to stdout, if there is something to print, without tearing a progress bar apart.

    Of several processes the main one prints. Nobody's training ends because nobody reads: if stdout
    is closed or full, the run goes on.
    """
    try:
        if text and is_main_process():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):
            told = f"{os.path.basename(sys.argv[0])}: note: stdout takes nothing more"
            sys.stderr.write(f"{told} ({error.strerror}); the run goes on\n")


def format_number(value: float) -> str:
    """Write a number for people.

    >>> [format_number(x) for x in (3, 0.123456, 1234.5, 2e-5, float("nan"))]
    ['3', '0.1235', '1234', '2.00e-05', 'nan']
    """
    if not math.isfinite(value) or (value == int(value) and abs(value) < 1e6):
        return f"{value:.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4f}"


def format_table(rows: Sequence[Mapping[str, float | str]]) -> str:
    """Lay out rows with the same keys as a plain table.

    >>> print(format_table([{"epoch": 0, "loss": 2.5}, {"epoch": 1, "loss": 0.25}]))
    epoch    loss
        0  2.5000
        1  0.2500
    """
    names = list(rows[0])
    cells = [names] + [
        [v if isinstance(v, str) else format_number(v) for v in (row[name] for name in names)]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def show_samples(samples: Samples) -> None:
    """Print prompts and responses with what was found of them, a line each."""
    for sample in samples:
        texts = [value for value in sample.values() if isinstance(value, str)]
        short = (text if len(text) <= 60 else text[:57] + "..." for text in texts)
        numbers = (f"  {k} {v:.2f}" for k, v in sample.items() if not isinstance(v, str))
        say(f"    {' -> '.join(map(repr, short))}{''.join(numbers)}")


class Metrics:
    """Collects the numbers of every step, and speaks once every `log_step` steps.

    Values stay tensors until a line is due: no step waits for the device. All of
    them go to metrics.jsonl and the trackers, those named in `console` to the console.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        log_step: int,
        report: Report,
        console: Sequence[str],
    ) -> None:
        self.folder, self.num_steps, self.log_step = folder, num_steps, log_step
        self.report, self.console = report, ("epoch", *console, "tokens_per_second")
        self.step = 0
        self.rows: list[Row] = []  # one for each epoch, from the model before training on
        self.logged: list[Row] = []
        self.samples: dict[int, Samples] = {}  # by epoch
        self.pending: dict[str, list[Tensor]] = defaultdict(list)
        self.num_tokens, self.since = 0, time.monotonic()
        self.file = folder / "metrics.jsonl"
        self.bar = tqdm(
            total=num_steps,
            unit="step",
            disable=not (sys.stderr.isatty() and sys.stdout.isatty() and is_main_process()),
            leave=False,
        )

    def add(self, values: Mapping[str, Tensor | float], *, epoch: float, num_tokens: int) -> bool:
        """Take the values of one step; True if they completed a log line."""
        self.step += 1
        self.num_tokens += num_tokens
        self.bar.update()
        for name, value in values.items():
            self.pending[name].append(torch.as_tensor(value, dtype=torch.float64).detach())
        if self.step % self.log_step and self.step != self.num_steps:
            return False
        row: Row = {"step": self.step, "epoch": round(epoch, 4)}
        means = torch.stack([torch.stack(v).mean().cpu() for v in self.pending.values()]).tolist()
        row |= dict(zip(self.pending, means, strict=True))
        row["tokens_per_second"] = self.num_tokens / (time.monotonic() - self.since)
        self.pending.clear()
        self.num_tokens, self.since = 0, time.monotonic()
        self.write(row)
        shown = "  ".join(f"{name} {format_number(row[name])}" for name in self.console)
        if self.bar.disable:
            say(f"step {self.step}/{self.num_steps}  {shown}")
        else:
            self.bar.set_postfix_str(shown)
        return True

    def write(self, row: Row) -> None:
        """Append a row to metrics.jsonl and send it to the trackers."""
        self.logged.append(row)
        if not is_main_process():
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json_line(row))
        self.tell(row)

    def tell(self, row: Row) -> None:
        """Send a row to the trackers, and with an epoch's its samples."""
        step = int(row["step"])
        self.report.log({name: value for name, value in row.items() if name != "step"}, step)
        if is_of_epoch(row):
            self.report.show(self.samples.get(int(row["epoch"]), []), step)

    def add_epoch(self, epoch: int, values: Row, samples: Samples = ()) -> None:
        """Take the evaluation after an epoch, and texts to show; 0 is before training."""
        self.rows.append({"epoch": epoch, **values})
        self.samples[epoch] = samples
        self.write({"step": self.step, "epoch": epoch, **values})
        say("  ".join(f"{name} {format_number(v)}" for name, v in self.rows[-1].items()))
        # The evaluation's time is not the training's, and what came before it is not timed by it.
        self.num_tokens, self.since = 0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Give all that `restore` needs, as JSON holds it; waits for the device."""
        pending = {name: torch.stack(v).tolist() for name, v in self.pending.items()}
        rows = {"rows": self.rows, "logged": self.logged, "samples": [*self.samples.items()]}
        return {"step": self.step, "num_tokens": self.num_tokens, "pending": pending, **rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was given; what was logged after it is forgotten.

        The trackers are told everything again: they were started for a run that goes on.
        """
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.bar.update(self.step)
        self.rows, self.logged = ([with_nan(row) for row in state[x]] for x in ("rows", "logged"))
        for epoch, samples in state.get("samples", ()):  # which older states have not
            self.samples[epoch] = [with_nan(sample) for sample in samples]
        for name, values in state["pending"].items():
            numbers = [math.nan if value is None else value for value in values]
            self.pending[name] = list(torch.tensor(numbers, dtype=torch.float64))
        if not is_main_process():
            return
        hidden(self.file).write_text("".join(map(json_line, self.logged)), encoding="utf-8")
        commit(hidden(self.file), self.file)
        for row in self.logged:
            self.tell(row)

    def finish(self, panels: Sequence[Panel], *, best: Path, next_step: str) -> None:
        """Draw training.png; print the table of epochs, the best checkpoint, the next step."""
        self.bar.close()
        if not is_main_process():
            return
        target = os.readlink(best)
        draw_panels(
            self.folder / "training.png",
            self.logged,
            panels,
            epochs={int(row["epoch"]): int(row["step"]) for row in self.logged if is_of_epoch(row)},
            best=int(re.findall(r"epoch=(\d+)", target)[-1]),
        )
        self.report.finish()
        say(f"\n{format_table(self.rows)}\n")
        say(f"best checkpoint: {best} -> {target}\nnext: {next_step}")


def json_line(row: Row) -> str:
    """Write a row as metrics.jsonl has it; a number that JSON has not becomes null."""
    return json.dumps(without_nan(row), allow_nan=False) + "\n"


def is_of_epoch(row: Row) -> bool:
    """Tell the evaluation after an epoch from a line of training, which has a speed."""
    return "tokens_per_second" not in row


def with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row back from JSON: null was not a number."""
    return {name: math.nan if value is None else value for name, value in row.items()}
