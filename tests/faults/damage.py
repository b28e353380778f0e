"""Bytes that change on the disk, and numbers that are not finite."""

import random
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf.checkpoints import load_tensors, require_undamaged
from rlhf.disk import CARD, read_record
from rlhf.errors import InputError
from rlhf.records import changed_since_written
from tests.faults.world import SCRIPTS, World

CPU = torch.device("cpu")
PLACES = ("ppo/*_epoch=*/*", "ppo/.resume/state-*/*", "ppo/.resume/*.json", "data/*/*")


def flip(world: World, number: int, seed: int = 0) -> Counter:
    """Change single bytes of checkpoints, states, records and data; count what nobody notices."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    copy = world.root / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    body = world.stage("ppo", copy / "ppo", "--max_steps=3", "--save_every=0.00001")
    world.finish(lambda: (keep_states(), body()))
    shutil.copytree(world.root / "data", copy / "data")
    files = [
        path
        for pattern in PLACES
        for path in sorted(copy.glob(pattern))
        if path.is_file() and not path.is_symlink() and path.name != CARD  # which may be edited
    ]
    assert {"tensors.safetensors", "run.json", "train.jsonl"} <= {path.name for path in files}
    for _ in range(number):
        path = rng.choice(files)
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        counts["flips"] += 1
        if not is_noticed(path):
            counts["silent flips"] += 1
            print(f"silent: {path}")
        path.write_bytes(before)
        assert not is_noticed(path), path
    return counts


def keep_states() -> None:
    """Let a finished run leave its states, so that there are some to damage."""
    from rlhf.run_folder import RunFolder

    RunFolder.finish = lambda self: None


def is_noticed(path: Path) -> bool:
    """Ask what a run would ask of the folder that this file is in."""
    if path.suffix == ".jsonl":
        return bool(changed_since_written(path.parent))
    if path.parent.name == ".resume":
        return read_record(path) is None
    if path.parent.parent.name == ".resume":
        return load_tensors(path.parent, device=CPU) is None
    try:
        require_undamaged(str(path.parent), flag="--x")
    except InputError:
        return True
    return False


def plant(world: World, number: int, seed: int = 0) -> Counter:
    """Make one number not finite, somewhere in training; count such numbers on the disk."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    for i in range(number):
        stage = rng.choice(sorted(SCRIPTS))
        folder = world.root / "planted" / str(i)
        kind = rng.choice(("loss", "gradient", "weight", "moment"))
        value, at = rng.choice((float("nan"), float("inf"), float("-inf"))), rng.randint(1, 5)
        body = world.stage(stage, folder, "--save_every=0.00001")
        script = SCRIPTS[stage]
        code = world.finish(lambda: (plant_at(script, kind, value, at), body()))  # noqa: B023
        counts["planted"] += 1
        counts["ended as if well"] += code == 0
        counts["tracebacks"] += "Traceback" in world.told()
        for path in folder.rglob("*.safetensors"):
            tensors = load_file(path).values()
            counts["not finite on disk"] += sum(
                int((~x.isfinite()).sum()) for x in tensors if x.is_floating_point()
            )
    return counts


def plant_at(script, kind: str, value: float, at: int) -> None:
    """Let the n-th optimiser step of this process meet such a number, or leave one behind."""
    real, calls = script.optimizer_step, []

    def step(schedules, loss, **options):
        calls.append(1)
        weights = schedules[0].optimizer.param_groups[0]["params"]
        if len(calls) == at and kind == "loss":
            loss = loss * value
        if len(calls) == at and kind == "gradient":
            weights[3].grad.view(-1)[0] = value
        norm = real(schedules, loss, **options)
        if len(calls) == at and kind == "weight":
            weights[3].data.view(-1)[0] = value
        if len(calls) == at and kind == "moment":
            schedules[0].optimizer.state[weights[3]]["exp_avg"].view(-1)[0] = value
        return norm

    script.optimizer_step = step
