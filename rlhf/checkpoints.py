"""Checkpoint folders: written whole or not at all, described by `run.json`, the best one linked."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import InputError, RunError

RUN_FILE = "run.json"
EARLIER = "earlier"
RESUME = ".resume"


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON can't hold (nan, infinities) by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def git_commit() -> str | None:
    """Name the commit of the code that runs; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() or None


def read_run(path: str, *, flag: str) -> dict[str, Any]:
    """Read a checkpoint's `run.json`; {} where there is none, as beside a model from the Hub.

    Raises: InputError if it isn't a JSON object.
    """
    file = Path(path) / RUN_FILE
    if not file.is_file():
        return {}
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{flag}={path}: {file} is not valid JSON ({error})") from error
    if not isinstance(run, dict):
        raise InputError(f"{flag}={path}: {file} must hold a JSON object")
    return run


def model_name(path: str, *, flag: str) -> str:
    """Name the base model: as `run.json` tells, else the last part of the path or Hub id."""
    name = read_run(path, flag=flag).get("model")
    return name if isinstance(name, str) else os.path.basename(os.path.abspath(path))


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Give a finished folder or file its name, so that under this name it is always whole."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in [temporary, *sorted(temporary.rglob("*"))]:
        if entry.is_file():
            entry.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
        sync_to_disk(entry)
    os.replace(temporary, final)
    sync_to_disk(final.parent)


def save_checkpoint(
    folder: Path,
    name: str,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: dict[str, Any],
) -> Path:
    """Write a checkpoint of safetensors, tokenizer and `run.json` under `folder / name`."""
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    text = json.dumps(without_nan(run), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RUN_FILE).write_text(text + "\n", encoding="utf-8")
        commit(temporary, folder / name)
    except (OSError, SafetensorError) as error:  # a full disk may end in either
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{folder / name}: cannot be written ({error}); free some space") from error
    return folder / name


def is_of_a_run(entry: Path) -> bool:
    """Tell whether a run wrote this: a checkpoint, a log, a tracker's folder, a hidden leftover."""
    known = {"best", "metrics.jsonl", "training.png", "rlhf", RESUME, EARLIER}
    is_leftover = entry.name.startswith(".") and ".tmp" in entry.name
    return entry.name in known or is_leftover or (entry / RUN_FILE).is_file()


def check_run_folder(folder: Path, inputs: Mapping[str, str]) -> None:
    """Check, without writing, that a run may start in `folder`, and moving what is there is safe.

    `inputs` maps flags to the paths that the run reads. Raises: InputError.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--ckpt_dir={folder}: is a file; name a folder")
    for entry in sorted(folder.iterdir()) if folder.exists() else []:
        if not is_of_a_run(entry):
            raise InputError(
                f"--ckpt_dir={folder}: holds {entry.name}, which no run wrote; name a new folder"
            )
    for flag, path in inputs.items():
        real = Path(path).resolve()
        inside = real.is_relative_to(folder.resolve())
        if inside and real.exists() and not real.is_relative_to(folder.resolve() / EARLIER):
            raise InputError(
                f"{flag}={path} lies in --ckpt_dir={folder}, whose earlier run is about to move"
                f" away; name another --ckpt_dir"
            )


def start_run_folder(folder: Path) -> str:
    """Make a stage's folder; move the run that it holds, if any, whole into `earlier/<n>/`.

    Returns a line that says so, or "". Nothing is ever overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = error.strerror
        raise InputError(f"--ckpt_dir={folder}: cannot be made ({cause}); name another") from error
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it saved
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    entries = [entry for entry in folder.iterdir() if entry.name != EARLIER]
    if not entries:
        return ""
    numbers = [int(n.name) for n in (folder / EARLIER).glob("*") if n.name.isdigit()]
    destination = folder / EARLIER / str(max(numbers, default=0) + 1)
    destination.mkdir(parents=True)
    for entry in entries:
        entry.rename(destination / entry.name)
    return f"the earlier run in {folder} is now in {destination}"


def named_checkpoint(path: str) -> str:
    """Follow `best` to the checkpoint that it names now; a Hub id stays as it is."""
    if not Path(path).exists():
        return path
    real, here = Path(path).resolve(), Path.cwd().resolve()
    return str(real.relative_to(here) if real.is_relative_to(here) else real)


class RunFolder:
    """The folder of one run of a stage: its checkpoints, and `best`, a link to one of them.

    Nothing is written before `start`. `inputs` maps flags to the paths that the run reads, its
    parent checkpoint first. Raises: InputError if the folder cannot take a run, or if `resume` is
    "must": a stage that was stopped leaves finished epochs behind, and no state to continue from.
    """

    def __init__(
        self,
        path: str,
        *,
        stage: str,
        inputs: dict[str, str],
        arguments: dict[str, Any],
        data: dict[str, str],
        resume: str,
    ) -> None:
        if resume == "must":
            raise InputError(f"--resume=must: {path} holds no state to continue from")
        self.path = Path(path)
        check_run_folder(self.path, inputs)
        flag, parent = next(iter(inputs.items()))
        self.stage, self.model = stage, model_name(parent, flag=flag)
        self.lowest = math.inf
        self.facts = {
            "stage": stage,
            "model": self.model,
            "arguments": arguments,
            "parent": named_checkpoint(parent),
            "data": data,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "numpy")},
            },
            "git_commit": git_commit(),
        }

    def start(self) -> str:
        """Make the folder, empty but for earlier runs; returns where the last one went, or ""."""
        return start_run_folder(self.path)

    def save_epoch(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        epoch: int,
        figure: str,
        objective: float,
        facts: dict[str, Any],
    ) -> Path:
        """Save the checkpoint of an epoch, and link it as `best` if its objective is the lowest.

        `figure` ends its name, like `loss=0.1234`; `facts` go into `run.json` beside the run's.
        """
        if not math.isfinite(objective):
            raise RunError(
                f"epoch {epoch}: the evaluation gave {figure}; nothing was saved. A lower"
                " --learning_rate or --dtype=float32 may help"
            )
        name = f"{self.model}_{self.stage}_epoch={epoch}_{figure}"
        run = {**self.facts, "epoch": epoch, **facts}
        path = save_checkpoint(self.path, name, model=model, tokenizer=tokenizer, run=run)
        if objective < self.lowest:
            self.lowest = objective
            link_best(self.path, name)
        return path


def link_best(folder: Path, name: str) -> None:
    """Point the relative symlink `best` at a checkpoint; at every moment it points at one."""
    temporary = folder / ".best.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, folder / "best")


def save_tensors(path: Path, tensors: dict[str, Tensor], *, fingerprint: str) -> None:
    """Write tensors to one safetensors file, with a fingerprint of what they were made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"fingerprint": fingerprint})
    except SafetensorError as error:
        raise RunError(f"{path}: cannot be written ({error})") from error
    commit(temporary, path)


def load_tensors(path: Path, *, fingerprint: str, device: torch.device) -> dict[str, Tensor] | None:
    """Read tensors back if they are there and were made from the same things."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return {name: torch.clone(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:  # damaged: they are made again
        return None


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over all weights of a model, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
