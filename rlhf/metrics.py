"""Running means of a stage: to the console, metrics.jsonl, trackers and training.png."""

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from rlhf.disk import commit, hidden, without_nan
from rlhf.processes import is_main_process

Row = dict[str, float]
Report = Callable[[Row, int], None]  # to the trackers: values, step


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


def show_samples(
    prompts: Sequence[str], responses: Sequence[str], scores: Sequence[float], kl: Sequence[float]
) -> None:
    """Print the first three responses with score and KL, a line each; one KL may be negative."""
    for *texts, score, nats in list(zip(prompts, responses, scores, kl, strict=True))[:3]:
        prompt, response = (text if len(text) <= 60 else text[:57] + "..." for text in texts)
        say(f"    {prompt!r} -> {response!r}  score {score:.2f}  kl {nats:.2f}")


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
        self.report({k: v for k, v in row.items() if k != "step"}, self.step)

    def add_epoch(self, epoch: int, values: Row) -> None:
        """Take the evaluation after an epoch; 0 is the model before training."""
        self.rows.append({"epoch": epoch, **values})
        self.write({"step": self.step, "epoch": epoch, **values})
        say("  ".join(f"{name} {format_number(v)}" for name, v in self.rows[-1].items()))
        # The evaluation's time is not the training's, and what came before it is not timed by it.
        self.num_tokens, self.since = 0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Give all that `restore` needs, as JSON holds it; waits for the device."""
        pending = {name: torch.stack(v).tolist() for name, v in self.pending.items()}
        rows = {"rows": self.rows, "logged": self.logged}
        return {"step": self.step, "num_tokens": self.num_tokens, "pending": pending, **rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was given; what was logged after it is forgotten."""
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.bar.update(self.step)
        self.rows, self.logged = ([with_nan(row) for row in state[x]] for x in ("rows", "logged"))
        for name, values in state["pending"].items():
            numbers = [math.nan if value is None else value for value in values]
            self.pending[name] = list(torch.tensor(numbers, dtype=torch.float64))
        if not is_main_process():
            return
        hidden(self.file).write_text("".join(map(json_line, self.logged)), encoding="utf-8")
        commit(hidden(self.file), self.file)

    def finish(self, panels: Sequence[Sequence[str]], *, best: Path, next_step: str) -> None:
        """Draw training.png; print the table of epochs, the best checkpoint, the next step."""
        self.bar.close()
        if not is_main_process():
            return
        draw_panels(self.folder / "training.png", self.logged, panels)
        target = os.readlink(best)
        say(f"\n{format_table(self.rows)}\n")
        say(f"best checkpoint: {best} -> {target}\nnext: {next_step}")


def json_line(row: Row) -> str:
    """Write a row as metrics.jsonl has it; a number that JSON has not becomes null."""
    return json.dumps(without_nan(row), allow_nan=False) + "\n"


def with_nan(row: Mapping[str, float | None]) -> Row:
    """Read a row back from JSON: null was not a number."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def draw_panels(path: Path, rows: Sequence[Row], panels: Sequence[Sequence[str]]) -> None:
    """Draw one panel for each group of metrics, against the step."""
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3 * lines), layout="constrained")
    figure.suptitle(str(path.parent))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, names in zip(axes, panels, strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            marker = "o" if len(points) < 20 else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(hidden(path), dpi=120, format="png")
    commit(hidden(path), path)
