"""The toy world's leaderboard: equal budgets, commands that the scripts take, intervals."""

import pytest

import load_dataset
import run_dpo
import run_ppo
import run_rm
import run_sft
import toyworld.__main__
from benchmarks.toyworld_leaderboard import FAMILIES, METHODS, shares, trainers
from benchmarks.toyworld_runs import World, make_world, mean_and_interval
from rlhf.batches import plan_epochs
from toyworld import pairs
from toyworld.pictures import COLORS

PARSERS = {
    "load_dataset.py": load_dataset.parse_args,
    "run_dpo.py": run_dpo.parse_args,
    "run_ppo.py": run_ppo.parse_args,
    "run_rm.py": run_rm.parse_args,
    "run_sft.py": run_sft.parse_args,
    "toyworld": toyworld.__main__.parse_args,
    "toyworld.pairs": pairs.parse_args,
}


def num_sampled(settings: dict[str, int]) -> int:
    """Count the responses of a run of PPO, from the plan that it would make."""
    plan = plan_epochs(
        [1] * settings["max_samples"],
        settings["batch_size"],
        num_epochs=settings["num_outer_epoch"],
        max_steps=settings.get("max_steps", 0),
        seed=0,
    )
    num_prompts = sum(len(batch.rows) for epoch in plan for batch in epoch)
    return num_prompts * settings.get("num_responses", 1)


@pytest.mark.parametrize(("num_prompts", "per_prompt"), [(1536, 6), (256, 2), (512, 9)])
def test_every_method_gets_the_same_number_of_samples(num_prompts, per_prompt):
    share, total = shares(num_prompts, per_prompt), num_prompts * per_prompt
    assert share.num_samples == total
    assert num_sampled(share.ppo) == num_sampled(share.groups) == total
    assert 2 * share.pairs["num_pairs"] == total
    assert share.scored["num_responses"] * share.scored["max_samples"] == total
    assert share.n * num_prompts == total


def test_the_scripts_take_every_command_of_the_leaderboard(monkeypatch, tmp_path):
    commands = []

    def note(world: World, *command: str, **arguments: object) -> None:
        flags = [f"--{name}={value}" for name, value in arguments.items()]
        commands.append([*command, f"--seed={world.seed}", *flags])

    monkeypatch.setattr(World, "run", note)
    world = make_world(7, tmp_path)
    made = {name: train() for name, train in trainers(world, shares(1536, 6)).items()}
    assert {*made, "best-of-n"} == set(METHODS)
    assert len(set(made.values())) == len(made)
    for folder in (tmp_path, tmp_path / "judged"):  # load_dataset.py wants to see its source
        folder.mkdir(exist_ok=True)
        (folder / "ultrafeedback.jsonl").touch()
    for command in commands:
        name, *flags = command[1:] if command[0] == "-m" else command
        PARSERS[name](flags)


def test_the_picture_shows_every_method_once():
    drawn = [method for methods in FAMILIES.values() for method in methods]
    assert sorted(drawn) == sorted(METHODS)
    assert max(map(len, FAMILIES.values())) <= len(COLORS)


def test_intervals_are_student_s():
    # 1, 2, 3: standard deviation 1, and 4.303 / sqrt(3) = 2.484 for two degrees of freedom.
    assert mean_and_interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert mean_and_interval([0.5, 0.5], scale=100, digits=1) == "50.0 ± 0.0"
    assert mean_and_interval([0.25]) == "0.25"
