"""What run_rm.py makes of pairs and of whole rankings, and what PPO makes of that."""

import argparse
import json
import math
import shutil
from itertools import chain

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import run_rm
from rlhf.errors import InputError
from rlhf.rankings import Ranking
from rlhf.tokens import decode_response
from tests.conftest import EOS, write_jsonl
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param("pairwise", marks=pytest.mark.slow), "listwise"])
@pytest.mark.parametrize("options", [[], ["--margin"], ["--center_coeff=0.05"]])
def test_every_way_to_compare_learns_the_order(loss, options, root, ranked_dir, tmp_path):
    fast = ["--learning_rate=3e-3", "--num_epochs=4", "--batch_size=4"]
    folder = run("rm", root, ranked_dir, f"--loss={loss}", *fast, *options, ckpt_dir=tmp_path)
    losses, accuracies = epochs(folder, "eval_loss"), epochs(folder, "eval_accuracy")
    assert losses[-1] < losses[0] and accuracies[-1] > 0.9


@pytest.mark.slow
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


@pytest.mark.slow
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


# Pairs in place of scores


def pair(prompt, chosen, rejected, scores=(10.0, 1.0)):
    told = dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **told}


# One click among three answers, its opposite for one of them, and another prompt.
CLICKS = [
    pair("Name it", "A mat.", "No."),
    pair("Name it", "A mat.", "The sea is calm."),
    pair("Name it", "No.", "A mat."),
    pair("Draw it", "A cat, and a dog.", "No."),
]


@pytest.fixture
def clicks_dir(tmp_path):
    for side in ("train", "eval"):
        write_jsonl(tmp_path / "clicks" / "rm" / f"{side}.jsonl", CLICKS)
    return tmp_path / "clicks"


def read_pairs(root, rows, tmp_path):
    write_jsonl(tmp_path / "pairs/train.jsonl", rows)
    path = f"{root}/sft/best"
    flags = [f"--sft_model_path={path}", f"--data_dir={tmp_path}/pairs", "--max_len=64"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    args = run_rm.parse_args([*flags, "--loss=pairwise"])
    return run_rm.Responses(args, tokenizer, "train", 0), tokenizer


def test_nothing_is_compared_but_the_pairs_that_are_given(root, tmp_path):
    responses, tokenizer = read_pairs(root, CLICKS, tmp_path)
    texts = [decode_response(tokenizer, sample.response_ids) for sample in responses.samples]
    # A mat. and No. are rows for each of their two scores; the first A mat. is in two pairs.
    assert texts == [
        "A mat.",
        "No.",
        "The sea is calm.",
        "No.",
        "A mat.",
        "A cat, and a dog.",
        "No.",
    ]
    assert responses.scores == [10.0, 1.0, 1.0, 10.0, 1.0, 10.0, 1.0]
    pairs = [item.row_pairs() for item in responses.items("pairwise")]
    assert pairs == [[(0, 1)], [(0, 2)], [(3, 4)], [(5, 6)]]
    first, second = responses.items("listwise")
    assert first.row_pairs() == [(0, 1), (0, 2), (3, 4)] and second.row_pairs() == [(5, 6)]


def test_accuracy_is_over_the_pairs_that_are_given(root, tmp_path):
    responses, _ = read_pairs(root, CLICKS, tmp_path)
    # 3 > 2 right, 3 < 4 wrong, 2 = 2 half, 1 > 0 right. Spearman: nobody has scored.
    values = [3.0, 2.0, 4.0, 2.0, 2.0, 1.0, 0.0]
    assert responses.accuracy(values) == (2.5 / 4, 4, 0)
    assert math.isnan(responses.correlation(values))


def test_pairs_with_scores_have_a_rank_correlation(root, tmp_path):
    rows = [pair("Name it", "A mat.", "No.", (7.0, 3.0)), pair("Draw it", "A cat.", "No.")]
    responses, _ = read_pairs(root, rows, tmp_path)
    assert responses.correlation([2.0, 1.0, 3.0, 0.0]) == pytest.approx(1.0)
    assert responses.correlation([1.0, 2.0, 3.0, 0.0]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_a_pair_that_has_no_room_takes_its_rows_along(root, tmp_path):
    long = "Name " * 80
    responses, _ = read_pairs(root, [pair(long, "A", "B"), *CLICKS[:1]], tmp_path)
    assert responses.pairs == [(0, 1)] and len(responses.samples) == 2


def logits_of(path, records):
    """Plain transformers, one text at a time: no padding, none of our batches."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for prompt, response in records:
        form = f"<instruction>{prompt}</instruction><response>{response}</response>{EOS}"
        with torch.no_grad():
            found.append(float(model(torch.tensor([tokenizer(form).input_ids])).logits))
    return found


@pytest.mark.parametrize("options", [[], ["--margin"]], ids=["plain", "margin"])
@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_the_loss_on_pairs_is_that_of_bradley_and_terry(loss, options, root, clicks_dir, tmp_path):
    """The loss after training, of the weights that were saved, pair by pair."""
    steps = ["--max_steps=2", *FAST]
    folder = run(
        "rm", root, clicks_dir, f"--loss={loss}", *steps, *options, ckpt_dir=tmp_path / "rm"
    )
    best, worst = (
        logits_of(folder / "best", [(row["prompt"], row[side]) for row in CLICKS])
        for side in ("chosen", "rejected")
    )
    margin = 4.0 if options else 0.0  # from 1 to --max_reward, as all of these have the same scores
    losses = [bradley_terry(i - j - margin) for i, j in zip(best, worst, strict=True)]
    by_prompt = [sum(losses[:3]) / 3, losses[3]]
    expected = sum(losses) / 4 if loss == "pairwise" else sum(by_prompt) / 2
    before, *_, row = [row for row in rows(folder) if "eval_loss" in row]
    assert row["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert epochs(folder, "loss")[0] == pytest.approx(before["eval_loss"], rel=1e-5)  # same rows
    assert row["eval_spearman"] is None
    reward = json.loads((folder / "best/run.json").read_text())["reward"]
    assert (reward["num_pairs"], reward["num_ties"]) == (4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_the_first_step_on_pairs_is_one_on_pairwise_reward_loss(loss, root, data_dir, tmp_path):
    """Where each prompt has one pair, its two responses could as well have come as scored rows."""
    for split in ("rm", "pref"):
        shutil.copytree(data_dir / split, tmp_path / split / "rm")
    options = [f"--loss={loss}", "--max_steps=3", *FAST]
    ours, theirs = (
        rows(run("rm", root, tmp_path / split, *options, ckpt_dir=tmp_path / f"out-{split}"))
        for split in ("pref", "rm")
    )
    for one, other in zip(ours, theirs, strict=True):
        one.pop("tokens_per_second", None), other.pop("tokens_per_second", None)
        assert one == pytest.approx(other, rel=1e-6)


def test_pairs_are_refused_where_scores_are_learned_before_a_model_is_read(tmp_path, clicks_dir):
    scored = {"prompt": "Name it", "response": "A mat.", "score": 9}
    for side in ("train", "eval"):
        folder = shutil.copytree(clicks_dir / "rm", tmp_path / side)
        other = "eval" if side == "train" else "train"
        write_jsonl(folder / f"{other}.jsonl", [scored])
        flags = [f"--data_dir={folder}", "--sft_model_path=nowhere", f"--ckpt_dir={tmp_path}/out"]
        with pytest.raises(InputError) as caught:
            run_rm.main(run_rm.parse_args(flags))
        assert str(caught.value) == (
            f"--loss=regression learns scores, but --data_dir={folder} holds pairs ({side}.jsonl):"
            " choose --loss=pairwise or --loss=listwise, or rows with scores, as .data/rm has them"
        )


def test_a_row_that_is_no_pair_among_pairs_is_named(root, clicks_dir, tmp_path):
    with (clicks_dir / "rm/train.jsonl").open("a") as file:
        file.write('{"prompt": "Name it", "response": "A mat.", "score": 9}\n')
    with pytest.raises(InputError, match=r"train\.jsonl line 5: has no 'chosen'"):
        run("rm", root, clicks_dir, "--loss=pairwise", ckpt_dir=tmp_path / "out")
