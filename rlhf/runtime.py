"""Device, precision, seeds and trackers: the one place that knows accelerate."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import huggingface_hub
import torch
import transformers
from accelerate.tracking import get_available_trackers

from rlhf.arguments import TRACKERS
from rlhf.errors import InputError


class Runtime(NamedTuple):
    """Where and in which precision a stage runs."""

    device: torch.device
    precision: str  # "float32" or "bfloat16"
    notice: str  # what the user should know about the device; often empty

    def autocast(self) -> AbstractContextManager:
        """A context in which matrix products run in the chosen precision."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def tolerance(self) -> float:
        """How far two computations of the same logprob may lie apart."""
        return 1e-4 if self.precision == "float32" else 1e-2


def start_runtime(gpu_id: int, *, dtype: str, seed: int, report_to: str) -> Runtime:
    """Choose the device, set precision and seeds, and make the libraries quiet.

    Raises: InputError if CUDA is there but not this GPU, if several processes were started, or if
    the tracker isn't installed.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size not in {"", "1"}:
        raise InputError(f"WORLD_SIZE={world_size}: a stage runs in one process; start it with sh")
    trackers = installed_trackers()
    if report_to not in {"none", "all", *trackers}:
        raise InputError(f"--report_to={report_to}: not installed; pip install {report_to}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    notice = ""
    if torch.cuda.is_available():
        if gpu_id >= torch.cuda.device_count():
            known = ", ".join(
                f"{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
            )
            raise InputError(f"--gpu_id={gpu_id}: there is no such GPU; there are {known}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        notice = "no CUDA device: running on the CPU"
        keep_freed_memory()
    precision = dtype
    if dtype == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    # What autocast leaves in float32, above all the vocabulary's logits, keeps float32 storage and
    # sums. In a bfloat16 run its products may take short cuts, on CUDA that of TF32.
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "medium")
    accelerate.utils.set_seed(seed)
    return Runtime(device, precision, notice)


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, since the next step asks for the same.

    By default it returns each to the system, which has to clear it when it is asked for again.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def installed_trackers() -> list[str]:
    """Name the experiment trackers that `--report_to` knows and that can be used here."""
    return sorted({str(tracker) for tracker in get_available_trackers()} & set(TRACKERS))


def start_trackers(
    report_to: str, *, folder: Path, arguments: dict[str, Any]
) -> Callable[[dict[str, float], int], None]:
    """Open the experiment trackers that `--report_to` names; returns what logs to them."""
    if report_to == "none":
        return lambda values, step: None
    names = installed_trackers() if report_to == "all" else [report_to]
    accelerator = accelerate.Accelerator(cpu=True, log_with=names, project_dir=folder)
    accelerator.init_trackers(
        "rlhf", {name: value for name, value in arguments.items() if value is not None}
    )
    return lambda values, step: accelerator.log(values, step=step)
