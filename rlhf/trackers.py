"""TRACKERS: what a run shows to TensorBoard, W&B and Trackio. None of them costs it anything.

Each run has a name of its own, kept beside what they write. One that goes on after a stop keeps the
name, and tells again what its state knows, so that a tracker holds every step once: TensorBoard's
files and Trackio's rows are written anew, and W&B is told what it has not seen.
"""

import os
import random
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.disk import commit, hidden, remove, sweep
from rlhf.markdown import code, fenced, markdown_table
from rlhf.metrics import Row, Samples, say
from rlhf.processes import is_main_process
from rlhf.runtime import build_tracker, usable_trackers

PROJECT = "rlhf"  # the project at W&B and Trackio, and the folder inside a run's
SECONDS_TO_FINISH = "60"  # for W&B, which else waits for a network without end


class Trackers:
    """Those that have started. One that fails is named once, and the run goes on without it."""

    def __init__(self, names: Iterable[str], folder: Path, arguments: dict[str, Any]) -> None:
        self.place = folder / PROJECT
        self.started: dict[str, Any] = {}
        self.seen: dict[str, int] = {}  # W&B: the steps before this one are there
        before = random.getstate()  # which importing them changes
        for name in names:
            self.attempt(name, partial(self.start, name, folder, arguments))
        random.setstate(before)

    def __bool__(self) -> bool:
        return bool(self.started)

    def attempt(self, name: str, act: Callable[[], None]) -> None:
        """Do what may fail in any way: no login, no network, a full disk, another version."""
        try:
            act()
        except Exception as error:
            self.started.pop(name, None)
            told = " ".join(f"{error}".split()) or type(error).__name__
            say(f"note: --report_to={name}: {told}; the run goes on without it")

    def start(self, name: str, folder: Path, arguments: dict[str, Any]) -> None:
        """Start a tracker; a run that goes on is the same one there."""
        self.place.mkdir(exist_ok=True)
        sweep(self.place)
        known = self.place / "id"
        if not known.exists():
            hidden(known).write_text(secrets.token_hex(4), encoding="utf-8")
            commit(hidden(known), known)
        key = known.read_text(encoding="utf-8")
        if name == "tensorboard":
            if (self.place / name).exists():
                remove(self.place / name)
            threading.excepthook = leave_to_main
            tracker = build_tracker(name, name, logging_dir=self.place)
        elif name == "wandb":
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", SECONDS_TO_FINISH)
            options = {"name": str(folder), "id": key, "resume": "allow", "dir": str(self.place)}
            tracker = build_tracker(name, PROJECT, **options)
        else:
            drop_trackio_run(f"{folder} {key}")
            tracker = build_tracker(name, PROJECT, name=f"{folder} {key}")
        tracker.start()
        self.started[name] = tracker
        self.seen[name] = tracker.tracker.step if name == "wandb" else 0
        if name == "tensorboard":  # whose own way of keeping them is a second run beside this one
            told = [[code(f"--{x}"), code(y)] for x, y in arguments.items()]
            tracker.writer.add_text("arguments", markdown_table([["", ""], *told]), 0)
        else:
            tracker.store_init_configuration(arguments)

    def log(self, values: Row, step: int) -> None:
        """Send numbers."""
        for name, tracker in [*self.started.items()]:
            if step >= self.seen[name]:
                self.attempt(name, partial(tracker.log, values, step=step))

    def show(self, samples: Samples, step: int) -> None:
        """Send a table of texts, as text: what is written in them is no markup."""
        for name, tracker in [*self.started.items()]:
            if step < self.seen[name] or not samples:
                continue
            show = {"tensorboard": show_texts, "wandb": show_table, "trackio": show_rows}[name]
            self.attempt(name, partial(show, tracker, samples, step))

    def finish(self) -> None:
        """Let them send the rest."""
        for name, tracker in [*self.started.items()]:
            self.attempt(name, tracker.finish)


def start_trackers(report_to: str, *, folder: Path, arguments: dict[str, Any]) -> Trackers:
    """Start what `--report_to` names, in the main process."""
    names, _ = usable_trackers(report_to) if is_main_process() else ([], "")
    return Trackers(names, folder, arguments)


def leave_to_main(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writing thread: the next call to it raises that error."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def drop_trackio_run(name: str) -> None:
    """Forget what a run has told Trackio on this machine."""
    import trackio

    with suppress(ValueError):  # there is no such project yet
        for run in [run for run in trackio.Api().runs(PROJECT) if run.name == name]:
            run.delete()


def show_texts(tracker: Any, samples: Samples, step: int) -> None:
    """Give TensorBoard a text for each row, so that a slider goes through its steps."""
    for number, sample in enumerate(samples, start=1):
        tracker.writer.add_text(f"samples/{number}", as_markdown(sample), step)
    tracker.writer.flush()


def show_table(tracker: Any, samples: Samples, step: int) -> None:
    """Give W&B a table."""
    tracker.log_table("samples", step=step, **as_table(samples))


def show_rows(tracker: Any, samples: Samples, step: int) -> None:
    """Give Trackio a table."""
    import trackio

    tracker.log({"samples": trackio.Table(**as_table(samples))}, step=step)


def as_table(samples: Samples) -> dict[str, list[Any]]:
    """Take rows apart, as both want them."""
    return {"columns": [*samples[0]], "data": [[*sample.values()] for sample in samples]}


def as_markdown(sample: Mapping[str, str | float]) -> str:
    """Write a row for readers of Markdown, each text between fences longer than any in it.

    >>> print(as_markdown({"response": "Blue.", "score": 4.25}))
    **response**
    <BLANKLINE>
    ```
    Blue.
    ```
    <BLANKLINE>
    **score** 4.25
    """
    parts = []
    for name, value in sample.items():
        if isinstance(value, str):
            parts.append(f"**{name}**\n\n{fenced(value)}")
        else:
            parts.append(f"**{name}** {value:.2f}")
    return "\n\n".join(parts)
