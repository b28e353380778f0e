"""Several processes: the same run as one, as far as rounding goes; and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_ppo
import run_sft
from rlhf.disk import flaw_of
from rlhf.errors import InputError, exit_in_one_line
from rlhf.processes import join_rows, num_processes, share_of, sum_over_processes
from rlhf.runtime import launched_processes, require_equal_shares
from rlhf.sharding import gathered
from tests.faults.world import content

ROOT = Path(__file__).parent.parent
CUT_UP = ("sft", "rm", "dpo")  # by FSDP2
STAGES = (*CUT_UP, "ppo", "rloo", "lora", "rrhf")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WAYS = [("whole", stage) for stage in STAGES]
WAYS += [(way, stage) for way in ("zero2", "fsdp2") for stage in CUT_UP]
WAYS += [("fsdp2", "rrhf")]
ROUNDING = 1e-6  # of a gradient's norm


# How accelerate's launcher passes the settings of configs/fsdp2.yaml and configs/zero2.yaml on.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # its default, which must not count
SHARDED = {
    "fsdp2": {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "zero2": {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"},
}


def launch(processes: int, *command: str, **environment: str) -> subprocess.Popen:
    """Start Python with some arguments in one process, or in two that torchrun starts."""
    launcher = ["-m", *TORCHRUN] if processes == 2 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == code, stderr
    return stdout, stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(root, base_path, data_dir) -> Path:
    """All four trainers, PPO without a critic, SFT of an adapter, and another loss, by one."""
    out = root / "one"
    out.mkdir()
    paths = map(str, (base_path, data_dir, out, out))
    finish(launch(1, "-m", "tests.four_stages", *paths, "1", *STAGES))
    return out


@pytest.fixture(scope="module")
def by_two(root, one, base_path, data_dir) -> Callable[[str], Path]:
    """The same by two processes, from the same parents: those stages that go this way."""

    @cache
    def run(way: str) -> Path:
        out = root / way
        out.mkdir()
        paths = map(str, (base_path, data_dir, out, one))
        stages = [stage for this, stage in WAYS if this == way]
        environment = SHARDED.get(way, {})
        finish(launch(2, "-m", "tests.four_stages", *paths, "2", *stages, **environment))
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stage"), WAYS)
def test_two_processes_have_the_gradient_of_one(one, by_two, way, stage):
    one, two = (load_file(out / f"{stage}.safetensors") for out in (one, by_two(way)))
    difference = sum((one[name] - two[name]).double().square().sum() for name in one)
    norm = sum(gradient.double().square().sum() for gradient in one.values())
    assert float(difference / norm) ** 0.5 < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stage"), WAYS)
def test_two_processes_end_with_the_weights_of_one(one, by_two, way, stage):
    """But for weights whose gradient is 0 but for rounding: a bias of the keys, for one.

    AdamW makes steps of the learning rate out of whatever the rounding is.
    """
    one, two = (load_file(out / stage / "best/model.safetensors") for out in (one, by_two(way)))
    assert one.keys() == two.keys()
    apart = {name for name in one if not torch.allclose(one[name], two[name], rtol=0, atol=1e-6)}
    without_gradient = {name for name in one if name.endswith(("attn.c_attn.bias", "ln_f.bias"))}
    assert apart <= without_gradient
    for name in without_gradient:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-4), name  # ten steps of 1e-5
    queries_and_values = [
        torch.cat((weights[name][:32], weights[name][64:]))
        for weights in (one, two)
        for name in sorted(one)
        if name.endswith("h.0.attn.c_attn.bias")
    ]
    assert torch.allclose(*queries_and_values, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stage"), WAYS)
def test_two_processes_log_the_numbers_of_one(one, by_two, way, stage):
    one, two = (
        [json.loads(line) for line in (folder / stage / "metrics.jsonl").open()]
        for folder in (one, by_two(way))
    )
    assert len(one) == len(two) > 5
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"tokens_per_second"}:
            assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stage"), WAYS)
def test_two_processes_leave_the_files_of_one(one, by_two, way, stage):
    two = by_two(way)

    def names(folder: Path) -> set[str]:
        files = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return {re.sub(r"=-?\d+\.\d+", "", file) for file in files}

    assert names(one / stage) == names(two / stage)
    assert flaw_of((two / stage / "best").resolve()) is None


@pytest.fixture(scope="module")
def sft(base_path, data_dir) -> list[str]:
    return [
        "run_sft.py",
        f"--model_id={base_path}",
        f"--data_dir={data_dir}/sft",
        "--max_len=64",
        "--batch_size=2",
        "--num_epochs=3",
        "--dropout=0.1",
        "--log_step=1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, SHARDED["fsdp2"]], ids=["whole", "fsdp2"])
def test_two_processes_that_were_stopped_go_on_to_the_same_bytes(sft, tmp_path, environment):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    finish(launch(2, *sft, f"--ckpt_dir={undisturbed}", **environment))
    process = launch(2, *sft, f"--ckpt_dir={stopped}", **environment)
    log = stopped / "metrics.jsonl"
    while not (log.exists() and '"step": 10,' in log.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and its processes
    stdout, _ = process.communicate(timeout=60)
    assert re.search(r"stopped by SIG\w+ after step \d+; the same command goes on", stdout)

    stdout, stderr = finish(launch(1, *sft, f"--ckpt_dir={stopped}"), 2)
    assert "the number of processes was 2, is 1" in stderr and stderr.count("\n") == 1
    assert ("the stage of ZeRO was 3, is 0" in stderr) == bool(environment)
    stdout, _ = finish(launch(2, *sft, f"--ckpt_dir={stopped}", **environment))
    assert "going on in" in stdout
    assert content(stopped) == content(undisturbed)
    stdout, _ = finish(launch(1, *sft, f"--ckpt_dir={stopped}"))
    assert "this very run is finished" in stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "processes", "said"),
    [
        ("one_gpu", 1, "no CUDA device"),
        ("multi_gpu", 2, "2 processes; no CUDA device: running on the CPU\n"),
        ("zero2", 2, "FSDP2 cuts the model up as ZeRO-2 does"),
        ("fsdp2", 2, "FSDP2 cuts the model up as ZeRO-3 does"),
    ],
)
def test_accelerate_launches_by_the_files_of_configs(sft, tmp_path, config, processes, said):
    file = ["--config_file", f"configs/{config}.yaml", "--num_processes", str(processes)]
    options = [f"--ckpt_dir={tmp_path / 'sft'}", "--max_steps=1"]
    started = launch(1, "-m", "accelerate.commands.launch", *file, *sft, *options)
    stdout, _ = finish(started)
    assert said in stdout and stdout.count("best checkpoint: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch_size=3", "--batch_size=3: 2 processes share it equally; make it a multiple"),
        ("--gpu_id=1", "--gpu_id=1: 2 processes were started, and each takes the GPU of its own"),
    ],
)
def test_two_processes_refuse_in_one_line(sft, tmp_path, option, message):
    process = launch(2, *sft, f"--ckpt_dir={tmp_path / 'sft'}", option)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    ours = [line for line in stderr.splitlines() if "run_sft.py: error" in line]
    assert len(ours) == 1 and message in ours[0]
    assert "Error: --" not in stderr and not (tmp_path / "sft").exists()


def test_with_one_process_nothing_is_shared():
    x = torch.tensor([1.0, 2.0])
    assert num_processes() == 1
    assert share_of([1, 2, 3]) == [1, 2, 3]
    assert sum_over_processes(x) is x and join_rows(x, 2) is x


@pytest.fixture
def second_of_three(monkeypatch) -> None:
    """This process as the second of three; what is summed is its own part."""
    monkeypatch.setattr("rlhf.processes.num_processes", lambda: 3)
    monkeypatch.setattr("rlhf.processes.process_index", lambda: 1)
    monkeypatch.setattr("rlhf.processes.sum_over_processes", lambda x: x)
    monkeypatch.setattr("rlhf.runtime.num_processes", lambda: 3)


def test_rows_are_dealt_and_come_back_to_their_places(second_of_three):
    assert share_of(list("abcdefgh")) == ["b", "e", "h"]
    assert join_rows(torch.tensor([1, 2]), 6).tolist() == [0, 1, 0, 0, 2, 0]
    assert join_rows(torch.tensor([[7.0, 8.0]]), 1).tolist() == [[0.0, 0.0]]  # it has got none


@pytest.mark.parametrize("is_main", [True, False])
def test_what_is_gathered_stays_in_the_main_process_alone(monkeypatch, is_main):
    """A state is three times the weights: no other process has room for it."""
    monkeypatch.setattr("rlhf.sharding.is_main_process", lambda: is_main)
    tensors = {"weight": torch.ones(2)}
    assert gathered(tensors) == (tensors if is_main else {})


@pytest.mark.parametrize(("size", "fits"), [(0, True), (3, True), (6, True), (4, False)])
def test_batches_are_shared_equally(second_of_three, size, fits):
    if fits:
        require_equal_shares(batch_size=3, minibatch_size=size)
    else:
        with pytest.raises(InputError, match=f"--minibatch_size={size}: 3 processes share it"):
            require_equal_shares(batch_size=3, minibatch_size=size)


@pytest.mark.parametrize("script", [run_sft, run_ppo])
def test_shares_are_checked_before_anything_is_read(monkeypatch, script, tmp_path):
    monkeypatch.setattr("rlhf.runtime.num_processes", lambda: 2)
    stage = "sft" if script is run_sft else "ppo"
    paths = ["--sft_model_path=x", "--rm_model_path=y"] if stage == "ppo" else []
    options = ["--batch_size=5", f"--ckpt_dir={tmp_path}/new", "--data_dir=nowhere", *paths]
    with pytest.raises(InputError, match="--batch_size=5: 2 processes share it equally"):
        script.main(script.parse_args(options))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"WORLD_SIZE": "2"},
            r"WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR, MASTER_PORT: unset it",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is set, but not RANK"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here"},
            "WORLD_SIZE=2 is set, but not MASTER_PORT",
        ),
    ],
)
def test_a_launcher_that_is_none_is_refused(monkeypatch, environment, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        launched_processes()


def test_what_every_process_finds_the_first_one_says(monkeypatch, capsys):
    """The others wait, and speak only if they outlive it."""
    waited: list[float] = []
    monkeypatch.setattr("rlhf.errors.time.sleep", waited.append)
    for rank, told in (("0", "run_sft.py: error: no"), ("1", "run_sft.py, process 1: error: no")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            exit_in_one_line("run_sft.py", "no", 2)
        assert capsys.readouterr().err == f"{told}\n"
    assert waited == [10.0]
