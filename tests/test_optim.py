"""One optimiser step: schedule, clipping, and a stop before anything that is not finite."""

from itertools import pairwise

import pytest
import torch
from torch.nn import Parameter

from rlhf.errors import RunError
from rlhf.optim import build_schedule, optimizer_step, schedule_factor, skip_steps


@pytest.mark.claim(26)
@pytest.mark.parametrize("num_warmup", [0, 1, 3])
def test_schedule_ends_at_zero_after_the_last_step(num_warmup):
    factors = [schedule_factor(s, num_steps=10, num_warmup=num_warmup) for s in range(11)]
    assert factors[-1] == 0.0 and min(factors[:-1]) > 0 and max(factors) == 1.0
    falling = factors[num_warmup:]
    steps = [a - b for a, b in pairwise(falling)]
    assert steps == pytest.approx([1 / (10 - num_warmup)] * len(steps))


def test_steps_that_are_skipped_count_for_the_schedule_and_leave_no_gradient():
    weight = Parameter(torch.tensor([1.0]))
    schedule = build_schedule([weight], learning_rate=0.1, num_steps=4, warmup_ratio=0.0)
    (2 * weight).sum().backward()
    optimizer_step([schedule], weight.sum(), max_gradient_norm=1.0, where="step 1")
    after = weight.item()
    weight.sum().backward()
    skip_steps([schedule], 2)
    assert schedule.get_last_lr() == pytest.approx([0.025])  # 1 of 4 steps is left
    assert weight.grad is None and weight.item() == after
    skip_steps([schedule], 1)
    assert schedule.get_last_lr() == [0.0]


def test_warmup_longer_than_the_run_only_rises():
    factors = [schedule_factor(s, num_steps=2, num_warmup=2) for s in range(2)]
    assert factors == [0.5, 1.0]


@pytest.mark.claim(26)
def test_first_adam_step_has_the_size_of_the_learning_rate_even_for_tiny_gradients():
    weight = Parameter(torch.tensor([1.0, 1.0]))
    schedule = build_schedule([weight], learning_rate=0.1, num_steps=2, warmup_ratio=0.0)
    loss = (weight * torch.tensor([1e-5, -1e-5])).sum()
    loss.backward()
    optimizer_step([schedule], loss, max_gradient_norm=1.0, where="step 1")
    # eps 1e-8 beside a gradient of 1e-5 costs 0.1%; an eps of 1e-5 would halve the step.
    assert weight.tolist() == pytest.approx([0.9, 1.1], abs=2e-4)
    assert schedule.get_last_lr() == [0.05]
    assert weight.grad is None


@pytest.mark.claim(26)
def test_zero_gradient_leaves_a_weight_alone():
    weight = Parameter(torch.tensor([5.0]))
    schedule = build_schedule([weight], learning_rate=0.1, num_steps=2, warmup_ratio=0.0)
    loss = (weight * 0).sum()
    loss.backward()
    optimizer_step([schedule], loss, max_gradient_norm=1.0, where="step 1")
    assert weight.tolist() == [5.0]  # no weight decay


@pytest.mark.claim(17, 26)
def test_each_optimiser_clips_by_its_own_norm():
    small, large = Parameter(torch.tensor([1.0])), Parameter(torch.tensor([1.0]))
    schedules = [
        build_schedule([p], learning_rate=0.1, num_steps=2, warmup_ratio=0.0)
        for p in (small, large)
    ]
    seen = []
    for schedule, p in zip(schedules, (small, large), strict=True):
        schedule.optimizer.register_step_pre_hook(lambda *_, p=p: seen.append(p.grad.item()))
    loss = 0.5 * small.sum() + 1000 * large.sum()
    loss.backward()
    norm = optimizer_step(schedules, loss, max_gradient_norm=1.0, where="step 1")
    assert float(norm) == 0.5
    assert seen == pytest.approx([0.5, 1.0], abs=1e-5)


@pytest.mark.claim(25)
@pytest.mark.parametrize("planted", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_step_stops_before_any_weight_moves(planted, value):
    good, bad = Parameter(torch.tensor([1.0])), Parameter(torch.tensor([1.0]))
    schedules = [
        build_schedule([p], learning_rate=0.1, num_steps=2, warmup_ratio=0.0) for p in (good, bad)
    ]
    loss = good.sum() + bad.sum()
    loss.backward()
    if planted == "loss":
        loss = loss * value
    else:
        bad.grad.fill_(value)
    with pytest.raises(RunError, match=r"step 7, rows \[3\]"):
        optimizer_step(schedules, loss, max_gradient_norm=1.0, where="step 7, rows [3]")
    assert good.item() == bad.item() == 1.0
