"""The scripts as a user runs them, on a tiny model: results, files, and their use elsewhere."""

import json
import math
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import run_dpo
import run_ppo
import run_rm
import run_sft
from rlhf import actors
from rlhf.batches import build_batch, epoch_order
from rlhf.disk import write_checksums
from rlhf.errors import InputError, RunError
from rlhf.models import load_reward_model, reward_logits
from rlhf.optim import optimizer_step
from rlhf.rewards import regression_reward
from rlhf.tokens import encode_samples
from tests.conftest import write_jsonl
from tests.test_trackers import events

SCRIPTS = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo, "dpo": run_dpo}
SPLITS = {"sft": "sft", "rm": "rm", "ppo": "pref", "dpo": "pref"}
BOTH = ["--sft_model_path=x", "--rm_model_path=y"]
RM = ["--learning_rate=3e-3", "--batch_size=4", "--num_epochs=3"]
PPO = ["--temperature=1", "--top_k=0", "--max_new_tokens=8", "--learning_rate=1e-4"]


def run(stage, root, data_dir, *options, ckpt_dir=None):
    """Run a stage in this process; returns its checkpoint folder."""
    ckpt_dir = Path(ckpt_dir or root / stage)
    parents = {
        "sft": [],
        "rm": [f"--sft_model_path={root}/sft/best"],
        "ppo": [f"--sft_model_path={root}/sft/best", f"--rm_model_path={root}/rm/best"],
        "dpo": [f"--sft_model_path={root}/sft/best"],
    }[stage]
    common = [f"--data_dir={data_dir}/{SPLITS[stage]}", f"--ckpt_dir={ckpt_dir}", "--max_len=64"]
    script = SCRIPTS[stage]
    script.main(script.parse_args([*common, *parents, *options]))
    return ckpt_dir


@pytest.fixture(scope="module")
def lineage(tmp_path_factory, base_path, data_dir):
    """All four stages, run once: enough steps to learn something."""
    root = tmp_path_factory.mktemp("model")
    run("sft", root, data_dir, f"--model_id={base_path}", "--learning_rate=3e-3", "--num_epochs=4")
    run("rm", root, data_dir, *RM)
    run("ppo", root, data_dir, *PPO, "--eval_samples=4")
    run("dpo", root, data_dir, "--learning_rate=1e-3", "--num_epochs=2", "--log_step=1")
    return root


def rows(ckpt_dir):
    return [json.loads(line) for line in (ckpt_dir / "metrics.jsonl").read_text().splitlines()]


def epochs(ckpt_dir, name):
    return [row[name] for row in rows(ckpt_dir) if name in row]


# What each stage writes and learns


def test_every_epoch_leaves_a_checkpoint_and_best_is_the_lowest(lineage):
    for stage, figure in (("sft", "loss"), ("rm", "loss"), ("dpo", "loss")):
        losses = epochs(lineage / stage, "eval_loss")
        names = sorted(p.name for p in (lineage / stage).glob("gpt2-tiny_*"))
        expected = [
            f"gpt2-tiny_{stage}_epoch={epoch}_{figure}={loss:.4f}"
            for epoch, loss in enumerate(losses)
            if epoch > 0
        ]
        assert names == sorted(expected)
        assert os.readlink(lineage / stage / "best") == expected[losses[1:].index(min(losses[1:]))]


def test_sft_learns(lineage):
    losses = epochs(lineage / "sft", "eval_loss")
    assert losses[-1] < 0.5 * losses[0]
    assert epochs(lineage / "sft", "eval_perplexity")[-1] == pytest.approx(math.exp(losses[-1]))


@pytest.mark.claim(8)
def test_reward_model_ranks_and_reports_its_statistics(lineage):
    assert epochs(lineage / "rm", "eval_accuracy")[-1] == 1.0
    row = [row for row in rows(lineage / "rm") if "eval_loss" in row][-1]
    assert row["longer_is_better"] == 1.0
    assert row["eval_spearman"] > 0.8
    reward = json.loads((lineage / "rm/best/run.json").read_text())["reward"]
    assert reward["loss"] == "regression" and reward["max_reward"] == 5.0
    assert reward["num_pairs"] == 10 and reward["num_ties"] == 0
    for name in ("logit_mean", "logit_std", "reward_mean", "reward_std"):
        assert math.isfinite(reward[name])


@pytest.mark.claim(19)
def test_ppo_logs_every_name(lineage):
    row = next(row for row in rows(lineage / "ppo") if "val/ratio" in row)
    objective = {f"objective/{x}" for x in ("kl", "entropy", "scores", "rlhf_reward")}
    policy = {f"policy/{x}" for x in ("approxkl_avg", "clipfrac_avg", "entropy_avg")}
    rest = {
        "objective/non_score_reward",
        "loss/policy_avg",
        "loss/value_avg",
        "val/ratio",
        "val/clipfrac_avg",
        "val/num_eos_tokens",
        "response_length",
        "eos_rate",
        "kept_mass",
        "lr",
        "epoch",
        "step",
        "tokens_per_second",
    }
    assert objective | policy | rest <= row.keys()
    assert all(value is not None for value in row.values())


@pytest.mark.slow
@pytest.mark.claim(19)
def test_ppo_shows_samples_with_score_and_kl(lineage, data_dir, tmp_path, capsys):
    run("ppo", lineage, data_dir, *PPO, "--max_steps=1", ckpt_dir=tmp_path)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    '")]
    assert len(shown) == 3 and all("score" in line and "kl" in line for line in shown)


@pytest.mark.claim(20)
def test_ppo_judges_the_policy_before_training_too(lineage):
    judged = [row for row in rows(lineage / "ppo") if "eval_scores" in row]
    assert [row["epoch"] for row in judged] == [0, 1]
    # Untrained, it differs from the reference only in that its first token may not end.
    assert abs(judged[0]["eval_kl"]) < 0.2
    for row in judged:
        balance = row["eval_scores"] - 0.2 * row["eval_kl"]
        assert row["eval_objective"] == pytest.approx(balance, abs=1e-5)
    name = os.readlink(lineage / "ppo/best")
    assert name == f"gpt2-tiny_ppo_epoch=1_reward={judged[1]['eval_scores']:.2f}"


@pytest.mark.claim(21, 23)
def test_dpo_starts_at_ln_2_and_learns(lineage):
    first, *_, last = [row for row in rows(lineage / "dpo") if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["loss"] < 0.6 and last["rewards/accuracies"] > 0.9
    names = {f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")}
    assert names | {"logps/chosen", "logps/rejected"} <= first.keys()
    assert first["logps/chosen"] < 0 and first["logps/rejected"] < 0
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(margin, abs=1e-5)


def plain_logprob(model, tokenizer, prompt, response):
    """Log-probability of a response by nothing but transformers: labels of -100 on the prompt."""
    form = f"<instruction>{prompt}</instruction><response>"
    prompt_ids = tokenizer(form).input_ids
    ids = tokenizer(f"{form}{response}</response><|endoftext|>").input_ids
    labels = [-100] * len(prompt_ids) + ids[len(prompt_ids) :]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    return -float(loss) * (len(ids) - len(prompt_ids))


@pytest.mark.claim(21, 23)
def test_dpo_tells_chosen_from_rejected_as_plain_transformers_does(lineage, data_dir):
    pairs = [json.loads(x) for x in (data_dir / "pref/eval.jsonl").read_text().splitlines()]
    judged = [row for row in rows(lineage / "dpo") if "eval_loss" in row]
    for folder, row in ((lineage / "sft/best", judged[0]), (lineage / "dpo/best", judged[-1])):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in ("chosen", "rejected"):
            logprobs = [plain_logprob(model, tokenizer, p["prompt"], p[name]) for p in pairs]
            mean = sum(logprobs) / len(logprobs)
            assert row[f"eval_logps/{name}"] == pytest.approx(mean, rel=1e-4)


def test_run_json_tells_the_lineage(lineage):
    for stage, parent in (("rm", "sft"), ("ppo", "sft"), ("dpo", "sft")):
        facts = json.loads((lineage / stage / "best/run.json").read_text())
        assert facts["stage"] == stage and facts["model"] == "gpt2-tiny"
        assert facts["parent"] == os.path.realpath(lineage / parent / "best")
        assert facts["arguments"]["seed"] == 42 and len(facts["data"]["train.jsonl"]) == 64
        assert {"torch", "transformers", "python"} <= facts["versions"].keys()


# What plain transformers makes of the checkpoints


def test_policies_load_and_answer_in_transformers(lineage, tokenizer):
    for stage in ("sft", "ppo", "dpo"):
        path = lineage / stage / "best"
        model = AutoModelForCausalLM.from_pretrained(path)
        theirs = AutoTokenizer.from_pretrained(path)
        ids = theirs.apply_chat_template(
            [{"role": "user", "content": "Name the cat"}],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        assert theirs.decode(ids[0]) == "<instruction>Name the cat</instruction><response>"
        answer = model.generate(ids, max_new_tokens=20, max_length=None)[0, ids.shape[1] :]
        assert 0 < len(answer) <= 20
    config = model.generation_config
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.claim(10)
def test_ppo_checkpoint_samples_as_the_rollouts_did(lineage, data_dir, tmp_path):
    options = ["--temperature=0.6", "--top_k=7", "--top_p=0.9", "--max_new_tokens=9"]
    run("ppo", lineage, data_dir, *options, "--max_steps=1", ckpt_dir=tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "best").generation_config
    settings = (config.do_sample, config.temperature, config.top_k, config.top_p)
    assert settings == (True, 0.6, 7, 0.9) and config.max_new_tokens == 9


@pytest.mark.claim(7)
def test_pipeline_gives_the_reward_that_ppo_uses(lineage, tokenizer):
    path = str(lineage / "rm/best")
    plain = AutoModelForSequenceClassification.from_pretrained(path)
    assert plain.config.num_labels == 1 and plain.config.problem_type is None
    model = load_reward_model(path, flag="--x", device=torch.device("cpu"), pad_id=0)
    samples = encode_samples(tokenizer, ["Name the cat"], ["A cat."], max_len=64, min_len=1)
    logits = reward_logits(model, build_batch(samples, 0), pad_id=0)
    reward = float(regression_reward(logits.detach(), max_reward=5.0))
    text = "<instruction>Name the cat</instruction><response>A cat.</response><|endoftext|>"
    score = pipeline("text-classification", model=path, device="cpu")(text)[0]["score"]
    assert 1 + 4 * score == pytest.approx(reward, abs=1e-5)


# What must change nothing


@pytest.fixture
def first_step(lineage, base_path, data_dir, tmp_path, monkeypatch):
    """Run a stage for a step; gives all gradients, as they were before clipping, and the log."""
    gradients = []

    def watched(schedules, loss, **options):
        groups = [group for s in schedules for group in s.optimizer.param_groups]
        parts = [p.grad.flatten() for group in groups for p in group["params"]]
        gradients.append(torch.cat(parts).clone())
        return optimizer_step(schedules, loss, **options)

    def step(stage, *options):
        monkeypatch.setattr(SCRIPTS[stage], "optimizer_step", watched)
        gradients.clear()
        options = ["--max_steps=1", *options]
        options += [f"--model_id={base_path}"] if stage == "sft" else []
        options += [*PPO, "--batch_size=7", "--minibatch_size=5"] if stage == "ppo" else []
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run(stage, lineage, data_dir, *options, ckpt_dir=folder)
        return gradients[0], next(row for row in rows(folder) if "lr" in row)

    return step


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


SLOW_DPO, SLOW_PPO = (pytest.param(x, marks=pytest.mark.slow) for x in ("dpo", "ppo"))


@pytest.mark.claim(5, 16)
@pytest.mark.parametrize("stage", ["sft", "rm", SLOW_DPO, SLOW_PPO])
def test_micro_batch_size_changes_memory_and_not_the_gradient(stage, first_step):
    expected, log = first_step(stage)
    for size in (1, 3):
        gradient, other_log = first_step(stage, f"--micro_batch_size={size}")
        # Rounding: in float64 the same gradients agree to 1e-15.
        assert distance(gradient, expected) <= 1e-5
        for name in log.keys() - {"tokens_per_second", "explained_variance"}:
            assert other_log[name] == pytest.approx(log[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", SLOW_PPO])
def test_gradient_checkpointing_changes_memory_and_not_the_gradient(stage, first_step, monkeypatch):
    expected, _ = first_step(stage)
    checkpointed = mock.Mock(side_effect=checkpoint)
    monkeypatch.setattr("rlhf.models.checkpoint", checkpointed)
    gradient, _ = first_step(stage, "--gradient_checkpointing")
    assert distance(gradient, expected) <= 1e-6 and checkpointed.called


@pytest.mark.slow
def test_compiling_changes_time_and_not_the_gradient(first_step, capsys):
    expected, _ = first_step("sft")
    assert "compiling: " not in capsys.readouterr().out
    gradient, _ = first_step("sft", "--compile")
    assert distance(gradient, expected) <= 1e-5
    assert "compiling: the first steps are slow\n" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "rm", SLOW_DPO, SLOW_PPO])
def test_same_command_gives_the_same_bytes(stage, lineage, base_path, data_dir, tmp_path):
    options = [f"--model_id={base_path}", "--dropout=0.1"] if stage == "sft" else []
    options += ["--max_steps=3", *(PPO if stage == "ppo" else [])]
    first, second = (
        run(stage, lineage, data_dir, *options, ckpt_dir=tmp_path / name) for name in "ab"
    )
    assert (first / "best/model.safetensors").read_bytes() == (
        second / "best/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_a_tracker_changes_no_number_and_shows_numbers_and_texts(
    stage, lineage, base_path, data_dir, tmp_path
):
    options = [f"--model_id={base_path}", "--dropout=0.1"] if stage == "sft" else []
    options += ["--max_steps=3", "--log_step=1", *(PPO if stage == "ppo" else [])]
    plain, told = (
        run(stage, lineage, data_dir, *options, *more, ckpt_dir=tmp_path / name)
        for name, more in (("plain", []), ("told", ["--report_to=tensorboard"]))
    )
    assert (plain / "best/model.safetensors").read_bytes() == (
        told / "best/model.safetensors"
    ).read_bytes()
    found = events(told / "rlhf")
    for name in {name for row in rows(plain) for name in row} - {"step", "tokens_per_second"}:
        logged = [(row["step"], row[name]) for row in rows(plain) if name in row]
        assert [step for step, _ in found[name]] == [step for step, _ in logged], name
        expected = [math.nan if value is None else value for _, value in logged]
        assert [x for _, x in found[name]] == pytest.approx(expected, nan_ok=True), name
    fields = {"rm": ["reward", "target"], "ppo": ["score", "kl"]}.get(stage, ["in the data"])
    for number in (1, 2, 3):
        steps, texts = zip(*found[f"samples/{number}"], strict=True)
        assert steps == (0, rows(plain)[-1]["step"])
        for field in ("prompt", "response", *fields):
            assert all(f"**{field}**" in text for text in texts)


@pytest.mark.claim(5)
def test_sft_gradient_is_the_mean_over_tokens_and_not_over_sequences(base_path, data_dir, tmp_path):
    """One step of our script against the plain loss of transformers on the same batch."""
    folder = run(
        "sft",
        tmp_path,
        data_dir,
        f"--model_id={base_path}",
        "--max_steps=1",
        "--batch_size=16",
        "--micro_batch_size=3",
        "--warmup_ratio=0",
    )
    ours = next(row for row in rows(folder) if "loss" in row)
    tokenizer = AutoTokenizer.from_pretrained(folder / "best")
    records = [json.loads(x) for x in (data_dir / "sft/train.jsonl").read_text().splitlines()]
    samples = encode_samples(
        tokenizer,
        [r["prompt"] for r in records],
        [r["response"] for r in records],
        max_len=64,
        min_len=1,
    )
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in samples]
    order = epoch_order(lengths, 16, seed=42, epoch=1)[0]
    model = AutoModelForCausalLM.from_pretrained(base_path).eval()
    total, num_tokens = 0.0, 0
    for row in order:
        prompt, response = samples[row]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
        total, num_tokens = total + losses, num_tokens + len(response)
    (total / num_tokens).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert ours["loss"] == pytest.approx(float(total) / num_tokens, abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.slow
@pytest.mark.claim(22)
def test_reference_logprobs_are_computed_once(lineage, data_dir, tmp_path, monkeypatch):
    calls = []
    real = run_dpo.all_logprobs
    monkeypatch.setattr(run_dpo, "all_logprobs", lambda *a: calls.append(1) or real(*a))
    run("dpo", lineage, data_dir, "--num_epochs=2", ckpt_dir=tmp_path)
    assert len(calls) == 2 + 3  # reference: train and eval; policy: epochs 0, 1, 2
    calls.clear()
    run("dpo", lineage, data_dir, "--max_steps=1", ckpt_dir=tmp_path)
    assert len(calls) == 2  # the stored ones still hold; policy: epochs 0, 1
    calls.clear()
    run("dpo", lineage, data_dir, "--max_steps=1", "--max_samples=20", ckpt_dir=tmp_path)
    assert len(calls) == 4  # other pairs: computed anew


def test_epoch_counts_what_is_done_of_a_capped_run(lineage, data_dir, tmp_path):
    run(
        "rm",
        lineage,
        data_dir,
        "--batch_size=7",
        "--max_steps=3",
        "--log_step=1",
        ckpt_dir=tmp_path,
    )
    logged = [row["epoch"] for row in rows(tmp_path) if "loss" in row]
    assert logged == pytest.approx([1 / 9, 2 / 9, 3 / 9], abs=1e-4)  # 60 rows: 9 batches


def test_ppo_needs_prompts_only_and_a_reward_that_works(lineage, data_dir, tmp_path):
    for side in ("train", "eval"):
        write_jsonl(tmp_path / f"pref/{side}.jsonl", [{"prompt": "Name it"}, {"prompt": "Draw it"}])
    options = [*PPO, f"--data_dir={tmp_path}/pref"]
    run("ppo", lineage, data_dir, *options, ckpt_dir=tmp_path / "ppo")
    with pytest.raises(RunError, match="raised AssertionError"):
        bad = "--reward_fn=tests.test_scripts:refuse"
        run("ppo", lineage, data_dir, *options, bad, ckpt_dir=tmp_path / "ppo")
    assert (tmp_path / "ppo/best").exists() and not (tmp_path / "ppo/earlier").exists()


def refuse(prompts, responses):
    raise AssertionError("never")


def test_earlier_run_is_moved_whole(lineage, data_dir, tmp_path, capsys):
    for steps in (1, 2, 1):
        run("dpo", lineage, data_dir, f"--max_steps={steps}", ckpt_dir=tmp_path)
    assert "is now in" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "earlier/1", tmp_path / "earlier/2"):
        assert (folder / "best/model.safetensors").is_file()
        assert (folder / "metrics.jsonl").is_file() and (folder / "training.png").is_file()


@pytest.mark.claim(16)
def test_minibatches_are_reshuffled_every_inner_epoch(lineage, data_dir, tmp_path, monkeypatch):
    seen = []
    real = run_ppo.micro_batches_by_length

    def watched(batch, rows, size):
        seen.append(list(rows))
        return real(batch, rows, size)

    monkeypatch.setattr(run_ppo, "micro_batches_by_length", watched)
    run(
        "ppo",
        lineage,
        data_dir,
        *PPO,
        "--max_steps=1",
        "--minibatch_size=8",
        "--num_inner_epoch=3",
        ckpt_dir=tmp_path,
    )
    assert [len(minibatch) for minibatch in seen] in ([8, 8] * 3, [8, 6] * 3)
    epochs_seen = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(len(rows))) for rows in epochs_seen)
    assert len({tuple(rows) for rows in epochs_seen}) == 3


@pytest.mark.claim(20)
def test_best_of_ppo_is_highest_score_less_beta_times_kl(lineage, data_dir, tmp_path, monkeypatch):
    judged = iter([(3.0, 0.0), (4.0, 1.0), (5.0, 9.0), (3.9, 0.4)])  # score, KL

    def evaluate(*_):
        score, kl = next(judged)
        return {"eval_scores": score, "eval_kl": kl, "eval_objective": score - 0.2 * kl}, []

    monkeypatch.setattr(run_ppo, "evaluate", evaluate)
    folder = run("ppo", lineage, data_dir, *PPO, "--num_outer_epoch=3", ckpt_dir=tmp_path)
    assert os.readlink(folder / "best") == "gpt2-tiny_ppo_epoch=3_reward=3.90"


# Variants


@pytest.mark.slow
def test_pairwise_reward_model_feeds_ppo(lineage, data_dir, tmp_path):
    rm = run("rm", lineage, data_dir, "--loss=pairwise", *RM, ckpt_dir=tmp_path / "rm")
    assert epochs(rm, "eval_accuracy")[-1] == 1.0
    # Centred, but for what is clipped to +-max_reward.
    assert epochs(rm, "reward_mean")[0] == pytest.approx(0.0, abs=1e-5)
    run("ppo", lineage, data_dir, *PPO, f"--rm_model_path={rm}/best", ckpt_dir=tmp_path / "ppo")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--critic=shared"],
        ["--value_clip=0.2", "--minibatch_size=5"],
        ["--do_sampling=false"],
        ["--top_p=0.8", "--top_k=9", "--temperature=0.3"],
        ["--reward_fn=tests.test_scripts:count_a", "--missing_eos_penalty=0"],
        ["--dtype=bfloat16"],
    ],
)
def test_ppo_variants_run(options, lineage, data_dir, tmp_path):
    folder = run("ppo", lineage, data_dir, *PPO, "--max_steps=2", *options, ckpt_dir=tmp_path)
    assert math.isfinite(epochs(folder, "eval_scores")[-1])


def count_a(prompts, responses, ended):
    assert len(prompts) == len(responses) == len(ended)
    return [float(response.count("a")) for response in responses]


@pytest.mark.claim(12)
def test_missing_eos_costs_the_penalty(lineage, data_dir, tmp_path):
    scores = []
    for penalty in (0, 3):
        folder = run(
            "ppo",
            lineage,
            data_dir,
            "--temperature=1",
            "--top_k=0",
            "--max_new_tokens=1",  # no response can end: the first token may not be EOS
            "--max_steps=1",
            f"--missing_eos_penalty={penalty}",
            ckpt_dir=tmp_path / str(penalty),
        )
        scores.append(epochs(folder, "eval_scores")[0])
        assert epochs(folder, "eos_rate") == [0.0]
    assert scores[0] - scores[1] == pytest.approx(3.0, abs=1e-5)


# What stops a run


@pytest.mark.claim(9)
def test_dropout_left_on_in_ppo_stops_it(lineage, data_dir, tmp_path, monkeypatch):
    real = actors.load_policy
    monkeypatch.setattr(actors, "load_policy", lambda *a, **k: real(*a, **k, dropout=0.1).train())
    with pytest.raises(RunError, match="off 1 by"):
        run("ppo", lineage, data_dir, *PPO, ckpt_dir=tmp_path)


@pytest.mark.claim(21)
def test_dropout_left_on_in_dpo_stops_it(lineage, data_dir, tmp_path, monkeypatch):
    real = run_dpo.load_policy
    monkeypatch.setattr(run_dpo, "load_policy", lambda *a, **k: real(*a, **k, dropout=0.1).train())
    with pytest.raises(RunError, match="not ln 2"):
        run("dpo", lineage, data_dir, ckpt_dir=tmp_path)


@pytest.mark.claim(25)
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_divergence_stops_the_run_and_reaches_no_disk(
    stage, lineage, base_path, data_dir, tmp_path
):
    options = [f"--model_id={base_path}"] if stage == "sft" else []
    with pytest.raises(RunError, match="stopped before the update"):
        run(
            stage,
            lineage,
            data_dir,
            *options,
            *(PPO if stage == "ppo" else []),
            "--learning_rate=1e30",
            "--max_gradient_norm=1e30",
            ckpt_dir=tmp_path,
        )
    for path in tmp_path.glob("**/*.safetensors"):  # of the state before training
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert not list(tmp_path.glob("gpt2-tiny*"))


def bad_inputs(lineage, base_path, data_dir, tmp_path):
    """(stage, options, what the one line must say)."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for side in ("train", "eval"):
        (empty / f"{side}.jsonl").touch()
    sft, rm = f"{lineage}/sft/best", f"{lineage}/rm/best"
    yield "sft", [f"--model_id={base_path}", "--data_dir=nowhere"], "exec_load_dataset.sh"
    yield "sft", [f"--model_id={base_path}", f"--data_dir={empty}"], "empty"
    yield "sft", ["--model_id=./nowhere"], "no such checkpoint"
    yield "sft", [f"--model_id={data_dir}"], "is not a checkpoint"
    yield "sft", [f"--model_id={base_path}", "--max_len=4"], "--max_len=4"
    yield "sft", [f"--model_id={base_path}", "--max_len=4096"], "128 positions"
    yield "sft", [f"--model_id={rm}"], "is a reward model"
    yield "sft", [f"--model_id={base_path}", "--report_to=wandb"], "wandb"
    yield (
        "sft",
        [f"--model_id={base_path}", "--chat_template=no.jinja"],
        "=no.jinja: cannot be read",
    )
    yield "rm", ["--sft_model_path=REQUIRED"], "REQUIRED"
    yield "rm", [f"--sft_model_path={rm}"], "is a reward model"
    yield "sft", [f"--model_id={base_path}", f"--data_dir={data_dir}/pref"], "response"
    yield "rm", [f"--data_dir={data_dir}/pref"], "holds pairs (train.jsonl): choose --loss="
    yield "ppo", [f"--rm_model_path={sft}"], "must be a reward model"
    yield "ppo", [f"--sft_model_path={rm}"], "must be a language model"
    yield "ppo", ["--max_reward=7"], "--max_reward=7"
    yield "ppo", ["--reward_fn=nowhere.py:f"], "--reward_fn"
    yield "dpo", [f"--sft_model_path={lineage}/sft"], "is not a checkpoint"
    yield "dpo", ["--resume=must"], "--resume=must"


def test_bad_input_is_one_error_before_any_model_is_loaded(
    lineage, base_path, data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.models.load_weights", lambda *a: pytest.fail("a model was loaded"))
    for stage, options, message in bad_inputs(lineage, base_path, data_dir, tmp_path):
        with pytest.raises(InputError) as caught:
            run(stage, lineage, data_dir, *options, ckpt_dir=tmp_path / "out")
        assert message in str(caught.value), options
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", ["--learning_rate=0"]),
        ("sft", ["--learning_rate=nan"]),
        ("sft", ["--unknown=1"]),
        ("sft", ["--num_epoch=1"]),
        ("sft", ["--warmup_ratio=1.5"]),
        ("rm", []),
        ("rm", ["--max_reward=1"]),
        ("ppo", ["--temperature=0"]),
        ("ppo", ["--top_p=0"]),
        ("ppo", []),
        ("ppo", ["--sft_model_path=x"]),
        ("ppo", ["--sft_model_path=x", "--reward_fn="]),
        ("ppo", [*BOTH, "--min_gen_len=9", "--max_new_tokens=8"]),
        ("sft", ["--data_dir="]),
        ("dpo", ["--beta=0"]),
        ("dpo", ["--loss=unknown"]),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(stage, options, capsys):
    if stage in ("rm", "dpo") and options:
        options = ["--sft_model_path=x", *options]
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[stage].parse_args(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error:" in error


def test_reward_model_of_another_tokenizer_is_refused(lineage, data_dir, tmp_path):
    other = tmp_path / "rm"
    shutil.copytree(lineage / "rm/best", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"Ġ', '"Ä'))
    write_checksums(other)
    with pytest.raises(InputError, match="tokenizer, chat template or pad token differs"):
        run("ppo", lineage, data_dir, f"--rm_model_path={other}", ckpt_dir=tmp_path / "out")
