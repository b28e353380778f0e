"""PROCESSES: several of them at one run, each with its share of every batch.

All hold the same weights and take the same decisions; what is a sum over a batch is the sum of
their parts. Where there is one process, nothing here does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

Row = TypeVar("Row")


def num_processes() -> int:
    """Count the processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """Number this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if num_processes() > 1:
        distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process do something before the others, which find what it has left on disk."""
    if not is_main_process():
        wait_for_all()
    yield
    if is_main_process():
        wait_for_all()


def share_of(rows: Sequence[Row]) -> Sequence[Row]:
    """Take this process's part of some rows: each gets every so-many-th, so of all lengths.

    >>> share_of([3, 1, 2])
    [3, 1, 2]
    """
    return rows[process_index() :: num_processes()]


def sum_over_processes(x: Tensor) -> Tensor:
    """Add up a tensor that every process has, of the same shape in all."""
    if num_processes() == 1:
        return x
    carrier = torch.uint8 if x.dtype == torch.bool else x.dtype
    total = x.detach().contiguous().to(carrier, copy=True)
    distributed.all_reduce(total)
    return total.to(x.dtype)


def most_of_processes(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Give the largest that any process has of each of some numbers; True is 1."""
    if num_processes() == 1:
        return list(numbers)
    most = torch.tensor([int(number) for number in numbers], device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return most.tolist()


def join_rows(part: Tensor, size: int) -> Tensor:  # (n, ...) -> (size, ...)
    """Put together rows of which each process has computed its share, as `share_of` deals them.

    What a process has beyond its share, having got none, is left out.
    """
    if num_processes() == 1:
        return part
    own = share_of(range(size))
    whole = part.new_zeros(size, *part.shape[1:])
    whole[list(own)] = part[: len(own)]
    return sum_over_processes(whole)


def sum_gradients(parameters: Iterable[Parameter]) -> None:
    """Add up the gradients of all processes. A process without rows has none: they count as 0.

    Those of a sharded model are averages already, of which every process holds a part.
    """
    if num_processes() == 1:
        return
    pending = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter.grad, DTensor):
            parameter.grad.mul_(num_processes())
            continue
        pending.append(distributed.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the main process."""
    if num_processes() > 1:
        for tensor in (x for x in tensors if not isinstance(x, DTensor)):
            distributed.broadcast(tensor.detach(), src=0)
