"""The optimiser, its schedule, and one step of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf.errors import DIVERGED, RunError
from rlhf.processes import sum_gradients
from rlhf.sharding import part_like, whole


def schedule_factor(step: int, *, num_steps: int, num_warmup: int) -> float:
    """The learning rate's share of its peak at a step: up in a line, then down to 0 at the end.

    >>> [schedule_factor(step, num_steps=5, num_warmup=2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.6666666666666666, 0.3333333333333333, 0.0]
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return (num_steps - step) / max(1, num_steps - num_warmup)


def build_schedule(
    parameters: Iterable[Parameter], *, learning_rate: float, num_steps: int, warmup_ratio: float
) -> LambdaLR:
    """Build AdamW (its `.optimizer`) for what is not frozen, and the learning rate's schedule.

    No weight decay. eps stays at 1e-8: gradients clipped to norm 1 over 124M weights are near 1e-4
    each, and a larger eps would damp them.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimizer = AdamW(trained, lr=learning_rate, weight_decay=0.0, eps=1e-8, fused=True)
    num_warmup = math.ceil(warmup_ratio * num_steps)
    return LambdaLR(
        optimizer,
        lambda step: schedule_factor(step, num_steps=num_steps, num_warmup=num_warmup),
    )


def optimizer_step(
    schedules: Sequence[LambdaLR], loss: Tensor, *, max_gradient_norm: float, where: str
) -> Tensor:
    """Clip each optimiser's gradients by their own norm, step them all, move their schedules on.

    The gradients of all processes are added up first; `loss` is that of all of them already.
    Returns the norm of the first before clipping. Raises: RunError if the loss or a norm is not
    finite; then no weight has been touched.
    """
    loss, norms = loss.detach(), []
    for schedule in schedules:
        parameters = [p for group in schedule.optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        norms.append(whole(torch.nn.utils.clip_grad_norm_(parameters, max_gradient_norm)))
    if not torch.isfinite(torch.stack([loss, *norms])).all():
        raise RunError(
            f"{where}: the loss is {float(loss):.4g} and the gradient norm {float(norms[0]):.4g};"
            f" stopped before the update. {DIVERGED}"
        )
    for schedule in schedules:
        schedule.optimizer.step()
        schedule.step()
        schedule.optimizer.zero_grad(set_to_none=True)
    return norms[0]


def skip_steps(schedules: Sequence[LambdaLR], num_steps: int) -> None:
    """Give up so many steps: drop their gradients, and move the schedules on as if they were taken.

    So the learning rate still ends at 0.
    """
    for schedule in schedules:
        schedule.optimizer.zero_grad(set_to_none=True)
        for _ in range(num_steps):
            schedule.step()


def restore_schedule(
    schedule: LambdaLR, state: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Give a schedule its state back, and its optimiser the moments that stand under a prefix."""
    optimizer = schedule.optimizer
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            weight = weights[int(index)]
            moments.setdefault(int(index), {})[key] = (
                part_like(tensor, weight) if tensor.shape == weight.shape else tensor
            )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    schedule.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
