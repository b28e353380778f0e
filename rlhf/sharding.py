"""SHARDING: weights, gradients and moments that are cut up between processes.

Without it every process holds all of them. With it each holds a part, by PyTorch's FSDP2, and the
weights of a layer are put together while it computes. That asks two things of a stage: whatever
runs the model does so by `run_whole`, and all processes do so equally often, by `in_step`.

Source: ZeRO, 1910.02054.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import InputError
from rlhf.heads import gives_logits
from rlhf.processes import is_main_process, most_of_processes, num_processes, take_from_main

Row = TypeVar("Row")


def shard(model: PreTrainedModel, *, zero_stage: int) -> None:
    """Cut a model up between the processes, in place; stage 0 leaves it whole.

    Stage 2 keeps the weights of a layer from its forward to its backward pass; stage 3 frees them
    in between and gathers them again. Raises: InputError if a model cannot be cut up.
    """
    if not zero_stage:
        return
    if gives_logits(model):
        raise InputError(
            f"{type(model).__name__} cannot be cut up between processes, since it gives its logits"
            " itself; start by configs/multi_gpu.yaml"
        )
    take_from_main(model.state_dict().values())
    mesh = init_device_mesh(model.device.type, (num_processes(),))
    for layer in list(model.modules()):
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, mesh=mesh, reshard_after_forward=zero_stage == 3)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    # A copy, since hooks on a view of something else would be lost.
    model.run = MethodType(lambda _, work: work().clone(), model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut this model up."""
    return isinstance(model, FSDPModule)


def run_whole(model: PreTrainedModel, work: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Do what needs a model's weights, its first argument, while they are there."""
    if not is_sharded(model):
        return work(model, *inputs)
    run: Any = model.run
    return run(partial(work, model, *inputs))


def in_step(
    model: nn.Module, rows: Sequence[Row], parts: Sequence[slice], *, spare: Row
) -> Iterator[tuple[Sequence[Row], int]]:
    """Yield the parts of some rows, with weight 1; of a sharded model, as many as any process has.

    What fills up is a spare row, with weight 0.

    >>> list(in_step(nn.Linear(1, 1), "abc", [slice(0, 2), slice(2, 3)], spare="a"))
    [('ab', 1), ('c', 1)]
    """
    most = len(parts)
    if is_sharded(model):  # asked before any forward, in which processes wait for each other too
        [most] = most_of_processes([most], next(model.parameters()).device)
    yield from ((rows[part], 1) for part in parts)
    yield from (([spare], 0) for _ in range(most - len(parts)))


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together, if it is cut up; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors together one by one; those that were cut up, in the main one's ordinary memory.

    All processes have to take part. The others keep nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if is_main_process():
            found[name] = together if together is tensor else together.cpu()
    return found


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Gather all weights of a sharded model; None if it is whole in every process."""
    if not is_sharded(model):
        return None
    twice = dict(model.named_parameters(remove_duplicate=False)).keys()
    buffers = {name: x for name, x in model.state_dict().items() if name not in twice}
    return gathered({**dict(model.named_parameters()), **buffers})


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor up as another is; every process has all of it."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    options: Any = {"src_data_rank": None}  # no need to send what all have
    return distribute_tensor(tensor, like.device_mesh, like.placements, **options)
