"""MEMORY: what does not fit into it is done again in smaller parts."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlhf.batches import Room
from rlhf.errors import RunError, is_out_of_memory
from rlhf.metrics import say

Result = TypeVar("Result")


def fit(
    attempt: Callable[[Room], Result],
    room: Room,
    device: torch.device,
    schedules: Sequence[LambdaLR] = (),
) -> tuple[Result, Room]:
    """Do what may run out of memory; if it does, do it again with half the room for a forward.

    Gradients that it has accumulated are dropped first. Returns the room that was enough.
    Raises: RunError if one sequence is too much.
    """
    while True:
        before = random_state(device)
        try:
            return attempt(room), room
        except (RuntimeError, MemoryError) as error:
            smaller = room.halved()
            if not is_out_of_memory(error):
                raise
            if smaller is None:
                raise RunError(
                    "out of memory with one sequence in a forward; lower --max_len or"
                    " --batch_size, or add --gradient_checkpointing"
                ) from error
        # Only now are the failed attempt's tensors free: the error held them.
        room = smaller
        for schedule in schedules:
            schedule.optimizer.zero_grad(set_to_none=True)
        set_random_state(before, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"note: out of memory; going on with {room} in a forward, the batch stays as it is")


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Give the states of torch's generators, which dropout draws from: CPU's and CUDA's."""
    on_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_cuda


def set_random_state(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Set torch's generators back to these states."""
    on_cpu, on_cuda = states
    torch.set_rng_state(on_cpu)
    if on_cuda is not None:
        torch.cuda.set_rng_state(on_cuda, device)
