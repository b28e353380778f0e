"""RESUME: what a run that was stopped goes on from, and how it is stopped.

Weights change in whole steps only. In between, the run can be told to stop at any moment: it gives
up what it has begun, saves the state after the last whole step, and ends. The same command goes on
from there, and ends in the same bytes as if nothing had happened.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf.batches import PlannedBatch, Room
from rlhf.checkpoints import load_facts, load_tensors, save_tensors
from rlhf.disk import remove, require_space
from rlhf.earlier import EARLIER, RESUME, STATES
from rlhf.errors import InputError, RunError
from rlhf.memory import Result, fit
from rlhf.metrics import Metrics, say
from rlhf.optim import restore_schedule
from rlhf.processes import (
    is_main_process,
    most_of_processes,
    num_processes,
    process_index,
    take_from_main,
    wait_for_all,
)
from rlhf.run_folder import RunFolder
from rlhf.sharding import gathered, is_sharded, part_like

GENERATIONS = 2  # of the state: should the newer one be damaged, there is the older
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal has told the run to stop. No `except Exception` on the way may keep it."""


class Progress:
    """How far a run has come: in memory, and every few minutes on the disk.

    `modules` are what is trained, first of all the one that checkpoints hold. It is a context
    around the training loop; `whole` is one around what happens entirely or not at all.

    Raises: InputError if the state of a stopped run is damaged; RunError if the disk is too small.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Sequence[Sequence[PlannedBatch]],
        *,
        modules: Mapping[str, nn.Module],
        schedules: Sequence[LambdaLR],
        metrics: Metrics,
        room: Room,
        save_every: float,  # minutes
        seed: int,
    ) -> None:
        self.folder, self.plan, self.metrics, self.room = folder, plan, metrics, room
        self.modules, self.schedules, self.save_every = modules, schedules, 60 * save_every
        self.seed = seed
        self.device = next(next(iter(modules.values())).parameters()).device
        self.carried: dict[str, Tensor] = {}  # what a step of several parts goes on with
        self.in_whole, self.torn, self.changed = False, False, False
        self.signal = 0
        self.saved_at, self.saved_epochs = time.monotonic(), 1  # epoch 0: before training
        for parameter in chain.from_iterable(m.parameters() for m in modules.values()):
            if parameter.requires_grad:
                # A backward pass is one call, which may take long: it sees signals in Python only.
                parameter.register_post_accumulate_grad_hook(lambda _: None)
        if is_main_process():
            self.require_space()
        if folder.standing == "stopped":
            self.restore()
        wait_for_all()  # before there is another state than those that were restored
        take_from_main(self.weights().values())
        if any(most_of_processes([not self.states()], self.device)):
            self.save()  # from here on, a run without a state has lost it

    # What is left to do

    def left(self) -> Iterator[tuple[int, Sequence[PlannedBatch]]]:
        """Yield each epoch that is not finished, from 1 on, and its batches that are not done."""
        done, finished = self.metrics.step, len(self.metrics.rows) - 1
        for epoch, batches in enumerate(self.plan, start=1):
            if epoch > finished:
                yield epoch, batches[done:]
            done = max(0, done - len(batches))

    def fitting(self, attempt: Callable[[Room], Result]) -> Result:
        """Do what may run out of memory, as `fit` does; the room that it took stays.

        Dropout's noise is told by seed, step and process, and is no part of a state.
        """
        name = f"{self.seed}/{self.metrics.step}/{process_index()}"
        torch.manual_seed(random.Random(name).getrandbits(63))
        if any(map(is_sharded, self.modules.values())):  # another try would be this process's alone
            return attempt(self.room)
        result, self.room = fit(attempt, self.room, self.device, self.schedules)
        return result

    # How it is stopped

    def __enter__(self) -> Self:
        self.handlers: dict[int, Any] = {}
        self.in_whole = True  # until all of them are there
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and & set it
                    self.handlers[number] = signal.signal(number, self.on_signal)
        self.in_whole = False
        return self

    def on_signal(self, number: int, _: object) -> None:
        """Stop the run as soon as its weights are whole; a second signal ends it at once.

        Several processes stop together, after the step that they are in. Their launcher passes
        every signal on, so that some come twice; it ends at once those that take too long.
        """
        if self.signal and num_processes() == 1:
            os._exit(128 + number)
        self.signal = self.signal or number
        if not self.in_whole and num_processes() == 1:
            raise Stopped(128 + number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let no signal in between; at the end, save the state if that is due."""
        self.in_whole, self.torn = True, True
        try:
            yield
            self.torn, self.changed = False, True
            epoch_ended = len(self.metrics.rows) > self.saved_epochs
            is_due = epoch_ended or time.monotonic() - self.saved_at >= self.save_every
            told, save_now = most_of_processes([self.signal, is_due], self.device)
            if save_now:
                self.save()
        finally:
            self.in_whole = False
        # A signal that has come since counts here, but with several processes after the next step.
        self.signal = self.signal or told
        if told or (self.signal and num_processes() == 1):
            raise Stopped(128 + self.signal)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.in_whole = True  # what comes now happens entirely, or a second signal ends it
        try:
            # After an error the state on the disk stays as it is.
            if isinstance(error, Stopped) and self.changed and not self.torn:
                self.save()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if isinstance(error, Stopped):
            name = signal.Signals(self.signal).name
            say(f"stopped by {name} after step {self.metrics.step}; the same command goes on")

    # The state on the disk

    def states(self) -> list[Path]:
        """Name the states on the disk, the newest first."""
        return sorted((self.folder.path / RESUME).glob(STATES), reverse=True)

    def weights(self) -> dict[str, Tensor]:
        """Give all that is trained, by name; a tensor with two names stands under the first.

        Frozen weights are the parent's, which a run finds as it left it.
        """
        tensors: dict[int, tuple[str, Tensor]] = {}
        for name, module in self.modules.items():
            for key, tensor in module.state_dict(keep_vars=True).items():
                if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                    continue
                tensors.setdefault(id(tensor), (f"{name}.{key}", tensor.detach()))
        return dict(tensors.values())

    def save(self) -> None:
        """Write the state after the last whole step; the oldest one goes.

        All processes take part, since each may hold but a part of it; the main one writes.
        """
        tensors = self.weights()
        for i, schedule in enumerate(self.schedules):
            for index, moments in schedule.optimizer.state_dict()["state"].items():
                for name, tensor in moments.items():
                    tensors[f"optimizer.{i}.{index}.{name}"] = tensor
        tensors = gathered(tensors)
        if is_main_process():
            self.write(tensors)
        self.changed, self.saved_epochs = False, max(1, len(self.metrics.rows))
        self.saved_at = time.monotonic()

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Do what `save` says, once the tensors are whole."""
        tensors |= {f"carried.{name}": tensor for name, tensor in self.carried.items()}
        best = self.folder.path / "best"
        facts = {
            "metrics": self.metrics.state(),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "room": self.room,
            "lowest": self.folder.lowest,
            "best": os.readlink(best) if best.is_symlink() else None,
        }
        states = self.states()
        number = 1 + (int(states[0].name.rpartition("-")[2]) if states else 0)
        save_tensors(self.folder.path / RESUME / f"state-{number:06}", tensors, facts)
        for old in self.states()[GENERATIONS:]:
            remove(old)
        # Not before: a state that names a checkpoint as the best must find it.
        self.folder.remove_older({load_facts(state).get("best") for state in self.states()})

    def restore(self) -> None:
        """Go on from the newest state that is as it was written. Raises: InputError."""
        states, loaded, damaged = self.states(), None, []
        for state in states if is_main_process() else ():
            loaded = load_tensors(state, device=torch.device("cpu"))
            if loaded:
                break
            damaged.append(state)
            say(f"note: {state} is damaged; looking for an older state")
        # The main process chooses, and all take the same state: `chosen` counts from 1.
        [chosen] = most_of_processes([len(damaged) + 1 if loaded else 0], self.device)
        if not chosen:
            self.require_nothing_lost(states)
            return
        loaded = loaded or load_tensors(states[chosen - 1], device=torch.device("cpu"))
        if loaded is None:
            told = f"process {process_index()} cannot read it, but the first one"
            raise RunError(f"{states[chosen - 1]}: {told} can; start the same command again")
        wait_for_all()
        for state in damaged:  # it would count as one of the two
            remove(state)
        tensors, facts = loaded
        if missing := self.weights().keys() - tensors.keys():
            raise InputError(
                f"--ckpt_dir={self.folder.path}: its state has no {min(missing)}: it was written by"
                " other versions; go on with those, or start afresh with --resume=never"
            )
        for name, tensor in self.weights().items():
            tensor.copy_(part_like(tensors.pop(name), tensor))
        for i, schedule in enumerate(self.schedules):
            restore_schedule(schedule, facts["schedules"][i], tensors, f"optimizer.{i}.")
        self.carried = {
            name.removeprefix("carried."): tensor.to(self.device)
            for name, tensor in tensors.items()
            if name.startswith("carried.")
        }
        self.room = Room(*facts["room"])
        self.folder.restore_best(facts["best"], facts["lowest"])
        self.metrics.restore(facts["metrics"])
        self.saved_epochs = max(1, len(self.metrics.rows))
        say(f"going on in {self.folder.path} after step {self.metrics.step}")

    def require_nothing_lost(self, states: Sequence[Path]) -> None:
        """Stop if a run without a usable state has something to lose. Raises: InputError."""
        folder = self.folder.path
        if states or (folder / "best").is_symlink():
            why = "every state in" if states else "there is no state in"
            raise InputError(
                f"--ckpt_dir={folder}: its run cannot be gone on with: {why} {folder / RESUME}"
                f"{' is damaged' if states else ''}; --resume=never moves it away and starts afresh"
            )
        if is_main_process():
            self.metrics.file.unlink(missing_ok=True)
        say(f"nothing was saved yet of the run in {folder}: it starts from the beginning")

    def require_space(self) -> None:
        """Stop before training if the disk cannot take what it will write. Raises: RunError."""
        whole = sum(p.numel() * 4 for p in next(iter(self.modules.values())).parameters())
        trained = sum(weight.numel() * 4 for weight in self.weights().values())
        keep = self.folder.keep
        checkpoints = min(len(self.plan), keep + 2) if keep else len(self.plan)
        # A state holds what is trained and AdamW's moments, and is whole before the oldest goes.
        needed = checkpoints * whole + (GENERATIONS + 1) * 3 * trained
        for entry in self.folder.path.iterdir():  # what stands there already
            if entry.name != EARLIER and not entry.is_symlink():
                needed -= sum(p.stat().st_size for p in entry.rglob("*") if p.is_file())
        what = f"{checkpoints} checkpoints and the state of the run"
        remedy = "free some, or keep fewer by --keep"
        require_space(self.folder.path, needed, what=what, remedy=remedy)
