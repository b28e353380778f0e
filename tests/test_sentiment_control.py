"""The example of the control token: its reward, its prompts, its log, and all of it in a shell."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from examples.sentiment_control import hub, offline, queries, report, reward
from rlhf.models import load_tokenizer
from rlhf.records import PROMPT, read_split
from rlhf.tokens import decode_response, encode_prompts, ending_ids
from tests.conftest import EOS, build_base_tokenizer, build_gpt2

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "sentiment_control"
PLOT = "The plot is dull. The cast is nice. The pace is slow. The hero"
TEXT = f"Last night we saw a new western. {PLOT} is loud."


@pytest.fixture(scope="module")
def of_words():
    """A tokenizer that has a token for each word of TEXT."""
    return offline.train_tokenizer([TEXT] * 2)


# --- reward


def test_the_reward_of_a_logit_is_what_the_control_token_asks_for():
    controls = ["[negative]", "[neutral]", "[positive]"]
    assert list(reward.REWARDS) == controls
    by_hand = {2.0: [-2.0, 0.0, 2.0], 0.0: [0.0, 4.0, 0.0], -0.5: [0.5, 3.0, -0.5]}
    for x, expected in by_hand.items():
        assert [reward.REWARDS[control](x) for control in controls] == expected


def test_query_and_response_are_classified_without_the_control_token(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(reward, "FOLDER", tmp_path)
    monkeypatch.setattr(reward, "positive_logits", lambda texts: seen.extend(texts) or [1.0, 3.0])
    prompts = ["[negative] We saw", "[neutral] They saw"]
    assert reward.score(prompts, [" it.", "dust."]) == [-1.0, -2.0]
    assert seen == [" We saw it.", " They sawdust."]
    (line,) = (tmp_path / "rewards.jsonl").read_text().splitlines()
    assert json.loads(line) == {"all": -1.5, "[negative]": -1.0, "[neutral]": -2.0}


def test_the_picture_shows_the_rollouts_of_the_run_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    evaluation, stopped, first, second = (
        {"all": mean, "[neutral]": mean + 1} for mean in (0.5, 0.9, 0.7, 0.8)
    )
    log = [evaluation, first, stopped, evaluation, second, evaluation]
    (tmp_path / "rewards.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
    rows = [
        {"step": 0, "epoch": 0, "eval_scores": 0.5},
        {"step": 1, "objective/scores": 0.70000001},  # as float32 has it
        {"step": 2, "objective/scores": 0.79999998},
        {"step": 3, "objective/scores": 0.85},  # whose line is lost
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert report.rollouts(tmp_path) == [{**first, "step": 1}, {**second, "step": 2}]


# --- prompts


def test_a_query_is_the_first_five_tokens_and_the_response_the_next_twenty(of_words):
    query, response = queries.cut(of_words, TEXT)
    assert query == " Last night we saw a"
    assert response == f" new western. {PLOT}"  # 3 tokens, three times 5, and 2


def test_a_text_is_left_out_if_it_is_too_short_or_cut_within_a_character(of_words):
    assert queries.cut(of_words, "Last night we saw a new western.") is None
    assert len(of_words(" 日本").input_ids) == 7  # a space, and three bytes each
    assert queries.cut(of_words, "日本" + TEXT) is None


def test_every_query_comes_with_every_control_token_on_one_side_only(monkeypatch, tmp_path):
    monkeypatch.setattr(queries, "NUM_HELDOUT", 2)
    monkeypatch.setattr(queries, "NUM_TRAIN", 3)
    queries.write_prompts(tmp_path, [f" {x}" for x in "abacdeffg"], random.Random(0))
    prompts = {side: read_split(tmp_path, side, PROMPT) for side in ("train", "eval")}
    expected = {"eval": "ab", "train": "cde"}
    for side, letters in expected.items():
        found = sorted(record["prompt"] for record in prompts[side])
        assert found == sorted(f"{control} {x}" for control in reward.REWARDS for x in letters)


# --- models of others


def test_reviews_and_models_of_others_become_prompts_and_safetensors(monkeypatch, tmp_path):
    """They come in the form that the Hub has: parquet, and weights that need unpickling."""
    torch.manual_seed(0)
    tokenizer = build_base_tokenizer()
    sizes = {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "initializer_range": 0.5}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "pad_token_id": 0}
    config = DistilBertConfig(vocab_size=len(tokenizer), **sizes, **labels)
    models = {
        "gpt2": build_gpt2(tokenizer),
        "bert": DistilBertForSequenceClassification(config).eval(),
    }
    tokenizer.pad_token = EOS
    for name, model in models.items():
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        tokenizer.save_pretrained(tmp_path / name)
    reviews = [f"{word}<br /><br />sat on the mat. {PLOT}" for word in ("A", "The", "No", "My")]
    (tmp_path / "imdb").mkdir()
    Dataset.from_dict({"text": reviews, "label": [0, 1, 0, 1]}).to_parquet(
        tmp_path / "imdb" / "train-00000-of-00001.parquet"
    )
    monkeypatch.setattr(queries, "NUM_HELDOUT", 1)
    paths = {name: str(tmp_path / name) for name in ("imdb", "gpt2", "bert")}
    hub.main(
        Namespace(
            seed=1,
            data_dir=tmp_path / "data",
            model_dir=tmp_path / "model",
            reviews=paths["imdb"],
            policy=paths["gpt2"],
            classifier=paths["bert"],
        )
    )
    prompts = [x["prompt"] for x in read_split(tmp_path / "data" / "ppo", "train", PROMPT)]
    assert len(prompts) == 9 and not any("br" in prompt for prompt in prompts)
    for name in ("policy", "classifier"):
        assert (tmp_path / "model" / name / "model.safetensors").is_file()

    # The policy's own form of a text is the text: nothing before, between or after but EOS.
    prepared = load_tokenizer(
        str(tmp_path / "model" / "policy"), flag="", kind="a language model", max_len=64
    )
    assert encode_prompts(prepared, prompts) == tokenizer(prompts).input_ids
    assert ending_ids(prepared) == [tokenizer.eos_token_id]
    assert decode_response(prepared, tokenizer(" a dog").input_ids) == " a dog"

    # The second of two labels is the positive one, whatever else is in the batch.
    monkeypatch.setattr(reward, "FOLDER", tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / "classifier")
    texts = ["A dog", TEXT]
    with torch.no_grad():
        alone = [float(model(torch.tensor([tokenizer(x).input_ids])).logits[0, 1]) for x in texts]
    assert reward.positive_logits([f" {x}" for x in texts]) == pytest.approx(alone, abs=1e-5)


# --- from a shell

RECORDING = """#!/bin/sh
[ "$1" = - ] || echo "$SENTIMENT_DIR $*" >>RECORD
"""


def test_with_hub_everything_lies_in_folders_of_its_own(tmp_path):
    python = tmp_path / "python"
    python.write_text(RECORDING.replace("RECORD", str(tmp_path / "record")))
    python.chmod(0o755)
    script = FOLDER / "exec_sentiment_control.sh"
    environment = {**os.environ, "PYTHON": str(python)}
    subprocess.run(["sh", script, "--hub", "--seed=7"], cwd=tmp_path, env=environment, check=True)
    _, prepare, ppo, tell = (tmp_path / "record").read_text().splitlines()
    assert prepare.startswith(".model/sentiment-imdb -m examples.sentiment_control.hub ")
    assert ppo.startswith(".model/sentiment-imdb run_ppo.py ")
    assert " --sft_model_path=.model/sentiment-imdb/policy " in ppo
    assert tell.startswith(".model/sentiment-imdb -m examples.sentiment_control.report ")
    assert tell.endswith(" --data_dir=.data/sentiment-imdb/ppo --seed=7")
    assert "sentiment/" not in prepare + ppo + tell


FILES = ("exec_setup.sh", "requirements.txt", "constraints.txt", "run_sft.py", "run_ppo.py")
SHORT = """#!/bin/sh
# Python, with less to do.
case "$*" in
    run_sft.py*) exec PYTHON "$@" --num_epochs=2 ;;
    run_ppo.py*) exec PYTHON "$@" --max_steps=16 --learning_rate=1e-3 ;;
esac
exec PYTHON "$@"
"""


@pytest.mark.slow
def test_the_offline_example_teaches_every_control_token_something(tmp_path):
    for name in ("examples", "rlhf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(SHORT.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    script = tmp_path / "examples" / "sentiment_control" / "exec_sentiment_control.sh"
    result = subprocess.run(
        ["sh", str(script), "--seed=7"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    gains = dict(re.findall(r"^\| `(\S+)` .* (\S+) sd \|$", result.stdout, flags=re.MULTILINE))
    assert list(gains) == list(reward.REWARDS)
    assert min(map(float, gains.values())) > 0.3, gains
    log = (tmp_path / ".model" / "sentiment" / "rewards.jsonl").read_text().splitlines()
    assert len(log) > 12
    assert (tmp_path / ".model" / "sentiment" / "rewards.png").stat().st_size > 10_000
