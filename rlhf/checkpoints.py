"""Checkpoints: folders that other tools load, described by `run.json`, checked before use."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.disk import CHECKSUMS, commit, flaw_of, hidden, sha256_of, write_json
from rlhf.errors import DIVERGED, InputError, RunError
from rlhf.lora import ADAPTER_FOLDER, merged_weights, save_adapter
from rlhf.processes import is_main_process

RUN_FILE = "run.json"
TENSORS, FACTS = "tensors.safetensors", "facts.json"  # of a folder that `save_tensors` wrote


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


def base_model(path: str, *, flag: str) -> str | None:
    """Name the model on the Hub that all began with; None if it came from elsewhere."""
    run = read_run(path, flag=flag)
    return run.get("base_model") if run or Path(path).exists() else path


def require_undamaged(path: str, *, flag: str) -> None:
    """Check that every file of a checkpoint is as it was written.

    A folder from elsewhere has no checksums and is taken as it is.
    Raises: InputError, naming the first file that is not.
    """
    folder = Path(path)
    if (folder / CHECKSUMS).exists() or (folder / RUN_FILE).exists():
        flaw = flaw_of(folder)
        if flaw:
            renew = (
                f"(cd {shlex.quote(path)} && find * -type f ! -name {CHECKSUMS} -exec sha256sum"
                f' {{}} + > {CHECKSUMS} && echo "# $(wc -l < {CHECKSUMS}) files" >> {CHECKSUMS})'
            )
            raise InputError(
                f"{flag}={path}: is damaged: {flaw}; name another checkpoint, or, if you changed it"
                f" yourself, run {renew}"
            )


def content_of(path: str) -> str:
    """Name the content of what a run reads: a checkpoint, a split's folder, a file, or a Hub id."""
    if (checksums := Path(path) / CHECKSUMS).is_file():
        return sha256_of(checksums)
    if Path(path).is_file():
        return sha256_of(Path(path))
    digest = hashlib.sha256(b"" if Path(path).exists() else path.encode())
    for file in sorted(Path(path).glob("[!.]*")):
        if file.is_file():
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def require_finite(tensors: dict[str, Tensor], *, what: str) -> None:
    """Stop before a weight that is not a number reaches the disk.

    Raises: RunError, naming the first.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunError(f"{what}: {name} is not finite; nothing was saved. {DIVERGED}")


def save_checkpoint(
    folder: Path,
    name: str,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: dict[str, Any],
    cards: Mapping[str, str] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint of safetensors, tokenizer and `run.json` under `folder / name`.

    A model with an adapter is written merged, and the adapter in a folder within. `cards` are texts
    by their places in it; `weights` stand in for those of a model that does not hold its own.
    Raises: RunError if a weight is not finite, or the disk is full.
    """
    require_finite(weights or dict(model.named_parameters()), what=name)
    temporary = hidden(folder / name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        weights = weights or merged_weights(model)
        model.save_pretrained(temporary, state_dict=weights)
        save_adapter(model, temporary / ADAPTER_FOLDER, parent=run.get("parent", ""))
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RUN_FILE, run)
        for place, text in (cards or {}).items():
            (temporary / place).write_bytes(text.encode("utf-8", "backslashreplace"))
        commit(temporary, folder / name)
    except (OSError, SafetensorError) as error:  # a full disk may end in either
        shutil.rmtree(temporary, ignore_errors=True)
        raise full_disk(folder / name, error) from error
    return folder / name


def full_disk(path: Path, error: Exception) -> RunError:
    """Return what ends a run that cannot write."""
    is_full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space and start the same command again" if is_full else "name another place"
    return RunError(f"{path}: cannot be written ({error}); {remedy}")


def named_checkpoint(path: str) -> str:
    """Follow `best` to the checkpoint that it names now; a Hub id stays as it is."""
    if not Path(path).exists():
        return path
    real, here = Path(path).resolve(), Path.cwd().resolve()
    return str(real.relative_to(here) if real.is_relative_to(here) else real)


def save_tensors(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and what is to be known of them as a folder, whole or not at all.

    Of several processes the main one writes its own.
    Raises: RunError if a tensor is not finite, or the disk is full.
    """
    if not is_main_process():
        return
    require_finite(tensors, what=str(folder))
    temporary = hidden(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary / TENSORS)
        write_json(temporary / FACTS, facts)
        commit(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise full_disk(folder, error) from error


def load_tensors(
    folder: Path, *, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read back what `save_tensors` wrote; None if it is not there, or not as it was written."""
    if flaw_of(folder) is not None:
        return None
    return load_file(folder / TENSORS, device=str(device)), load_facts(folder)


def load_facts(folder: Path) -> dict[str, Any]:
    """Read what is to be known of the tensors that `save_tensors` wrote."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over all weights of a model, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
