"""Device, precision, seeds and trackers: the one place that knows accelerate."""

import atexit
import ctypes
import gc
import os
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import accelerate
import huggingface_hub
import torch
import transformers
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from rlhf.arguments import TRACKERS
from rlhf.errors import InputError
from rlhf.processes import num_processes

SECONDS_OF_SILENCE = 20.0  # before it is said that processes are waited for
PATIENCE = timedelta(hours=1)  # with which processes wait for one that tokenises or writes
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")  # modes of W&B


class Runtime(NamedTuple):
    """Where and in which precision a stage runs."""

    device: torch.device
    precision: str  # "float32" or "bfloat16"
    notice: str  # what the user should know about the device; often empty
    zero_stage: int = 0  # cut up between processes: 0 nothing, 2 gradients and moments, 3 weights

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

    Raises: InputError if CUDA is there but not this GPU, if processes were started in a way that
    cannot work, or if the tracker cannot be used here.
    """
    _, left_out = usable_trackers(report_to)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    device, notice = choose_device(gpu_id), ""
    zero_stage = launched_zero_stage()
    if device.type == "cpu":
        notice = "no CUDA device: running on the CPU"
        keep_freed_memory()
    if num_processes() > 1:
        notice = f"{num_processes()} processes; {notice or 'each has a GPU of its own'}"
        notice += f"; FSDP2 cuts the model up as ZeRO-{zero_stage} does" if zero_stage else ""
    elif is_set("ACCELERATE_USE_CPU"):
        notice += "\nnote: accelerate launch starts one process on a CPU; take torchrun for several"
    elif is_set("ACCELERATE_USE_FSDP"):
        notice = f"{notice}\nnote: one process was started: FSDP has nothing to cut up".strip()
    notice = f"{notice}\n{left_out}".strip()
    precision = dtype
    if dtype == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in {"no", {"bfloat16": "bf16"}.get(precision)}:
        notice += f"\nnote: accelerate's mixed_precision={told} does not count: --dtype does"
    # What autocast leaves in float32, above all the vocabulary's logits, keeps float32 storage and
    # sums. In a bfloat16 run its products may take short cuts, on CUDA that of TF32.
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "medium")
    accelerate.utils.set_seed(seed)
    return Runtime(device, precision, notice, zero_stage)


def choose_device(gpu_id: int) -> torch.device:
    """Choose this process's device, and meet the others if a launcher has started several.

    Raises: InputError.
    """
    if launched_processes() == 1:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if gpu_id >= torch.cuda.device_count():
            known = ", ".join(
                f"{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
            )
            raise InputError(f"--gpu_id={gpu_id}: there is no such GPU; there are {known}")
        device = torch.device("cuda", gpu_id)
        torch.cuda.set_device(device)
        return device
    if gpu_id:
        raise InputError(
            f"--gpu_id={gpu_id}: {launched_processes()} processes were started, and each takes the"
            " GPU of its own number; leave --gpu_id out (CUDA_VISIBLE_DEVICES tells which GPUs)"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node={local}: this machine has {torch.cuda.device_count()} GPUs; start"
            " one process for each"
        )
    meeting = threading.Timer(SECONDS_OF_SILENCE, say_who_is_waited_for)
    meeting.daemon = True
    meeting.start()
    state = accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    meeting.cancel()
    # Last called first: what has used the processes goes before the threads that connect them.
    atexit.register(state.destroy_process_group)
    atexit.register(gc.collect)
    if state.num_processes != launched_processes():
        raise InputError(
            f"WORLD_SIZE={launched_processes()}: {state.num_processes} processes have met; start"
            " them with torchrun or accelerate launch"
        )
    return state.device


def say_who_is_waited_for() -> None:
    """Tell on stderr that not all processes have come."""
    address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    missing = f"waiting for all of {launched_processes()} processes to meet at {address}"
    sys.stderr.write(f"process {os.environ['RANK']}: {missing}\n")


def launched_processes() -> int:
    """Count the processes that a launcher says it has started. Raises: InputError."""
    told = os.environ.get("WORLD_SIZE") or "1"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not told.isdigit() or (told != "1" and missing):
        lacking = f", but not {', '.join(missing)}" if missing else ""
        raise InputError(
            f"WORLD_SIZE={told} is set{lacking}: unset it, or start with torchrun or accelerate"
            " launch, which set them all"
        )
    return int(told)


def launched_zero_stage() -> int:
    """Tell how accelerate's launcher has been asked to cut models up: see `Runtime.zero_stage`.

    Raises: InputError if it was asked for what no stage does.
    """
    asked = {name for name in ("FSDP", "DEEPSPEED") if is_set(f"ACCELERATE_USE_{name}")}
    if "DEEPSPEED" in asked or (asked and os.environ.get("FSDP_VERSION", "1") != "2"):
        raise InputError(
            "accelerate launch was configured for DeepSpeed, or for the first version of FSDP;"
            " configs/zero2.yaml and configs/fsdp2.yaml do the same by FSDP2"
        )
    if asked and (is_set("FSDP_OFFLOAD_PARAMS") or is_set("FSDP_ACTIVATION_CHECKPOINTING")):
        raise InputError(
            "accelerate launch was told to offload weights or to checkpoint activations: leave both"
            " out of its configuration; --gradient_checkpointing does the second"
        )
    if num_processes() == 1 or not asked:
        return 0
    # Else transformers would load nothing in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return 3 if is_set("FSDP_RESHARD_AFTER_FORWARD") else 2


def require_whole_models(runtime: Runtime, **asked: bool) -> None:
    """Stop if models are cut up between processes and a flag asks for what needs whole ones.

    Raises: InputError.
    """
    for name, is_asked in asked.items():
        if runtime.zero_stage and is_asked:
            raise InputError(
                f"--{name}: needs a whole model in every process, and accelerate launch was told to"
                " cut it up; start it by configs/multi_gpu.yaml"
            )


def is_set(name: str) -> bool:
    """Whether an environment variable says true."""
    return os.environ.get(name, "").lower() in {"1", "true", "yes"}


def require_equal_shares(**sizes: int) -> None:
    """Stop unless all processes get the same share of each batch; a size of 0 is no size.

    Raises: InputError, naming the flag.
    """
    for name, size in sizes.items():
        if size % num_processes():
            raise InputError(
                f"--{name}={size}: {num_processes()} processes share it equally; make it a multiple"
                " of their number"
            )


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, since the next step asks for the same.

    By default it returns each to the system, which has to clear it when it is asked for again.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def installed_trackers() -> list[str]:
    """Name the experiment trackers that `--report_to` knows and that are installed."""
    return sorted({str(tracker) for tracker in get_available_trackers()} & set(TRACKERS))


def lack_of(tracker: str) -> tuple[str, str]:
    """Tell what a tracker lacks before it can start, and the remedy; ("", "") if nothing."""
    if tracker not in installed_trackers():
        return "not installed", f"pip install {tracker}"
    try:
        library = import_module(tracker)
    except Exception:  # most often, what it builds on has another version
        return "cannot be imported", f"python -c 'import {tracker}' tells why"
    if tracker == "wandb" and library.setup().settings.mode not in WITHOUT_LOGIN:
        can_tell = "prompt" in signature(library.login).parameters  # older versions cannot
        if can_tell and not library.login(prompt=False, verify=False):
            return "not logged in", "wandb login, or WANDB_MODE=offline"
    return "", ""


def usable_trackers(report_to: str) -> tuple[list[str], str]:
    """Name the trackers that `--report_to` means here; of `all`, a line tells which are left out.

    Raises: InputError if the one that was named lacks something.
    """
    if report_to == "none":
        return [], ""
    if report_to != "all":
        lack, remedy = lack_of(report_to)
        if lack:
            raise InputError(f"--report_to={report_to}: {lack}; {remedy}")
        return [report_to], ""
    lacks: dict[str, list[str]] = {}
    for tracker in TRACKERS[1:-1]:
        lacks.setdefault(lack_of(tracker)[0], []).append(tracker)
    usable = lacks.pop("", [])
    left_out = "".join(f"; {lack}: {', '.join(names)}" for lack, names in lacks.items())
    return usable, f"report_to=all: {', '.join(usable) or 'none'}{left_out}"


def build_tracker(tracker: str, project: str, /, **options: Any) -> Any:
    """Build one of accelerate's trackers; `start` opens it."""
    accelerate.PartialState(cpu=not torch.cuda.is_available())  # its trackers ask for that
    return LOGGER_TYPE_TO_CLASS[tracker](project, **options)
