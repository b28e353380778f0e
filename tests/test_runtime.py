"""Device, precision, seeds, trackers: what a stage runs on, and what it refuses to run on."""

import random
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import InputError
from rlhf.runtime import (
    Runtime,
    installed_trackers,
    launched_zero_stage,
    require_whole_models,
    start_runtime,
    usable_trackers,
)


@pytest.fixture(autouse=True)
def one_process(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def without_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch) -> list[torch.device]:
    """Two GPUs that aren't there; returns what is made the current device."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    return chosen


def start(**changes: Any) -> Runtime:
    options = {"gpu_id": 0, "dtype": "auto", "seed": 42, "report_to": "none"} | changes
    return start_runtime(options.pop("gpu_id"), **options)


def test_without_cuda_the_cpu_is_taken_and_said(without_cuda):
    runtime = start(gpu_id=3)  # no GPU: its number doesn't matter
    assert runtime.device == torch.device("cpu")
    assert runtime.notice == "no CUDA device: running on the CPU"


def test_the_gpu_that_was_named_is_taken_without_a_word(two_gpus):
    runtime = start(gpu_id=1)
    assert runtime.device == torch.device("cuda", 1) and runtime.notice == ""
    assert two_gpus == [torch.device("cuda", 1)]


def test_a_gpu_that_does_not_exist_is_refused_with_those_that_do(two_gpus):
    with pytest.raises(InputError) as caught:
        start(gpu_id=2)
    assert str(caught.value) == (
        "--gpu_id=2: there is no such GPU; there are 0 (GPU number 0), 1 (GPU number 1)"
    )
    assert two_gpus == []


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_auto_is_bfloat16_on_cuda_and_float32_on_the_cpu(dtype, monkeypatch, request):
    request.getfixturevalue("without_cuda")
    assert start(dtype=dtype).precision == ("float32" if dtype == "auto" else dtype)
    request.getfixturevalue("two_gpus")
    assert start(dtype=dtype).precision == ("bfloat16" if dtype == "auto" else dtype)


def test_float32_products_are_exact_and_bfloat16_ones_leave_weights_alone(without_cuda):
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    float32, bfloat16 = torch.float32, torch.bfloat16
    # What autocast leaves alone, such as the logits: no short cuts in a float32 run.
    for dtype, type_of_product, rest in (
        ("float32", float32, "highest"),
        ("bfloat16", bfloat16, "medium"),
    ):
        runtime = start(dtype=dtype)
        with runtime.autocast():
            product = layer(x)
        assert (product.dtype, layer.weight.dtype) == (type_of_product, torch.float32)
        assert torch.get_float32_matmul_precision() == rest


def test_bfloat16_is_compared_more_loosely_than_float32():
    cpu = torch.device("cpu")
    assert Runtime(cpu, "float32", "").tolerance == 1e-4
    assert Runtime(cpu, "bfloat16", "").tolerance == 1e-2


def test_a_seed_repeats_every_random_number(without_cuda):
    draws = []
    for seed in (7, 7, 8):
        start(seed=seed)
        draws.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize("one", ["1", ""])  # torchrun with one process; one without a value
def test_one_process_needs_nobody_to_meet(monkeypatch, one):
    monkeypatch.setenv("WORLD_SIZE", one)
    assert "processes" not in start().notice
    assert not torch.distributed.is_initialized()


@pytest.fixture
def four_processes(monkeypatch) -> None:
    """A launcher that has started four processes on this machine."""
    launched = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "here"}
    for name, value in {**launched, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_each_of_several_processes_takes_the_gpu_of_its_own_number(two_gpus, four_processes):
    with pytest.raises(InputError, match="--gpu_id=1: 4 processes were started"):
        start(gpu_id=1)
    with pytest.raises(InputError, match="--nproc_per_node=4: this machine has 2 GPUs"):
        start()


def test_deepspeed_and_the_first_fsdp_are_refused_with_what_does_the_same(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"configs/zero2\.yaml and configs/fsdp2\.yaml do"):
        start()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="the first version of FSDP"):
        start()


@pytest.mark.parametrize(("again", "stage"), [("true", 3), ("false", 2)])
def test_accelerate_tells_how_models_are_cut_up(monkeypatch, again, stage):
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, value in {**launched, "FSDP_RESHARD_AFTER_FORWARD": again}.items():
        monkeypatch.setenv(name, value)
    assert launched_zero_stage() == 0  # one process has nobody to share with
    monkeypatch.setattr("rlhf.runtime.num_processes", lambda: 2)
    assert launched_zero_stage() == stage
    runtime = Runtime(torch.device("cpu"), "float32", "", stage)
    require_whole_models(runtime, use_peft=False)
    with pytest.raises(InputError, match="--use_peft: needs a whole model in every process"):
        require_whole_models(runtime, use_peft=True)


def test_one_process_of_accelerate_launch_is_said(without_cuda, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` starts one, without a word of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "note: accelerate launch starts one process on a CPU; take torchrun" in start().notice


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("rlhf.runtime.installed_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError) as caught:
        start(report_to="wandb")
    assert str(caught.value) == "--report_to=wandb: not installed; pip install wandb"
    for report_to in ("none", "tensorboard"):
        assert "report_to" not in start(report_to=report_to).notice


def test_of_all_trackers_those_that_are_missing_are_named(without_cuda, monkeypatch):
    monkeypatch.setattr("rlhf.runtime.installed_trackers", lambda: ["tensorboard"])
    notice = start(report_to="all").notice.splitlines()
    assert notice[1:] == ["report_to=all: tensorboard; not installed: wandb, trackio"]
    monkeypatch.setattr("rlhf.runtime.installed_trackers", list)
    assert usable_trackers("all") == (
        [],
        "report_to=all: none; not installed: tensorboard, wandb, trackio",
    )


def wandb_that(mode: str, *, knows_me: bool) -> SimpleNamespace:
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    return SimpleNamespace(setup=lambda: settings, login=lambda prompt, verify: knows_me)


def test_a_tracker_that_cannot_be_used_is_told_before_anything_is_loaded(monkeypatch):
    everything = ["tensorboard", "trackio", "wandb"]
    monkeypatch.setattr("rlhf.runtime.installed_trackers", lambda: everything)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", wandb_that("online", knows_me=False))
    with pytest.raises(InputError) as caught:
        start(report_to="wandb")
    remedy = "wandb login, or WANDB_MODE=offline"
    assert str(caught.value) == f"--report_to=wandb: not logged in; {remedy}"
    told = "report_to=all: tensorboard, trackio; not logged in: wandb"
    assert usable_trackers("all") == (["tensorboard", "trackio"], told)
    monkeypatch.setitem(sys.modules, "wandb", None)  # which no import gets past
    with pytest.raises(
        InputError, match="--report_to=wandb: cannot be imported; python -c 'import"
    ):
        start(report_to="wandb")
    for mode, knows_me in (("offline", False), ("disabled", False), ("online", True)):
        monkeypatch.setitem(sys.modules, "wandb", wandb_that(mode, knows_me=knows_me))
        assert usable_trackers("wandb") == (["wandb"], "")


def test_trackers_that_exist_are_named_as_the_flag_names_them(monkeypatch):
    monkeypatch.setattr("rlhf.runtime.get_available_trackers", lambda: ["wandb", "comet_ml"])
    assert installed_trackers() == ["wandb"]
