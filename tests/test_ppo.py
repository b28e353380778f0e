"""PPO's choices: several responses to a prompt, no critic, beta that follows the KL, early ends."""

import math

import pytest
import torch
from safetensors.torch import load_file

import run_ppo
from rlhf.advantages import adaptive_beta
from rlhf.disk import read_record, replace_record
from tests.faults.world import content
from tests.test_resume import stop
from tests.test_scripts import BOTH, PPO, rows, run

FEW = [*PPO, "--batch_size=4", "--max_samples=10", "--minibatch_size=6", "--eval_samples=4"]
WITHOUT_CRITIC = ("rloo", "grpo", "dr_grpo")
GROUPS = {name: [f"--advantage={name}", "--num_responses=4"] for name in WITHOUT_CRITIC}
GAE = ["--num_responses=3"]
ADAPTIVE = ["--kl_controller=adaptive", "--target_kl=0.5"]
REWARD = ["--reward_fn=tests.test_scripts:count_a", "--missing_eos_penalty=0.5"]


@pytest.fixture(scope="module")
def parents(tmp_path_factory, base_path, data_dir):
    root = tmp_path_factory.mktemp("parents")
    run("sft", root, data_dir, f"--model_id={base_path}", "--num_epochs=1")
    run("rm", root, data_dir, "--num_epochs=1")
    return root


@pytest.fixture(scope="module")
def ppo(parents, data_dir):
    """Run PPO in a folder; gives its steps as they were logged."""

    def start(folder, *options):
        run("ppo", parents, data_dir, *FEW, *options, ckpt_dir=folder)
        return [row for row in rows(folder) if "val/ratio" in row]

    return start


@pytest.fixture
def experiences(monkeypatch):
    """What every update learns from."""
    seen, real = [], run_ppo.gather

    def watched(*args, **options):
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(run_ppo, "gather", watched)
    return seen


def stopped_state(ppo, folder, *options):
    """The tensors of a run that was stopped at its second step."""
    assert stop("ppo", lambda _, x: ppo(x, *options), folder, "optimizer_step", 2) == 143
    return load_file(max((folder / ".resume").glob("state-*")) / "tensors.safetensors")


# Several responses to a prompt


def test_responses_to_one_prompt_stand_side_by_side_and_differ(ppo, tmp_path, experiences):
    ppo(tmp_path, *GAE)
    assert sorted(len(x.scores) for x in experiences) == [6, 12, 12]  # of 2, 4 and 4 prompts
    for experience in experiences:
        batch = experience.rollout.batch
        prompts = batch.prompt_ids.unflatten(0, (-1, 3))  # (prompts, 3, P)
        assert (prompts == prompts[:, :1]).all()
        assert len({tuple(ids) for ids in batch.response_ids.tolist()}) > len(prompts)


@pytest.mark.slow
def test_noise_of_a_response_is_told_by_its_prompt_and_its_number(ppo, tmp_path, monkeypatch):
    """The first response of prompt row r has row r * 3, and the noise that this row always has."""
    names, real = [], run_ppo.roll_out

    def watched(actors, prompts, rows, noise_key, room):
        names.append([*rows])
        return real(actors, prompts, rows, noise_key, room)

    monkeypatch.setattr(run_ppo, "roll_out", watched)
    ppo(tmp_path / "one")
    _, *plain, _ = names  # the ends: held-out
    names.clear()
    ppo(tmp_path / "three", *GAE)
    _, *several, _ = names
    assert several == [[3 * row + k for row in rows for k in range(3)] for rows in plain]


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_micro_batches_change_nothing_without_a_critic_either(ppo, tmp_path, size):
    options = [*GROUPS["rloo"], *REWARD]
    whole = ppo(tmp_path / "whole", *options)
    parts = ppo(tmp_path / "parts", *options, f"--micro_batch_size={size}")
    for row, other in zip(whole, parts, strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


# Without a critic


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_the_advantage_of_a_response_is_that_of_each_of_its_tokens(
    ppo, tmp_path, experiences, name
):
    ppo(tmp_path, *GROUPS[name])
    for experience in experiences:
        mask, advantages = experience.mask, experience.advantages
        assert experience.returns is None and not experience.numbers.values.any()
        own = advantages[:, 0]  # (B,)
        assert torch.equal(advantages, own[:, None] * mask)
        totals = experience.scores - 0.2 * (experience.numbers.kl * mask).sum(dim=1)
        groups, totals = own.view(-1, 4), totals.view(-1, 4).double()
        for ours, x in zip(groups.tolist(), totals.tolist(), strict=True):
            mean = sum(x) / 4
            std = (sum((y - mean) ** 2 for y in x) / 3) ** 0.5
            scale = {"rloo": 4 / 3, "dr_grpo": 1, "grpo": 1 / (std + 1e-4)}[name]
            assert ours == pytest.approx([scale * (y - mean) for y in x], rel=1e-3, abs=1e-5)


def test_without_a_critic_there_is_none_anywhere(ppo, parents, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a critic was made")

    monkeypatch.setattr("rlhf.actors.Critic", refuse)
    logged = ppo(tmp_path / "whole", *GROUPS["rloo"])
    assert all(row["lr"] > 0 and math.isfinite(row["loss/policy_avg"]) for row in logged)
    of_critic = {"loss/value_avg", "val/clipfrac_avg", "explained_variance"}
    assert not [row for row in logged if of_critic & row.keys()]
    names = stopped_state(ppo, tmp_path / "stopped", *GROUPS["rloo"])
    assert not any("critic" in name or name.startswith("optimizer.1") for name in names)


@pytest.mark.slow
def test_equal_scores_without_a_penalty_move_nothing(ppo, parents, tmp_path):
    """Whatever the length of a response; noise would be blown up to a full step by AdamW."""
    for name, options in GROUPS.items():
        same = ["--reward_fn=tests.test_ppo:always_3", "--missing_eos_penalty=0", "--beta=0"]
        logged = ppo(tmp_path / name, *options, *same)
        assert [row["grad_norm"] for row in logged] == [0.0] * len(logged)
        folders = (parents / "sft", tmp_path / name)
        before, after = (load_file(path / "best/model.safetensors") for path in folders)
        assert all(torch.equal(before[key], after[key]) for key in before)


def always_3(prompts, responses):
    return [3.3] * len(prompts)


COMBINATIONS = [
    pytest.param(advantage, more, marks=[] if more in ([], alone) else [pytest.mark.slow])
    for advantage, alone in zip(
        (GAE, *GROUPS.values()), (ADAPTIVE, REWARD, ["--use_peft"], None), strict=True
    )
    for more in ([], ADAPTIVE, ["--early_stop_kl=1e-4"], ["--use_peft"], REWARD)
]


@pytest.mark.parametrize(("advantage", "more"), COMBINATIONS)
def test_every_combination_runs(ppo, tmp_path, advantage, more):
    logged = ppo(tmp_path, *advantage, *more, "--max_steps=2")
    assert len(logged) == 2
    assert all(math.isfinite(value) for row in logged for value in row.values())


def test_shared_critic_takes_several_responses_too(ppo, tmp_path):
    assert len(ppo(tmp_path, *GAE, "--critic=shared", *ADAPTIVE, "--early_stop_kl=1e-5")) == 3


# beta that follows the KL


def test_beta_follows_the_kl_of_the_rollouts(ppo, tmp_path, experiences, monkeypatch):
    followed, real = [], run_ppo.adaptive_beta

    def follow(beta, kl, **target):
        followed.append(float(kl))
        return real(beta, kl, **target)

    monkeypatch.setattr(run_ppo, "adaptive_beta", follow)
    logged = ppo(tmp_path, *ADAPTIVE, "--num_outer_epoch=2")
    assert followed == pytest.approx([row["objective/kl"] for row in logged])
    beta = torch.tensor(0.2, dtype=torch.float64)
    for row, experience in zip(logged, experiences, strict=True):
        assert row["objective/beta"] == pytest.approx(float(beta), rel=1e-6)
        # The penalty of this rollout was taken with this beta.
        paid = row["objective/non_score_reward"]
        assert paid == pytest.approx(-float(beta) * row["objective/kl"], rel=1e-4, abs=1e-6)
        kl = (experience.numbers.kl * experience.mask).sum(dim=1).mean()
        beta = adaptive_beta(beta, kl, target_kl=0.5)
    assert logged[-1]["objective/beta"] != 0.2


@pytest.mark.slow
def test_evaluation_weighs_the_kl_by_beta_as_typed(ppo, tmp_path):
    ppo(tmp_path, *ADAPTIVE, "--learning_rate=1e-2")
    judged = [row for row in rows(tmp_path) if "eval_kl" in row]
    assert abs(judged[-1]["eval_kl"]) > 0.1
    for row in judged:
        balance = row["eval_scores"] - 0.2 * row["eval_kl"]
        assert row["eval_objective"] == pytest.approx(balance, abs=1e-5)


# An early end of a rollout's updates


@pytest.fixture
def steps_taken(monkeypatch):
    """The learning rate of every optimiser step, and of what comes after the last."""
    rates, real, schedules = [], run_ppo.optimizer_step, []

    def watched(given, loss, **options):
        schedules[:] = given
        rates.append(given[0].get_last_lr()[0])
        return real(given, loss, **options)

    monkeypatch.setattr(run_ppo, "optimizer_step", watched)
    return lambda: (rates, [schedule.get_last_lr()[0] for schedule in schedules])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], GROUPS["rloo"]], ids=["gae", "rloo"])
def test_with_a_tiny_limit_a_rollout_has_one_step_and_the_rate_still_ends_at_0(
    ppo, tmp_path, steps_taken, options, experiences
):
    logged = ppo(tmp_path, *options, "--early_stop_kl=1e-12")
    assert [row["num_updates"] for row in logged] == [1, 1, 1]
    rates, after = steps_taken()
    planned = {16: 9, 8: 6, 4: 3, 2: 3}  # by sequences: minibatches of 6, three times over
    first, second, third = (planned[len(x.scores)] for x in experiences)
    left = [first + second + third, second + third, third]
    assert rates == pytest.approx([1e-4 * steps / left[0] for steps in left])
    assert after == [0.0] * len(after)


@pytest.mark.slow
def test_a_limit_that_is_never_reached_changes_nothing(ppo, tmp_path):
    limited = ppo(tmp_path / "limited", "--early_stop_kl=1e9")
    plain = ppo(tmp_path / "plain")
    assert [row.pop("num_updates") for row in limited] == [3, 3, 3]
    for row, other in zip(plain, limited, strict=True):
        row.pop("tokens_per_second"), other.pop("tokens_per_second")
        assert row == other


def test_updates_end_before_the_step_whose_minibatch_has_gone_too_far(ppo, tmp_path, monkeypatch):
    """Minibatches tell 9, 1 and 9: with a limit of 5 the third ends it; the first always counts."""
    real, told = run_ppo.add_gradient, iter([9.0, 1.0, 9.0] * 3)

    def watched(*args):
        return {**real(*args), "policy/approxkl_avg": torch.tensor(next(told))}

    monkeypatch.setattr(run_ppo, "add_gradient", watched)
    logged = ppo(tmp_path, "--early_stop_kl=5", "--num_inner_epoch=4")
    assert [row["num_updates"] for row in logged] == [2, 2, 2]
    assert [row["policy/approxkl_avg"] for row in logged] == [5.0, 5.0, 5.0]  # of steps taken


# Stopped and gone on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("skip_steps", 2),
        pytest.param("optimizer_step", 2, marks=pytest.mark.slow),
        pytest.param("policy_forward", 9, marks=pytest.mark.slow),
    ],
)
def test_adaptive_runs_without_a_critic_resume(ppo, tmp_path, name, call):
    options = [*GROUPS["rloo"], *ADAPTIVE, "--early_stop_kl=2e-5", "--num_outer_epoch=2"]

    def start(_, folder):
        return ppo(folder, *options)

    whole = start("ppo", tmp_path / "whole")
    taken = {row["num_updates"] for row in whole}
    assert min(taken) < 9 and max(taken) > 1  # some end early, some go on for a while
    assert stop("ppo", start, tmp_path / "cut", name, call) == 143
    start("ppo", tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_run_from_before_these_choices_is_this_very_run(ppo, tmp_path, capsys):
    ppo(tmp_path, "--max_steps=1")
    file = tmp_path / ".resume/run.json"
    record = read_record(file)
    new = ("advantage", "num_responses", "kl_controller", "target_kl", "early_stop_kl")
    for name in (*new, "normalize_reward", "reward_label"):
        del record["made_from"]["arguments"][name]
    replace_record(file, record)
    ppo(tmp_path, "--max_steps=1")
    assert "this very run is finished" in capsys.readouterr().out
    ppo(tmp_path, "--max_steps=1", "--num_responses=2")
    assert (tmp_path / "earlier/1").is_dir()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--advantage=rloo"], "--num_responses=1 must be at least 2"),
        (["--advantage=unknown"], "--advantage"),
        (["--num_responses=0"], "--num_responses"),
        (["--num_responses=2", "--do_sampling=false"], "with --do_sampling=false: all would"),
        ([*GROUPS["rloo"], "--gamma=0.9"], "--gamma=0.9 needs a critic"),
        ([*GROUPS["grpo"], "--gae_lambda=1"], "--gae_lambda=1.0 needs a critic"),
        ([*GROUPS["dr_grpo"], "--critic=shared"], "--critic=shared needs a critic"),
        ([*GROUPS["rloo"], "--value_clip=0.2"], "--value_clip=0.2 needs a critic"),
        ([*GROUPS["rloo"], "--value_loss_coeff=0"], "leave --value_loss_coeff out"),
        (["--target_kl=3"], "--target_kl=3 needs --kl_controller=adaptive"),
        (["--kl_controller=adaptive", "--target_kl=0"], "--target_kl"),
        (["--kl_controller=adaptive", "--beta=0"], "--beta=0 with --kl_controller=adaptive"),
        (["--kl_controller=unknown"], "--kl_controller"),
        (["--early_stop_kl=-1"], "--early_stop_kl"),
        (["--early_stop_kl=0.1", "--num_inner_epoch=1"], "a rollout has but one step"),
        (["--num_responses=4", "--advantage=rloo", "--top_k=1"], "with --top_k=1: all would be"),
        (["--reward_fn=x.py:f", "--max_reward=3"], "--max_reward=3 is of reward models"),
    ],
)
def test_what_would_mean_nothing_is_refused_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run_ppo.parse_args([*BOTH, *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(("num_responses", "fits"), [(1, False), (2, True), (4, True)])
def test_shares_of_a_rollout_count_responses(monkeypatch, tmp_path, num_responses, fits):
    monkeypatch.setattr("rlhf.runtime.num_processes", lambda: 2)
    options = ["--batch_size=5", f"--num_responses={num_responses}", "--data_dir=nowhere"]
    expected = "nowhere" if fits else "--batch_size=5: 2 processes share it equally"
    with pytest.raises(Exception, match=expected):
        run_ppo.main(run_ppo.parse_args([*BOTH, *options, f"--ckpt_dir={tmp_path}/new"]))
