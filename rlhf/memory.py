"""MEMORY: what does not fit into it is done again in smaller parts."""

from collections.abc import Callable, Mapping, Sequence
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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Give the state of torch's generators, which dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators back to a state."""
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["random.cuda"], device)
