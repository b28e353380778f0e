"""RUN FOLDER: one run of a stage: what it was made from, its checkpoints, and the best of them.

The same command goes on where its run was stopped; another never overwrites what is there.
"""

import math
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.cards import data_origin, model_cards
from rlhf.checkpoints import (
    RUN_FILE,
    base_model,
    content_of,
    git_commit,
    model_name,
    named_checkpoint,
    require_undamaged,
    save_checkpoint,
)
from rlhf.disk import (
    Lock,
    hidden,
    link,
    read_record,
    remove,
    replace_record,
    require_unlocked,
    sweep,
)
from rlhf.earlier import EARLIER, RESUME, STATES, check_run_folder, move_to_earlier
from rlhf.errors import DIVERGED, InputError, RunError
from rlhf.processes import is_main_process, num_processes, wait_for_all
from rlhf.sharding import whole_weights

# They change where, how often and how much is written, or where it is computed, but no number.
FREE_ARGUMENTS = {"ckpt_dir", "gpu_id", "keep", "log_step", "report_to", "resume", "save_every"}


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Tell in which arguments and inputs two runs differ.

    An argument that the earlier one had not heard of yet had its default.
    """
    told = []
    paths = {flag.removeprefix("--") for flag in (*then["inputs"], *now["inputs"])}
    for name in sorted({*then["arguments"], *now["arguments"]} - paths):
        old = then["arguments"].get(name, defaults.get(name))
        new = now["arguments"].get(name)
        if old != new:
            told.append(f"--{name} was {old}, is {new}")
    alone = {"number of processes": 1, "stage of ZeRO": 0}
    old, new = (run.get("processes", alone) for run in (then, now))
    told += [f"the {x} was {old[x]}, is {new[x]}" for x in alone if old[x] != new[x]]
    for flag in sorted({*then["inputs"], *now["inputs"]}):
        old, new = then["inputs"].get(flag, {}), now["inputs"].get(flag, {})
        if old.get("content") != new.get("content"):
            same_path = old.get("path") == new.get("path")
            was = "its content has changed" if same_path else f"was {old.get('path')}"
            told.append(f"{flag}={new.get('path')}: {was}")
    return told


class RunFolder:
    """The folder of one run of a stage, which this process holds while it is a context and started.

    `inputs` maps flags to the paths that the run reads, its parent checkpoint first. `resume` is
    "auto" (go on with a run that was stopped), "never" (start afresh) or "must" (go on or fail).
    `standing` tells what there is to do: "new", "stopped" or "finished". `defaults` are the
    arguments': what a run did that had not heard of one of them yet.

    Nothing is written before `start`. Raises: InputError if the folder cannot take the run, another
    process holds it, an input is damaged, or a run that was stopped was another.
    """

    def __init__(
        self,
        path: str,
        *,
        stage: str,
        inputs: dict[str, str],
        arguments: dict[str, Any],
        defaults: Mapping[str, Any],
        data: dict[str, str],
        resume: str,
        keep: int = 0,
        zero_stage: int = 0,
    ) -> None:
        self.path, self.stage, self.keep, self.resume = Path(path), stage, keep, resume
        self.defaults = defaults
        check_run_folder(self.path, inputs)
        for flag, read in inputs.items():
            require_undamaged(read, flag=flag)
        self.lowest = math.inf
        self.saved: dict[int, str] = {}  # names of the checkpoints by epoch, as far as saved here
        flag, parent = next(iter(inputs.items()))
        self.model = model_name(parent, flag=flag)
        # An input is the same wherever it lies, and another if its content is.
        paths = {name for name, value in arguments.items() if value == inputs.get(f"--{name}", "")}
        content = {flag: content_of(read) for flag, read in inputs.items() if flag != "--data_dir"}
        self.made_from = {
            "arguments": {k: v for k, v in arguments.items() if k not in FREE_ARGUMENTS | paths},
            "inputs": {
                flag: {"path": named_checkpoint(read), "content": content.get(flag, data)}
                for flag, read in inputs.items()
            },
            "processes": {"number of processes": num_processes(), "stage of ZeRO": zero_stage},
        }
        self.facts = {
            "stage": stage,
            "model": self.model,
            "arguments": arguments,
            "parent": named_checkpoint(parent),
            "parent_content": content[flag],
            "base_model": base_model(parent, flag=flag),
            "other_inputs": {
                k: v for k, v in self.made_from["inputs"].items() if k not in (flag, "--data_dir")
            },
            "data": data,
            "data_origin": data_origin(inputs["--data_dir"], data),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
            },
            "git_commit": git_commit(),
        }
        self.lock: Lock | None = None
        if is_main_process():
            require_unlocked(self.path, flag="--ckpt_dir")
        self.standing = self.find_standing()

    def find_standing(self) -> str:
        """Decide what there is to do in this folder. Raises: InputError."""
        if self.resume == "never":
            return "new"
        record = self.read_record()
        finished = bool(record) and record["finished"]
        if self.resume == "must" and (finished or not any((self.path / RESUME).glob(STATES))):
            why = "is finished" if finished else "holds no state"
            raise InputError(f"--resume=must: {self.path} {why}: there is nothing to go on with")
        if not record:
            return "new"
        then = record["made_from"]
        if finished:  # by however many processes
            then = {**then, "processes": self.made_from["processes"]}
        changed = differences(then, self.made_from, self.defaults)
        if finished:
            is_there = (self.path / "best" / RUN_FILE).is_file()
            return "finished" if is_there and not changed else "new"
        if changed:
            raise InputError(
                f"--ckpt_dir={self.path}: holds a run that was stopped and was started otherwise"
                f" ({'; '.join(changed)}); start it as before to go on with it, or with"
                f" --resume=never, and it moves to {self.path / EARLIER}"
            )
        return "stopped"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock:
            self.lock.release()

    def start(self) -> str:
        """Make the folder ready; a new run moves the last one away. Returns a line for the user.

        Of several processes the main one does it, once all have seen what stands there.
        Raises: InputError if it cannot be made, or another run has come first.
        """
        wait_for_all()
        moved = self.take() if is_main_process() else ""
        wait_for_all()
        return moved

    def take(self) -> str:
        """Do what `start` says, in the main process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = Lock(self.path, flag="--ckpt_dir")
        except OSError as error:
            told = f"--ckpt_dir={self.path}: cannot be written to ({error.strerror}); name another"
            raise InputError(told) from error
        if self.find_standing() != self.standing:
            raise InputError(f"--ckpt_dir={self.path}: another run was here while this one loaded")
        sweep(self.path)
        if self.standing == "stopped":
            sweep(self.path / RESUME)
            return ""
        moved = move_to_earlier(self.path)
        (resume := hidden(self.path / RESUME)).mkdir()
        self.write_record(resume, finished=False)
        resume.rename(self.path / RESUME)
        return moved

    def read_record(self) -> dict[str, Any]:
        """Read what the folder's run was made from; {} if it holds none. Raises: InputError."""
        file = self.path / RESUME / RUN_FILE
        if not file.is_file() and not any(file.parent.glob(STATES)):
            return {}
        record = read_record(file)
        if record is None:
            raise InputError(
                f"--ckpt_dir={self.path}: holds a run, but {file}, which tells what it was made"
                f" from, is damaged; --resume=never moves that run to {self.path / EARLIER}"
            )
        return record

    def write_record(self, folder: Path, *, finished: bool) -> None:
        """Note what this run was made from, and if it is finished."""
        replace_record(folder / RUN_FILE, {"made_from": self.made_from, "finished": finished})

    def finish(self) -> None:
        """Note that nothing is left to do; the states that a stopped run needs go."""
        if is_main_process():
            self.close()
        wait_for_all()

    def close(self) -> None:
        """Do what `finish` says, in the main process."""
        self.write_record(self.path / RESUME, finished=True)
        for state in (self.path / RESUME).glob(STATES):
            remove(state)
        self.remove_older({os.readlink(self.path / "best")})

    def finished_line(self) -> str:
        """Say that there is nothing to do, and do what a crash at the very end left undone."""
        wait_for_all()  # before something is locked, or goes, that others look at
        if is_main_process() and any((self.path / RESUME).glob(STATES)):
            with Lock(self.path, flag="--ckpt_dir"):
                self.close()
        return (
            f"{self.path}: this very run is finished; best checkpoint: {self.path / 'best'} ->"
            f" {os.readlink(self.path / 'best')}. Another argument, or --resume=never, starts a new"
            " one"
        )

    def save_epoch(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        epoch: int,
        figure: str,
        objective: float,
        facts: dict[str, Any],
    ) -> None:
        """Save the checkpoint of an epoch, and link it as `best` if its objective is the lowest.

        `figure` ends its name, like `loss=0.1234`; `facts` go into `run.json` beside the run's.
        """
        if not math.isfinite(objective):
            raise RunError(
                f"epoch {epoch}: the evaluation gave {figure}; nothing was saved. {DIVERGED}"
            )
        weights = whole_weights(model)  # all processes have to take part
        if not is_main_process():
            return
        name = f"{self.model}_{self.stage}_epoch={epoch}_{figure}"
        run = {**self.facts, "epoch": epoch, **facts}
        save_checkpoint(
            self.path,
            name,
            model=model,
            tokenizer=tokenizer,
            run=run,
            cards=model_cards(run, tokenizer, folder=self.path / name),
            weights=weights,
        )
        if objective < self.lowest:
            self.lowest = objective
            link(self.path / "best", name)
        self.saved[epoch] = name

    def restore_best(self, name: str | None, lowest: float | None) -> None:
        """Go on from the best checkpoint of the epochs that are finished, if it still is there."""
        if name is not None and lowest is not None and (self.path / name).is_dir():
            self.lowest = lowest
            if is_main_process():
                link(self.path / "best", name)

    def remove_older(self, needed: set[str | None]) -> None:
        """Keep the newest `keep` checkpoints (0: all), those that are needed, one of each epoch."""
        pattern = rf"{re.escape(self.model)}_{self.stage}_epoch=(\d+)_\w+=-?[\d.]+"
        found = {p: re.fullmatch(pattern, p.name) for p in self.path.iterdir()}
        epochs = {path: int(match[1]) for path, match in found.items() if match}
        for path, epoch in epochs.items():
            is_twin = self.saved.get(epoch, path.name) != path.name
            is_old = 0 < self.keep <= max(epochs.values()) - epoch
            if (is_twin or is_old) and path.name not in needed:
                remove(path)
