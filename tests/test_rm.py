"""What run_rm.py makes of pairs and of whole rankings, and what PPO makes of that."""

import argparse
import json
import math
from itertools import chain

import pytest
import torch

import run_rm
from rlhf.rankings import Ranking
from tests.conftest import write_jsonl
from tests.test_scripts import PPO, epochs, rows, run

FAST = ["--learning_rate=1e-3", "--batch_size=4", "--log_step=1"]


def settings(loss, **more):
    return argparse.Namespace(**{"loss": loss, "margin": False, "center_coeff": 0.0, **more})


def bradley_terry(x):
    return math.log(1 + math.exp(-x))


# Three responses to one prompt, of which two tie, and two to another.
ITEMS = [Ranking([5, 6, 7], [(1, 0), (1, 2)]), Ranking([0, 9], [(1, 0)])]
LOGITS = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0])
TARGETS = torch.tensor([2.0, 5.0, 2.0, 1.0, 2.5])


def test_a_prompt_counts_once_however_many_pairs_it_has():
    # Pairs of the first prompt: 2 - 0.5 and 2 - (-1); of the second: 1 - 3.
    expected = [(bradley_terry(1.5) + bradley_terry(3.0)) / 2, bradley_terry(-2.0)]
    losses = run_rm.item_losses(settings("listwise"), ITEMS, LOGITS, TARGETS)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_margin_is_the_difference_of_the_targets():
    # 5 - 2, 5 - 2 and 2.5 - 1 come off the differences above.
    expected = [(bradley_terry(-1.5) + bradley_terry(0.0)) / 2, bradley_terry(-3.5)]
    losses = run_rm.item_losses(settings("listwise", margin=True), ITEMS, LOGITS, TARGETS)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_centering_adds_the_squared_sum_of_each_pair():
    # Sums: 2 + 0.5 = 2.5, 2 - 1 = 1, 1 + 3 = 4.
    plain = run_rm.item_losses(settings("listwise"), ITEMS, LOGITS, TARGETS)
    centred = run_rm.item_losses(settings("listwise", center_coeff=0.1), ITEMS, LOGITS, TARGETS)
    expected = [0.1 * (6.25 + 1.0) / 2, 0.1 * 16.0]
    assert (centred - plain).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory, base_path, data_dir):
    root = tmp_path_factory.mktemp("rm")
    run("sft", root, data_dir, f"--model_id={base_path}", "--learning_rate=3e-3", "--num_epochs=2")
    return root


@pytest.fixture(scope="module")
def ranked_dir(tmp_path_factory):
    """Two to four responses to each prompt, some of which tie."""
    folder = tmp_path_factory.mktemp("ranked")
    answers = [("Yes.", 2.0), ("It is so.", 7.0), ("No, never.", 9.0), ("Perhaps it is.", 7.0)]
    for side, prompts in (("train", 7), ("eval", 3)):
        found = [
            {"prompt": f"Name it {i}", "prompt_id": str(i), "source": "tests"} | row
            for i in range(prompts)
            for row in ({"response": x, "score": y} for x, y in answers[: 2 + i % 3])
        ]
        write_jsonl(folder / "rm" / f"{side}.jsonl", found)
    return folder


def test_listwise_is_pairwise_where_each_prompt_has_two_responses(root, data_dir, tmp_path):
    options = [*FAST, "--max_steps=5", "--margin", "--center_coeff=0.1"]
    folders = [
        run("rm", root, data_dir, f"--loss={loss}", *options, ckpt_dir=tmp_path / loss)
        for loss in ("pairwise", "listwise")
    ]
    for ours, theirs in zip(*map(rows, folders), strict=True):
        for figures in (ours, theirs):
            figures.pop("tokens_per_second", None)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    told = [json.loads((folder / "best/run.json").read_text())["reward"] for folder in folders]
    assert [reward["loss"] for reward in told] == ["pairwise", "listwise"]
    assert told[0]["logit_mean"] == pytest.approx(told[1]["logit_mean"], rel=1e-5, abs=1e-6)


def test_each_response_of_a_prompt_is_read_once(root, ranked_dir, tmp_path, monkeypatch):
    seen, real = [], run_rm.score_rows

    def watched(model, responses, rows, pad_id, runtime):
        if model.training:
            seen.append(rows)
        return real(model, responses, rows, pad_id, runtime)

    monkeypatch.setattr(run_rm, "score_rows", watched)
    run("rm", root, ranked_dir, "--loss=listwise", "--num_epochs=1", *FAST, ckpt_dir=tmp_path)
    # 2, 3, 4, 2, 3, 4 and 2 responses; 4 prompts in a step, as --batch_size says.
    assert sorted(chain.from_iterable(seen)) == list(range(20))
    assert len(seen) == 2


def test_a_ranking_in_smaller_forwards_has_the_same_loss(root, ranked_dir, tmp_path):
    first, second = (
        rows(
            run(
                "rm",
                root,
                ranked_dir,
                "--loss=listwise",
                "--max_steps=2",
                f"--micro_batch_size={size}",
                *FAST,
                ckpt_dir=tmp_path / str(size),
            )
        )
        for size in (0, 1)
    )
    for ours, theirs in zip(first, second, strict=True):
        names = {"loss", "grad_norm", "eval_loss"} & ours.keys()
        assert [ours[x] for x in names] == pytest.approx([theirs[x] for x in names], rel=1e-5)


@pytest.mark.parametrize("loss", [pytest.param("pairwise", marks=pytest.mark.slow), "listwise"])
@pytest.mark.parametrize("options", [[], ["--margin"], ["--center_coeff=0.05"]])
def test_every_way_to_compare_learns_the_order(loss, options, root, ranked_dir, tmp_path):
    fast = ["--learning_rate=3e-3", "--num_epochs=4", "--batch_size=4"]
    folder = run("rm", root, ranked_dir, f"--loss={loss}", *fast, *options, ckpt_dir=tmp_path)
    losses, accuracies = epochs(folder, "eval_loss"), epochs(folder, "eval_accuracy")
    assert losses[-1] < losses[0] and accuracies[-1] > 0.9


def test_the_held_out_loss_is_the_one_that_is_trained(root, ranked_dir, tmp_path):
    """On the same rows, and before the first update, both are the same number."""
    same = tmp_path / "rm"
    same.mkdir()
    for side in ("train", "eval"):
        (same / f"{side}.jsonl").write_bytes((ranked_dir / "rm/train.jsonl").read_bytes())
    options = [
        "--loss=listwise",
        "--margin",
        "--center_coeff=0.1",
        "--batch_size=7",
        "--log_step=1",
    ]
    folder = run("rm", root, tmp_path, *options, "--max_steps=1", ckpt_dir=tmp_path / "out")
    [first] = epochs(folder, "loss")
    assert epochs(folder, "eval_loss")[0] == pytest.approx(first, rel=1e-5)


@pytest.mark.claim(6)
def test_ppo_centres_the_logit_of_a_listwise_reward_model(root, data_dir, tmp_path):
    fast = ["--learning_rate=3e-3", "--num_epochs=1"]
    rm = run("rm", root, data_dir, "--loss=listwise", *fast, ckpt_dir=tmp_path / "rm")
    assert epochs(rm, "reward_mean")[0] == pytest.approx(0.0, abs=1e-5)
    options = [*PPO, "--max_steps=1", "--eval_samples=4", f"--rm_model_path={rm}/best"]
    ppo = run("ppo", root, data_dir, *options, ckpt_dir=tmp_path / "ppo")
    assert math.isfinite(epochs(ppo, "eval_scores")[-1])


@pytest.mark.parametrize("options", [["--margin"], ["--center_coeff=0.01"]])
def test_what_compares_is_refused_with_regression(options, capsys):
    with pytest.raises(SystemExit) as caught:
        run_rm.parse_args(["--sft_model_path=x", *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    name = options[0].partition("=")[0]
    assert name in error and "--loss=pairwise and --loss=listwise: leave it out" in error
    run_rm.parse_args(["--sft_model_path=x", "--loss=listwise", *options])
