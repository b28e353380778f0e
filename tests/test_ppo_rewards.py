"""PPO by any text classifier, and with scores in units of their spread."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import run_ppo
from rlhf.batches import build_batch
from rlhf.disk import write_checksums
from rlhf.errors import InputError
from rlhf.experience import decode_responses
from rlhf.models import load_reward_model, reward_logits
from rlhf.tokens import encode_samples
from tests.faults.world import content
from tests.test_classifiers import bert, pipeline_logits, scorer
from tests.test_resume import stop
from tests.test_scripts import BOTH, PPO, epochs, rows, run

FEW = [*PPO, "--batch_size=4", "--max_samples=12", "--minibatch_size=3", "--eval_samples=4"]
BETA = 0.2


@pytest.fixture(scope="module")
def parents(tmp_path_factory, base_path, data_dir):
    root = tmp_path_factory.mktemp("parents")
    run("sft", root, data_dir, f"--model_id={base_path}", "--num_epochs=1")
    run("rm", root, data_dir, "--num_epochs=1", "--learning_rate=1e-3")
    return root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The flags of a text classifier with three labels."""
    path = bert(tmp_path_factory.mktemp("classifier") / "bert")
    return [f"--rm_model_path={path}", "--reward_label=good"]


@pytest.fixture(scope="module")
def start(parents, data_dir):
    """Run PPO in a folder."""

    def start(folder: Path, *options: str) -> Path:
        return run("ppo", parents, data_dir, *FEW, *options, ckpt_dir=folder)

    return start


@pytest.fixture
def seen(monkeypatch):
    """What each rollout was made with: arguments of `gather`, what it gave, the critic's bias."""
    calls, real = [], run_ppo.gather

    def watched(args, actors, *others):
        bias = float(actors.critic.head.bias.detach()) if actors.critic else None
        experience = real(args, actors, *others)
        calls.append((actors, others, experience, bias))
        return experience

    monkeypatch.setattr(run_ppo, "gather", watched)
    return calls


def steps(folder):
    return [row for row in rows(folder) if "val/ratio" in row]


# Text classifiers


def test_ppo_is_paid_the_logit_that_the_pipeline_gives(start, classifier, seen, tmp_path, capsys):
    start(tmp_path, *classifier, "--missing_eos_penalty=0", "--max_steps=2")
    told = capsys.readouterr().out
    assert "reward: the logit of label 1 (Good)" in told and "by the pair of texts" in told
    path = classifier[0].partition("=")[2]
    for (_, others, experience, _), row in zip(seen, steps(tmp_path), strict=True):
        tokenizer, prompts, *_ = others
        asked = [prompts.texts[i] for i in others[-2]]
        responses = decode_responses(tokenizer, experience.rollout)
        kept = [i for i, response in enumerate(responses) if response]
        expected = pipeline_logits(path, [asked[i] for i in kept], [responses[i] for i in kept])
        torch.testing.assert_close(experience.scores[kept], expected[:, 1], atol=1e-4, rtol=0)
        assert row["objective/scores"] == pytest.approx(float(experience.scores.mean()), abs=1e-4)


def test_the_critic_starts_from_the_sft_model_at_the_first_mean(
    start, classifier, seen, parents, tmp_path
):
    start(tmp_path, *classifier, "--max_steps=1")
    [(actors, _, _, bias)] = seen
    assert bias == pytest.approx(epochs(tmp_path, "eval_scores")[0], abs=1e-5)
    # At a step of 1e-4 its weights are still the SFT model's, nearly.
    own = dict(actors.critic.trunk.named_parameters())
    sft = dict(actors.ref_policy.base_model.named_parameters())
    assert all((own[name] - sft[name]).abs().max() < 1e-3 for name in sft)


@pytest.mark.slow
def test_a_classifier_that_reads_less_than_max_len_is_told_once(start, tmp_path, capsys):
    path = bert(tmp_path / "bert", model_max_length=40)
    flags = [f"--rm_model_path={path}", "--reward_label=0", "--max_steps=1"]
    start(tmp_path / "out", *flags)
    assert capsys.readouterr().out.count("reads 40 tokens, fewer than --max_len=64") == 1


def test_a_classifier_serves_beside_a_shared_trunk(start, classifier, tmp_path):
    options = ["--use_peft", "--share_trunk", "--max_steps=2", "--learning_rate=1e-3"]
    start(tmp_path, *classifier, *options)
    assert math.isfinite(epochs(tmp_path, "eval_scores")[-1])


def test_without_its_run_json_a_reward_model_gives_the_raw_logit(parents, tokenizer, tmp_path):
    """Its tokenizer's chat template writes the very ids that PPO would have scored."""
    path = tmp_path / "rm"
    shutil.copytree(parents / "rm/best", path)
    for name in ("run.json", "SHA256SUMS"):
        (path / name).unlink()
    prompts, responses = ["Name the cat", "Draw the sea"], ["A cat, please.", "No"]
    found, score = scorer(str(path), None)
    scores = score(prompts, responses)
    model = load_reward_model(str(path), flag="--x", device=torch.device("cpu"), pad_id=0)
    samples = encode_samples(tokenizer, prompts, responses, max_len=64, min_len=1)
    with torch.no_grad():
        expected = reward_logits(model, build_batch(samples, 0), pad_id=0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert found.told(max_len=64).endswith("by its chat template")


# Units of the scores


def guarded(row):
    """The KL penalty of a step; --max_kl_div guarded nothing."""
    assert row["guarded_kl"] == 0
    return BETA * row["objective/kl"]


def test_stored_units_are_the_reward_models_mean_and_spread(start, parents, seen, tmp_path):
    folder = start(tmp_path, "--normalize_reward=stored")
    facts = json.loads((parents / "rm/best/run.json").read_text())["reward"]
    mean, std = facts["reward_mean"], facts["reward_std"]
    assert abs(mean) > 0.5 and abs(std - 1) > 0.2
    for row in steps(folder):
        normalized = (row["objective/scores"] - mean) / std
        assert row["objective/rlhf_reward"] == pytest.approx(normalized - guarded(row), abs=1e-4)
        assert row["objective/non_score_reward"] == pytest.approx(-guarded(row), abs=1e-4)
    for row in (row for row in rows(folder) if "eval_scores" in row):
        balance = row["eval_scores"] - BETA * std * row["eval_kl"]
        assert row["eval_objective"] == pytest.approx(balance, abs=1e-4)
    assert seen[0][3] == 0.0  # the critic begins at the mean


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--advantage=rloo", "--num_responses=3"]])
def test_running_units_are_those_of_all_scores_so_far(options, start, seen, tmp_path):
    fn = "--reward_fn=tests.test_scripts:count_a"
    folder = start(tmp_path, fn, "--normalize_reward=running", "--num_outer_epoch=2", *options)
    scores = np.zeros(0)
    assert len(seen) == 6
    for (_, _, experience, _), row in zip(seen, steps(folder), strict=True):
        raw = experience.scores.numpy().astype(float)
        scores = np.concatenate([scores, raw])
        expected = (raw - scores.mean()) / max(scores.std(ddof=1), 1e-4)
        assert experience.normalized.numpy() == pytest.approx(expected, abs=1e-5)
        assert row["objective/scores"] == pytest.approx(raw.mean(), abs=1e-4)
        total = expected.mean() - guarded(row)
        assert row["objective/rlhf_reward"] == pytest.approx(total, abs=1e-4)
    assert scores.std() > 0
    last = [row for row in rows(folder) if "eval_scores" in row][-1]
    balance = last["eval_scores"] - BETA * scores.std(ddof=1) * last["eval_kl"]
    assert last["eval_objective"] == pytest.approx(balance, abs=1e-4)
    assert seen[0][3] in (0.0, None)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    return start(tmp_path_factory.mktemp("whole"), "--normalize_reward=running")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(
            "score_responses", 3, marks=pytest.mark.slow
        ),  # before the scores of the second rollout are known
        pytest.param(
            "policy_forward", 7, marks=pytest.mark.slow
        ),  # they are, and no update has been made of them
        ("optimizer_step", 9),  # between two updates
    ],
)
def test_a_stopped_run_goes_on_in_the_units_it_had(name, call, start, undisturbed, tmp_path):
    def again(_, folder):
        return start(folder, "--normalize_reward=running")

    assert stop("ppo", again, tmp_path, name, call) == 143
    again("ppo", tmp_path)
    assert content(tmp_path) == content(undisturbed)


# What is refused


def bad_inputs(parents, classifier, tmp_path):
    """(options, what the one line must say)"""
    old = tmp_path / "old"
    shutil.copytree(parents / "rm/best", old)
    facts = json.loads((old / "run.json").read_text())
    del facts["reward"]["reward_std"]
    (old / "run.json").write_text(json.dumps(facts))
    write_checksums(old)
    foreign = tmp_path / "foreign"
    shutil.copytree(classifier[0].partition("=")[2], foreign)
    (foreign / "run.json").write_text(json.dumps({"stage": "of another tool"}))
    write_checksums(foreign)
    yield [f"--rm_model_path={foreign}"], "several labels; name one by --reward_label"
    yield ["--reward_label=0"], "is of run_rm.py and has one logit; leave --reward_label out"
    yield classifier[:1], "several labels; name one by --reward_label: 0 (bad), 1 (Good), 2 (odd)"
    yield [classifier[0], "--reward_label=best"], "has these labels: 0 (bad), 1 (Good), 2 (odd)"
    stored = "--normalize_reward=stored"
    yield [*classifier, stored], "has no mean and spread stored; give running"
    yield [f"--rm_model_path={old}", stored], "tells no spread of its rewards (reward_std=None)"
    yield [f"--rm_model_path={parents}/sft/best"], "it must be a reward model"


def test_what_cannot_be_a_reward_is_one_line_before_any_model_is_loaded(
    start, parents, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.models.load_weights", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr("rlhf.classifiers.load_weights", lambda *a: pytest.fail("and here"))
    for options, message in bad_inputs(parents, classifier, tmp_path):
        with pytest.raises(InputError) as caught:
            start(tmp_path / "out", *options)
        assert message in str(caught.value), options
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward_fn=f.py:f", "--reward_label=0"], "is for a text classifier as reward model"),
        (["--reward_fn=f.py:f", "--normalize_reward=stored"], "has nothing stored; give running"),
        (["--normalize_reward=other"], "invalid choice"),
    ],
)
def test_arguments_that_contradict_a_reward_function_exit_with_2(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run_ppo.parse_args([*BOTH, *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
