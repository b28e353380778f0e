"""Model cards: what they tell is true, the Hub reads their headers, and their code runs."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from transformers import AutoTokenizer

from rlhf.batches import build_batch
from rlhf.cards import data_origin, model_cards
from rlhf.checkpoints import base_model, content_of, save_checkpoint
from rlhf.disk import sha256_of, write_checksums
from rlhf.models import (
    LANGUAGE_MODEL,
    load_policy,
    load_reward_model,
    load_tokenizer,
    reward_logits,
    set_generation_defaults,
)
from rlhf.rewards import pairwise_reward, regression_reward
from rlhf.tokens import decode_response, encode_samples
from tests.families import FAMILIES, save_base
from tests.test_scripts import PPO, epochs, run

CPU = torch.device("cpu")
FAST = ["--max_steps=2", "--learning_rate=1e-3"]
QUICK = ("qwen3", "llama")
SLOWLY = [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in FAMILIES]
FORGETFUL = Version(transformers.__version__) < Version("5.23")
PROMPT = "Name a colour."
REGRESSION = {"loss": "regression", "max_reward": 5.0, "logit_mean": 9.0}
PAIRWISE = {"loss": "pairwise", "max_reward": 2.0, "logit_mean": -0.75}
CLIPPED = {**PAIRWISE, "max_reward": 0.25}

# What a run.json holds, as far as cards read it.
RUN = {
    "stage": "sft",
    "model": "gpt2",
    "arguments": {"seed": 7, "max_len": 96, "max_samples": 0, "use_peft": False},
    "parent": "openai-community/gpt2",
    "parent_content": "8f2a1d65e8ff4ce6b8ba2f0e8c70e2b5ab73cfea5d43b43c2e5d4c4c8d2d6b1f",
    "base_model": "openai-community/gpt2",
    "other_inputs": {},
    "data": {"train.jsonl": "1" * 64, "eval.jsonl": "2" * 64},
    "data_origin": {
        "split": "sft",
        "dataset": "openbmb/UltraFeedback",
        "revision": "40b4365",
        "language": "en",
        "rows": {"train": 20480, "eval": 5120},
    },
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git_commit": None,
    "epoch": 3,
    "metrics": {"eval_loss": 2.25, "eval_perplexity": None},
    "before_training": {"epoch": 0, "eval_loss": 3.5, "eval_perplexity": 33.125},
}


def code_of(card):
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


def execute(folder, monkeypatch):
    """Run the code of the card in a folder, there; returns what it printed, and its names."""
    [code] = code_of((folder / "README.md").read_text())
    names, printed = {}, io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.chdir(folder)
        torch.manual_seed(3)
        exec(code, names)
    return printed.getvalue().removesuffix("\n"), names


def read(folder):
    return ModelCard.load(folder / "README.md")


def plain(cell):
    """The text of a cell as GitHub shows it: a code span has any number of backticks around it."""
    cell = cell.strip().replace(r"\|", "|")
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", lambda m: stripped(m[2]), cell)


def stripped(code):
    padded = code[0] == code[-1] == " " and code.strip()
    return code[1:-1] if padded else code


def cells(card):
    """The rows of all tables of a card, by their first cells."""
    rows = [line for line in card.split("\n") if line.startswith("| ")]
    split = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    return {plain(name): [plain(cell) for cell in row] for name, *row in split}


@pytest.fixture(scope="module")
def lineage(tmp_path_factory, base_path, data_dir):
    root = tmp_path_factory.mktemp("cards")
    run("sft", root, data_dir, f"--model_id={base_path}", "--num_epochs=2", "--learning_rate=1e-3")
    run("rm", root, data_dir, "--loss=listwise", *FAST)
    run(
        "ppo",
        root,
        data_dir,
        *PPO,
        "--max_steps=1",
        "--eval_samples=4",
        "--advantage=rloo",
        "--num_responses=2",
    )
    run("dpo", root, data_dir, "--loss=simpo", *FAST)
    return root


# What a card tells


def test_the_header_is_what_the_hub_expects_of_a_policy(tokenizer, tmp_path):
    (tmp_path / "README.md").write_text(model_cards(RUN, tokenizer, folder=tmp_path)["README.md"])
    assert read(tmp_path).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
        "datasets": ["openbmb/UltraFeedback"],
        "language": "en",
        "tags": ["rlhf", "sft"],
    }


def test_a_data_set_of_ones_own_and_any_language_are_not_in_the_header(tokenizer, tmp_path):
    own = {**RUN["data_origin"], "dataset": "own.jsonl", "revision": None, "language": "any"}
    card = model_cards({**RUN, "data_origin": own}, tokenizer, folder=tmp_path)["README.md"]
    assert not {"datasets", "language"} & ModelCard(card).data.to_dict().keys()
    assert cells(card)["data"][0].startswith(
        "the local file own.jsonl, split sft; 20,480 rows in train.jsonl;"
    )
    assert "Trained on the local file `own.jsonl` and judged" in card


def test_no_header_names_what_is_not_on_the_hub(lineage):
    for stage, tag in (("sft", "sft"), ("ppo", "rloo"), ("dpo", "simpo"), ("rm", "reward-model")):
        kind = "text-classification" if stage == "rm" else "text-generation"
        assert read(lineage / stage / "best").data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": kind,
            "tags": ["rlhf", tag],
        }


def test_a_card_tells_sources_figures_and_arguments(tokenizer, tmp_path):
    other = {"--rm_model_path": {"path": ".model/rm/x", "content": "3" * 64}}
    more = {"other_inputs": other, "arguments": {**RUN["arguments"], "max_samples": 1000}}
    card = model_cards({**RUN, **more}, tokenizer, folder=tmp_path)["README.md"]
    shown = cells(card)
    assert shown["trained from"] == [f"openai-community/gpt2, content {RUN['parent_content']}"]
    assert shown["--rm_model_path"] == [f".model/rm/x, content {'3' * 64}"]
    assert shown["data"] == [
        "[openbmb/UltraFeedback](https://huggingface.co/datasets/openbmb/UltraFeedback) at 40b4365,"
        " split sft; 20,480 rows in train.jsonl; 5,120 rows in eval.jsonl; of train.jsonl"
        " no more than the first 1,000 were used"
    ]
    assert shown["SHA-256 of eval.jsonl"] == ["2" * 64]
    assert shown["versions"] == ["python 3.11.7, torch 2.13.0"] and shown["git commit"] == ["–"]
    assert shown["--max_samples"] == ["1000"] and shown["--use_peft"] == ["false"]
    assert shown["eval_loss"] == ["3.5", "2.25"] and shown["eval_perplexity"] == ["33.125", "–"]
    assert "\n# `gpt2` fine-tuned on responses (sft), epoch 3\n" in card
    assert "Trained on `openbmb/UltraFeedback` and judged" in card and "is not safe" in card


def test_the_content_of_a_hub_id_is_not_told_since_nobody_looked_at_it(tokenizer, tmp_path):
    run = {**RUN, "parent_content": content_of("openai-community/gpt2")}
    shown = cells(model_cards(run, tokenizer, folder=tmp_path)["README.md"])
    assert shown["trained from"] == ["openai-community/gpt2"]


STRANGE = ["a|b", "`", "a`b``c", "``` | ```", "line\nend", " x ", "<b>*_$[x](y)", "\\|", "é\u2028"]


@pytest.mark.parametrize("value", STRANGE)
def test_whatever_an_argument_holds_is_shown_in_its_cell(value, tokenizer, tmp_path):
    run = {**RUN, "arguments": {**RUN["arguments"], "data_dir": value}, "model": value}
    card = model_cards(run, tokenizer, folder=tmp_path)["README.md"]
    expected = value.replace("\n", r"\n").replace("\u2028", r"\u2028")
    assert cells(card)["--data_dir"] == [expected]
    untouched = model_cards(RUN, tokenizer, folder=tmp_path)["README.md"]
    assert len(card.splitlines()) == len(untouched.splitlines()) + 1  # the one more argument


def test_a_path_that_is_no_unicode_is_written_as_in_run_json(gpt2, tokenizer, tmp_path):
    run = {**RUN, "parent": "m\udce4"}
    cards = model_cards(run, tokenizer, folder=tmp_path)
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run=run, cards=cards)
    assert r"`m\udce4`" in (path / "README.md").read_text(encoding="utf-8")


def test_the_same_run_json_writes_the_same_card(lineage):
    for stage in ("sft", "rm", "ppo", "dpo"):
        folder = (lineage / stage / "best").resolve()
        run = json.loads((folder / "run.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        cards = model_cards(run, tokenizer, folder=Path("elsewhere"))
        assert cards == {"README.md": (folder / "README.md").read_text(encoding="utf-8")}


@pytest.mark.parametrize(
    ("stage", "epoch", "figure"),
    [
        ("sft", 2, "eval_loss"),
        ("rm", 1, "eval_accuracy"),
        ("ppo", 1, "eval_kl"),
        ("dpo", 1, "eval_loss"),
    ],
)
def test_figures_are_those_of_the_log(stage, epoch, figure, lineage):
    [folder] = (lineage / stage).glob(f"*_epoch={epoch}_*")
    logged = [f"{x:.5g}" for x in epochs(lineage / stage, figure)]
    assert cells((folder / "README.md").read_text())[figure] == [logged[0], logged[epoch]]


# Where models and data come from


def test_ppo_names_its_reward_model_and_what_that_was(lineage):
    best = (lineage / "rm/best").resolve()
    card = re.sub(" +", " ", (lineage / "ppo/best/README.md").read_text())
    assert f"| `--rm_model_path` | `{best}`, content `{content_of(str(best))}` |\n" in card
    assert f"| trained from | `{(lineage / 'sft/best').resolve()}`, content `" in card


def test_the_model_on_the_hub_is_carried_from_stage_to_stage(tmp_path):
    assert base_model("org/model", flag="--x") == "org/model"
    assert base_model(str(tmp_path), flag="--x") is None
    for text, expected in (('{"base_model": "org/model"}', "org/model"), ('{"model": "m"}', None)):
        (tmp_path / "run.json").write_text(text)
        assert base_model(str(tmp_path), flag="--x") == expected


def test_a_data_set_is_named_if_the_files_are_those_of_the_manifest(data_dir, tmp_path):
    shutil.copytree(data_dir / "sft", tmp_path / "sft")
    digests = {f"{x}.jsonl": sha256_of(tmp_path / f"sft/{x}.jsonl") for x in ("train", "eval")}
    told = {
        x: {"rows": n, "sha256": digests[f"{x}.jsonl"]} for x, n in (("train", 60), ("eval", 20))
    }
    manifest = {"dataset": "org/data", "revision": "abc", "splits": {"sft": told}}
    manifest["arguments"] = {"language": "any"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    expected = {
        "split": "sft",
        "dataset": "org/data",
        "revision": "abc",
        "language": "any",
        "rows": {"train": 60, "eval": 20},
    }
    assert data_origin(f"{tmp_path}/sft/", digests) == expected
    (tmp_path / "manifest.json").write_text(
        json.dumps(manifest | {"dataset": "/home/me/own.jsonl", "revision": None})
    )
    own = {**expected, "dataset": "own.jsonl", "revision": None}
    assert data_origin(f"{tmp_path}/sft", digests) == own
    for name in digests:
        assert data_origin(f"{tmp_path}/sft", {**digests, name: "0" * 64}) == {"split": "sft"}
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"sft": told}}))
    assert data_origin(f"{tmp_path}/sft", digests) == {"split": "sft"}
    (tmp_path / "manifest.json").unlink()
    assert data_origin(f"{tmp_path}/sft", digests) == {"split": "sft"}


def test_a_checkpoint_without_a_card_is_a_parent_as_before(lineage, data_dir, tmp_path):
    old = shutil.copytree(lineage / "sft/best", tmp_path / "sft/best")
    run_json = json.loads((old / "run.json").read_text())
    for name in ("base_model", "other_inputs", "data_origin", "before_training"):
        del run_json[name]
    (old / "run.json").write_text(json.dumps(run_json))
    (old / "README.md").unlink()
    write_checksums(old)
    folder = run("dpo", tmp_path, data_dir, *FAST)
    assert "base_model" not in read(folder / "best").data.to_dict()


# Code that runs


def save_random(name, kind, run, tmp_path):
    """A checkpoint of a family with random weights, and what it is made of."""
    base = save_base(name, tmp_path / "base")
    options = {"flag": "--x", "kind": LANGUAGE_MODEL, "max_len": 96}
    tokenizer = load_tokenizer(base, **options)
    if kind == "rm":
        pad_id = tokenizer.pad_token_id
        model = load_reward_model(base, flag="--x", device=CPU, pad_id=pad_id)
    else:
        model = load_policy(base, flag="--x", device=CPU)
        set_generation_defaults(model, tokenizer)
    cards = model_cards(run, tokenizer, folder=tmp_path / "x")
    path = save_checkpoint(tmp_path, "x", model=model, tokenizer=tokenizer, run=run, cards=cards)
    return path, model, tokenizer


def our_reward(model, tokenizer, reward):
    samples = encode_samples(tokenizer, [PROMPT], ["Blue."], max_len=96, min_len=1)
    pad_id = tokenizer.pad_token_id
    with torch.no_grad():
        logit = reward_logits(model, build_batch(samples, pad_id), pad_id=pad_id)
    if reward["loss"] == "regression":
        return float(regression_reward(logit, max_reward=reward["max_reward"]))
    told = {name: reward[name] for name in ("logit_mean", "max_reward")}
    return float(pairwise_reward(logit, **told))


@pytest.mark.parametrize("reward", [REGRESSION, PAIRWISE, CLIPPED], ids=["mse", "pairs", "clipped"])
@pytest.mark.parametrize("name", SLOWLY)
def test_the_code_of_a_reward_model_gives_the_reward_of_ppo(name, reward, tmp_path, monkeypatch):
    arguments = {**RUN["arguments"], "loss": reward["loss"]}
    run = {**RUN, "stage": "rm", "arguments": arguments, "reward": reward}
    path, model, tokenizer = save_random(name, "rm", run, tmp_path)
    if FORGETFUL and name == "gemma2":
        pytest.skip("before 5.23, transformers forgot Gemma 2's attention cap")
    printed, _ = execute(path, monkeypatch)
    assert float(printed) == pytest.approx(our_reward(model, tokenizer, reward), abs=1e-5)


@pytest.mark.parametrize("name", SLOWLY)
def test_the_code_of_a_policy_prints_the_response_as_people_see_it(name, tmp_path, monkeypatch):
    path, _, tokenizer = save_random(name, "policy", RUN, tmp_path)
    [sample] = encode_samples(tokenizer, [PROMPT], ["Blue."], max_len=96, min_len=1)
    answer = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    monkeypatch.setattr("transformers.GenerationMixin.generate", lambda self, **_: answer)
    printed, names = execute(path, monkeypatch)
    assert names["inputs"]["input_ids"].tolist() == [sample.prompt_ids]
    assert printed == decode_response(tokenizer, sample.response_ids) == "Blue."


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo"])
def test_the_code_of_a_trained_policy_answers(stage, lineage, monkeypatch):
    folder = (lineage / stage / "best").resolve()
    printed, names = execute(folder, monkeypatch)
    told = "" if stage == "ppo" else ", do_sample=True, max_new_tokens=32"
    assert f"model.generate(**inputs{told})[0]" in (folder / "README.md").read_text()
    start = names["inputs"]["input_ids"].shape[1]
    assert start < len(names["ids"]) <= start + (8 if stage == "ppo" else 32)
    assert printed == decode_response(names["tokenizer"], names["ids"][start:].tolist())


def test_the_code_of_a_trained_reward_model_gives_its_own_reward(lineage, monkeypatch):
    folder = (lineage / "rm/best").resolve()
    reward = json.loads((folder / "run.json").read_text())["reward"]
    printed, names = execute(folder, monkeypatch)
    expected = our_reward(names["model"], names["tokenizer"], reward)
    assert float(printed) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_an_adapter_has_a_card_whose_code_gives_the_merged_model(
    data_dir, base_path, tmp_path, monkeypatch
):
    """Paths of a run are counted from where it ran; the code runs in the adapter's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_path, "base")
    lora = ["--use_peft", *FAST]
    run("sft", Path("model"), data_dir, "--model_id=base", *lora)
    run("rm", Path("model"), data_dir, *lora)
    for stage in ("sft", "rm"):
        folder = (tmp_path / "model" / stage / "best").resolve()
        execute(folder, monkeypatch)
        merged = execute(folder, monkeypatch)[1]["model"]
        adapted = execute(folder / "adapter", monkeypatch)[1]["model"]
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            expected = merged(ids).logits
            torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)
        header = read(folder / "adapter").data.to_dict()
        assert header["library_name"] == "peft" and header["tags"][-1] == "lora"
        assert "](adapter/README.md)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("parent", ["org/model", "local/sft"])
def test_an_adapter_names_a_model_on_the_hub_only_if_it_fits_onto_it(parent, tokenizer, tmp_path):
    run = {**RUN, "parent": parent, "base_model": "org/model"}
    run["arguments"] = {**RUN["arguments"], "use_peft": True}
    cards = model_cards(run, tokenizer, folder=tmp_path)
    whole, adapter = (
        ModelCard(cards[x]).data.to_dict() for x in ("README.md", "adapter/README.md")
    )
    assert whole["base_model"] == "org/model"
    assert adapter.get("base_model") == ("org/model" if parent == "org/model" else None)
