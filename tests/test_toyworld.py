"""The toy world is what its pages say: the language, the gold reward, the rows, the base model."""

import base64
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    pipeline,
)

from rlhf.disk import write_checksums
from rlhf.errors import InputError
from rlhf.lineage import Run
from rlhf.records import PAIR, SCORED, read_split
from rlhf.templates import prepare_tokenizer
from rlhf.tokens import encode_samples
from toyworld import gold_reward, pairs, report
from toyworld.__main__ import main, parse_args
from toyworld.annotators import ANNOTATORS, RATINGS, annotate, to_score, utility
from toyworld.base_model import build_model, build_tokenizer, save_base_model
from toyworld.measure import (
    EOS_ID,
    Result,
    Sequences,
    load_policy,
    load_reward,
    read_prompts,
    sample,
)
from toyworld.optimum import Exact
from toyworld.rows import build_rows
from toyworld.tables import Verdict, results_rows
from toyworld.world import EOS, MAX_RESPONSE_TOKENS, TAGS, UNKNOWN, VOCABULARY, WORDS, requests

FULL = "greet formal full to ada from bob"
BRIEF = "from bob brief greet to ada formal"


def reward(prompt: str, response: str) -> float:
    return gold_reward([prompt], [response])[0]


# The language


def test_the_vocabulary_has_24_tokens_and_no_word_twice() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 24


def test_clauses_in_any_order_are_the_same_request() -> None:
    orders = Counter(requests().values())
    assert requests()["to ada greet from bob full formal"] == requests()[FULL]
    assert len(orders) == 3 * 2 * 2 * 6  # task, manner, length, who to whom
    assert set(orders.values()) == {120}  # 5! orders of the five clauses


def test_every_prompt_has_exactly_one_best_response() -> None:
    texts = [*VOCABULARY, *(f"{a} {b}" for a in VOCABULARY for b in VOCABULARY)]
    one_prompt_each = {request: prompt for prompt, request in requests().items()}
    for prompt in one_prompt_each.values():
        assert gold_reward([prompt] * len(texts), texts).count(5.0) == 1


# The gold reward


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (FULL, "good-day ada", 5.0),
        (FULL, "hi ada", 4.0),  # manner
        (FULL, "farewell ada", 4.0),  # task
        (FULL, "bye ada", 3.0),  # task and manner
        (FULL, "good-day bob", 4.0),  # the sender instead of the addressee
        (FULL, "good-day eve", 4.0),  # someone else
        (FULL, "good-day", 3.0),  # length, and nobody addressed
        (FULL, "bye", 1.0),  # a phrase that gets nothing right
        (BRIEF, "good-day", 5.0),
        (BRIEF, "hi", 4.0),
        (BRIEF, "thanks", 3.0),
        (BRIEF, "good-day ada", 3.0),  # an extra word costs length and address
        (BRIEF, "good-day bob", 3.0),
        (BRIEF, "thanks bob", 1.0),
        (FULL, " good-day  ada ", 5.0),  # spaces don't matter
        (FULL, "", 1.0),  # from here on: not a phrase with at most one name
        (FULL, "ada", 1.0),
        (FULL, "ada good-day", 1.0),
        (FULL, "good-day hi", 1.0),
        (FULL, "good-day good-day", 1.0),
        (FULL, "good-day ada ada", 1.0),
        (FULL, "good-day ada</response>", 1.0),
        (FULL, "good-day ada </response>", 1.0),
        (FULL, f"good-day {EOS}", 1.0),
        (FULL, "Good-day ada", 1.0),
        (FULL, "good-day to", 1.0),
        ("greet formal", "good-day", 1.0),  # from here on: not a prompt of this world
        ("greet formal full to ada from ada", "good-day ada", 1.0),
        ("", "", 1.0),
    ],
)
def test_gold_reward_by_hand(prompt: str, response: str, expected: float) -> None:
    assert reward(prompt, response) == expected


def test_gold_reward_gives_any_text_a_number_from_1_to_5() -> None:
    rng = random.Random(0)
    prompts = rng.choices(list(requests()), k=3000)
    texts = [" ".join(rng.choices(VOCABULARY, k=rng.randrange(4))) for _ in range(2000)]
    texts += [
        "".join(map(chr, rng.choices(range(0xD000), k=rng.randrange(9)))) for _ in texts[:500]
    ]
    texts += [" ".join(rng.choices(WORDS[-6:], k=1) + rng.choices(WORDS, k=1)) for _ in texts[:500]]
    rewards = gold_reward(prompts, texts) + gold_reward(texts, texts)
    assert len(rewards) == 6000
    assert set(rewards) == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_gold_reward_wants_as_many_responses_as_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        gold_reward([FULL, FULL], ["good-day ada"])


def test_importing_the_gold_reward_does_not_import_torch() -> None:
    code = "import sys, toyworld; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The annotators


def test_a_noiseless_score_is_the_gold_reward_moved_to_the_scale_from_1_to_10() -> None:
    scores = [annotate("noiseless", gold, "hi", random.Random(0)) for gold in (1, 2, 3, 4, 5)]
    assert [score["overall_score"] for score in scores] == [1.0, 3.25, 5.5, 7.75, 10.0]
    assert [score["fine-grained_score"] for score in scores] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_bradley_terry_noise_prefers_by_the_exponential_of_the_gold_reward() -> None:
    rng = random.Random(0)
    firsts, wins = 0, 0
    for _ in range(20_000):
        a, b, c = (utility("bradley-terry", gold, "hi", rng) for gold in (4.0, 3.5, 3.5))
        wins += a > b
        firsts += a > max(b, c)
    # 1 / (1 + e^(-0.5 / 0.5)), and the same against two: 1 / (1 + 2 e^(-1)); 4 standard errors.
    assert wins / 20_000 == pytest.approx(0.7311, abs=0.0126)
    assert firsts / 20_000 == pytest.approx(0.5761, abs=0.0140)


def test_noise_beyond_the_scale_is_clipped_to_it() -> None:
    assert [to_score("bradley-terry", value) for value in (-1.5, 4.0, 9.5)] == [1.0, 5.5, 10.0]


def test_only_the_length_biased_annotator_prefers_a_name_where_a_brief_answer_was_asked() -> None:
    def score(annotator: str, response: str) -> float:
        gold = reward(BRIEF, response)
        return annotate(annotator, gold, response, random.Random(0))["overall_score"]

    assert score("noiseless", "good-day") > score("noiseless", "good-day ada")
    assert score("length-biased", "good-day") < score("length-biased", "good-day ada")
    # It still knows better from worse among answers of one length.
    assert score("length-biased", "good-day ada") > score("length-biased", "hi ada")


# The rows


@pytest.mark.parametrize("annotator", ANNOTATORS)
def test_rows_have_the_schema_of_ultrafeedback(annotator: str) -> None:
    rows = list(build_rows(seed=1, num_prompts=300, annotator=annotator))
    assert len({row["instruction"] for row in rows}) == 300
    assert {row["source"] for row in rows} == {
        "toyworld_greet",
        "toyworld_thank",
        "toyworld_part",
    }
    for row in rows:
        assert row["instruction"] in requests()
        assert [completion["model"] for completion in row["completions"]] == row["models"]
        assert len(row["models"]) == 4
        for completion in row["completions"]:
            ratings = [completion["annotations"][name]["Rating"] for name in RATINGS]
            assert 1 <= completion["overall_score"] <= 10
            assert set(ratings) <= set("12345")
            assert completion["fine-grained_score"] == statistics.mean(map(int, ratings))
            assert 1 <= len(completion["response"].split()) <= MAX_RESPONSE_TOKENS - 2
            assert set(completion["response"].split()) <= set(WORDS)


def test_better_writers_write_better_and_the_best_of_four_is_not_always_perfect() -> None:
    gold = [
        gold_reward([row["instruction"]] * 4, [c["response"] for c in row["completions"]])
        for row in build_rows(seed=1, num_prompts=1000, annotator="noiseless")
    ]
    means = [statistics.mean(column) for column in zip(*gold, strict=True)]
    assert means == sorted(means)
    assert 3.2 < statistics.mean(means) < 3.8
    assert 0.6 < statistics.mean(max(four) == 5.0 for four in gold) < 0.9


def test_another_annotator_scores_the_same_answers() -> None:
    def texts(annotator: str) -> list[tuple[str, list[str]]]:
        rows = build_rows(seed=1, num_prompts=100, annotator=annotator)
        return [(r["instruction"], [c["response"] for c in r["completions"]]) for r in rows]

    assert texts("noiseless") == texts("bradley-terry") == texts("length-biased")


# The base model


def test_tags_are_single_tokens_with_and_without_spaces_around_them() -> None:
    words = ["<instruction>", "greet", "ada", "</instruction>", "<response>"]
    for tokenizer in (build_tokenizer(), prepare_tokenizer(build_tokenizer())):
        assert tokenizer("<instruction>greet ada</instruction><response>").tokens() == words
        assert tokenizer("good-day ada</response>").tokens() == ["good-day", "ada", "</response>"]
        assert tokenizer(" ".join(VOCABULARY)).input_ids == list(range(24))
        assert not set(TAGS) & set(tokenizer.all_special_tokens)


def test_an_eos_in_plain_text_never_becomes_the_eos_token() -> None:
    tokenizer = prepare_tokenizer(build_tokenizer())
    encoded = tokenizer(f"greet {EOS}", split_special_tokens=True)
    assert set(encoded.tokens()) == {"greet", UNKNOWN}


def test_the_base_model_loads_with_plain_transformers_and_knows_its_own_special_ids(
    tmp_path: Path,
) -> None:
    save_base_model(tmp_path, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    assert model.config.vocab_size == 24
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (tokenizer.eos_token_id,) * 3 == (EOS_ID,) * 3
    for name, weight in build_model(3).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


# python -m toyworld


def write_world(out_dir: Path, *arguments: str) -> dict[str, bytes]:
    main(parse_args([f"--out_dir={out_dir}", "--num_prompts=50", *arguments]))
    files = [path for path in sorted(out_dir.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in files}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    once = write_world(tmp_path / "a", "--annotator=bradley-terry")
    torch.manual_seed(0)
    again = write_world(tmp_path / "b", "--annotator=bradley-terry")
    other = write_world(tmp_path / "c", "--annotator=bradley-terry", "--seed=7")
    assert once == again
    for name in ("ultrafeedback.jsonl", "gpt2-toy/model.safetensors"):
        assert once[name] != other[name]


def test_writing_again_replaces_the_world_and_leaves_the_rest_of_the_folder(tmp_path: Path) -> None:
    first = write_world(tmp_path)
    (tmp_path / "gpt2-toy" / "stale").touch()
    (tmp_path / ".partial" / "old").mkdir(parents=True)  # as an interrupted run leaves it
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "train.jsonl").write_bytes(b"mine")
    assert write_world(tmp_path) == {**first, "sft/train.jsonl": b"mine"}
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize(
    ("argument", "seen"),
    [
        ("--annotator=careless", "'careless'"),
        ("--num_prompts=8641", "'8641'"),
        ("--num_prompts=0", "'0'"),
        (f"--out_dir={__file__}", "test_toyworld.py"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    argument: str, seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args([argument])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.count("\n") == 1
    assert argument.split("=")[0] in message
    assert seen in message


# The report


def test_padding_never_changes_what_the_report_samples() -> None:
    policy, tokenizer = build_model(1).eval(), build_tokenizer()
    prompts = ["greet", "to ada", FULL]
    greedy = {"temperature": 1e-3, "max_new_tokens": 4}  # as good as greedy
    together = sample(policy, tokenizer, prompts, **greedy)
    for i, prompt in enumerate(prompts):
        alone = sample(policy, tokenizer, [prompt], **greedy)
        assert together.ids[i][together.mask[i]].tolist() == alone.ids[0].tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (1, 2):
        save_base_model(folder / f"policy{seed}", seed)
    torch.manual_seed(0)
    config = build_model(0).config
    config.num_labels = 1
    GPT2ForSequenceClassification(config).save_pretrained(folder / "rm")
    facts = {"loss": "regression", "max_reward": 5.0, "logit_mean": 0.0, "reward_mean": 3.0}
    (folder / "rm" / "run.json").write_text(json.dumps({"reward": facts}))
    write_checksums(folder / "rm")
    lines = [json.dumps({"prompt": prompt}) for prompt in list(requests())[::1000]]
    for side in ("train", "eval"):
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def as_run(folder: Path, seed: int, epoch: int, **arguments: str) -> Path:
    """A checkpoint as run_ppo.py leaves it, `=` in its name included."""
    path = folder / f"gpt2-toy_ppo_epoch={epoch}_reward=1.00"
    save_base_model(path, seed)
    run = {"stage": "ppo", "epoch": epoch, "arguments": arguments}
    (path / "run.json").write_text(json.dumps(run))
    write_checksums(path)
    return path


def run_report(checkpoints: Path, out_dir: Path, *arguments: str) -> None:
    given = [f"--data_dir={checkpoints}", f"--out_dir={out_dir}", "--num_samples=8"]
    report.main(report.parse_args([*given, "--num_exact=1", *arguments]))


def test_the_report_compares_every_model_with_the_first(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = [as_run(tmp_path / "ppo", 2 + i, i, rm_model_path=f"{checkpoints}/rm") for i in (1, 2)]
    (tmp_path / "ppo/best").symlink_to(last[-1].name)
    Figure().savefig(tmp_path / "ppo/training.png")
    out = tmp_path / "out"
    run_report(
        checkpoints,
        out,
        f"--model=SFT={checkpoints / 'policy1'}",
        f"--model=PPO={tmp_path / 'ppo/best'}",
        f"--model=<b>={last[0]}",
        f"--rm_model_path={checkpoints / 'rm'}",
        "--min_gen_len=0",
    )
    text = (out / "report.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{text}\nreport: {out / 'report.html'}")
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    tables = [line[2:-2].split(" | ") for line in text.splitlines() if line[:2] == "| "]
    header, sft, ppo, _, shown, *answers = [[cell.strip() for cell in row] for row in tables]
    assert header[:4] == ["model", "gold reward", "gain over SFT", "learned reward"]
    assert (sft[0], sft[2], sft[5], sft[6]) == ("SFT", "", "0.00", "")
    assert ppo[0] == "PPO" and float(ppo[5]) > 0.5 and ppo[6].endswith("%")
    assert shown == ["prompt", "best answer", "SFT", "PPO", "<b>"]
    assert len(answers) == 3 and all(gold_reward([row[0]], [row[1]]) == [5.0] for row in answers)


def test_the_page_holds_its_pictures_and_asks_no_network(checkpoints: Path, tmp_path: Path) -> None:
    path = as_run(tmp_path / "ppo", 2, 1, rm_model_path=f"{checkpoints}/rm")
    Figure().savefig(tmp_path / "ppo/training.png")
    models = [f"--model=SFT={checkpoints / 'policy1'}", f"--model=<b>={path}"]
    run_report(checkpoints, tmp_path / "out", *models)
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == html.count("<img") == 3  # frontier, gold and learned, training
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in pictures)
    for data in pictures:
        html = html.replace(data, "")
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", html)
    assert "<b>" not in html and "&lt;b&gt;" in html


def test_epochs_of_a_run_are_found_beside_the_checkpoint(tmp_path: Path) -> None:
    paths = {epoch: as_run(tmp_path, 1, epoch) for epoch in (2, 10, 1)}
    (tmp_path / "best").symlink_to(paths[2].name)
    other = as_run(tmp_path, 1, 4)
    (other / "run.json").write_text(json.dumps({"stage": "dpo", "epoch": 4}))
    run = Run("PPO", str(tmp_path / "best"), "--model=PPO")
    assert list(run.epochs()) == [1, 2, 10]
    assert {e: path.resolve() for e, path in run.epochs().items()} == paths
    alone = tmp_path / "alone"
    save_base_model(alone, 1)
    assert Run("A", str(alone), "--model=A").epochs() == {1: alone}


def test_gain_is_paired_by_prompt() -> None:
    def verdict(exact: Exact, *gold: float) -> Verdict:
        length = torch.zeros(len(gold))
        return Verdict(Result([], gold=torch.tensor(gold), learned={}, length=length), [exact])

    start = Exact(2.0, 0.0, 2.0, 2.0, 6.0, 6.0, 1.0)
    sft = verdict(start, 1.0, 2.0, 3.0, 4.0)
    ppo = verdict(start._replace(kl=0.25, objective=5.0), 2.0, 2.0, 4.0, 4.0)
    _, first, second = results_rows({"SFT": sft, "PPO": ppo}, None)
    # Differences 1, 0, 1, 0: mean 1/2, standard error sqrt(1/3) / 2 = 0.289.
    assert first == ["SFT", "2.50 ± 0.65", "", "0.00", "0.00", ""]
    assert second == ["PPO", "3.00 ± 0.58", "+0.50 (2 standard errors)", "0.00", "0.25", "75.0%"]


def test_learned_reward_is_what_the_pipeline_of_transformers_says(checkpoints: Path) -> None:
    build_tokenizer().save_pretrained(checkpoints / "rm")
    score = pipeline("text-classification", model=str(checkpoints / "rm"))
    texts = [
        f"<instruction>{prompt}</instruction><response>{response}</response>"
        for prompt, response in ((FULL, "hi"), ("greet", "farewell ada"))
    ]
    ids = [torch.tensor([*build_tokenizer()(text).input_ids, EOS_ID]) for text in texts]
    padded = pad_sequence(ids, batch_first=True, padding_value=EOS_ID)
    mask = pad_sequence([torch.ones_like(row).bool() for row in ids], batch_first=True)
    rewards = load_reward(checkpoints / "rm", flag="x")(Sequences(padded, mask, mask))
    expected = [1 + 4 * score(text)[0]["score"] for text in texts]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_learned_reward_of_a_comparing_model_is_its_centred_logit(
    loss: str, checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints / "rm", tmp_path / "rm")
    facts = {"loss": loss, "max_reward": 5.0, "logit_mean": 2.0, "reward_mean": 0.0}
    (tmp_path / "rm/run.json").write_text(json.dumps({"reward": facts}))
    write_checksums(tmp_path / "rm")
    ids = torch.tensor([[3, 4, EOS_ID]])
    sequences = Sequences(ids, torch.ones_like(ids).bool(), torch.ones_like(ids).bool())
    centred = load_reward(tmp_path / "rm", flag="x")(sequences)
    regression = load_reward(checkpoints / "rm", flag="x")(sequences)  # 1 + 4 sigmoid(logit)
    expected = torch.special.logit((regression - 1) / 4) - 2.0
    torch.testing.assert_close(centred, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=A={}/nowhere"], "not a checkpoint"),
        (["--model=A={}/rm"], "expected a ...LMHeadModel"),
        (["--model=A={}/policy1", "--rm_model_path={}/policy2"], "ForSequenceClassification"),
        (["--model=A={}/policy1", "--data_dir={}/rm"], "there is no"),
        (["--model=A={}/policy1", "--max_new_tokens=5"], "6,728,904 responses are too many"),
    ],
)
def test_the_report_refuses_what_it_cannot_read(
    arguments: list[str], message: str, checkpoints: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_report(checkpoints, tmp_path, *(text.format(checkpoints) for text in arguments))
    assert not list(tmp_path.iterdir())


def test_the_report_refuses_a_model_of_other_words(checkpoints: Path, tmp_path: Path) -> None:
    config = build_model(0).config
    config.vocab_size = 64
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="64 tokens"):
        load_policy(tmp_path, flag="--model=A")


def test_the_report_refuses_prompts_of_other_worlds(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"prompt": "Why is the sky blue?"}\n')
    with pytest.raises(InputError, match="sky blue"):
        read_prompts(str(tmp_path), "eval")


# Pairs of a model's own responses


def draw_pairs(checkpoints: Path, out_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    given = [f"--sft_model_path={checkpoints / 'policy1'}", f"--data_dir={checkpoints}"]
    pairs.main(pairs.parse_args([*given, f"--out_dir={out_dir}", "--num_pairs=3000", *arguments]))
    assert sorted(path.name for path in out_dir.iterdir()) == ["eval.jsonl", "train.jsonl"]
    return [json.loads(line) for line in (out_dir / "train.jsonl").open(encoding="utf-8")]


def test_pairs_train_as_the_very_tokens_that_the_model_said() -> None:
    rng, tag = random.Random(0), VOCABULARY.index(TAGS[-1])
    said = {}
    for _ in range(5000):
        ids = tuple(rng.choices([EOS_ID, tag, tag, *range(24)], k=MAX_RESPONSE_TOKENS))
        ids = ids[: ids.index(EOS_ID) + 1] if EOS_ID in ids else ids
        if (text := pairs.as_text(list(ids))) is not None:
            said[ids] = text
        else:  # the one kind that no text can tell: EOS without the closing tag before it
            assert ids[-1] == EOS_ID and (len(ids) < 3 or ids[-2] != tag)
    assert sum(ids[-1] == EOS_ID for ids in said) > 50
    assert sum(ids[-1] != EOS_ID for ids in said) > 1000
    trained = encode_samples(
        prepare_tokenizer(build_tokenizer()),
        [FULL] * len(said),
        list(said.values()),
        max_len=10 + MAX_RESPONSE_TOKENS,
        min_len=1,
    )
    assert [tuple(one.response_ids) for one in trained if one] == list(said)


@pytest.mark.slow
def test_pairs_are_read_as_the_training_scripts_read_them(
    checkpoints: Path, tmp_path: Path
) -> None:
    rows = draw_pairs(checkpoints, tmp_path / "pairs")
    assert {row["prompt"] for row in rows} == set(list(requests())[::1000])
    assert all(row["chosen"] != row["rejected"] for row in rows)
    records = read_split(tmp_path / "pairs", "train", PAIR)
    assert [record["chosen"] for record in records] == [row["chosen"] for row in rows]
    again = draw_pairs(checkpoints, tmp_path / "pairs")
    assert again == rows


def test_pairs_leave_other_files_of_the_folder_alone(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = [f"--sft_model_path={checkpoints / 'policy1'}", f"--data_dir={checkpoints}"]
    pairs.main(pairs.parse_args([*given, f"--out_dir={tmp_path}", "--num_pairs=10"]))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval.jsonl", "notes.txt", "train.jsonl"]
    with pytest.raises(SystemExit):
        pairs.parse_args([*given, f"--out_dir={tmp_path / 'notes.txt'}"])


def test_the_better_of_two_is_chosen_by_bradley_terry(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[VOCABULARY.index(w) for w in ("hi", n, TAGS[-1], EOS)] for n in ("ada", "bob")]

    def sample_both(_model: Any, _tokenizer: Any, prompts: list[str], **_: float) -> Sequences:
        ids = torch.tensor(answers * (len(prompts) // 2))
        mask = torch.ones_like(ids).bool()
        return Sequences(ids, mask, mask)

    monkeypatch.setattr(pairs, "sample", sample_both)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": FULL}) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": FULL}) + "\n")
    rows = draw_pairs(checkpoints, tmp_path / "pairs", f"--data_dir={tmp_path}")
    assert (len(rows), reward(FULL, "hi ada"), reward(FULL, "hi bob")) == (3000, 4.0, 3.0)
    wins = sum(row["chosen"] == "hi ada" for row in rows)
    # 1 / (1 + e^(-2 (4 - 3))) = 0.8808; four standard errors
    assert wins / 3000 == pytest.approx(0.8808, abs=0.0237)


def test_a_noiseless_annotator_gives_no_pairs_of_equals(checkpoints: Path, tmp_path: Path) -> None:
    rows = draw_pairs(checkpoints, tmp_path / "pairs", "--annotator=noiseless")
    assert rows and all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_scored_rows_hold_every_different_response_to_a_prompt_once(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["hi ada", "bye", "hi ada", "good-day ada"]
    answers = [[VOCABULARY.index(w) for w in (*t.split(), TAGS[-1], EOS)] for t in said]
    ids = torch.tensor([ids + [EOS_ID] * (4 - len(ids)) for ids in answers])
    mask = torch.arange(4) < torch.tensor([len(ids) for ids in answers])[:, None]

    def sample_these(_model: Any, _tokenizer: Any, prompts: list[str], **_: float) -> Sequences:
        assert prompts == [prompt for prompt in dict.fromkeys(prompts) for _ in said]
        rows = list(range(len(said))) * (len(prompts) // len(said))
        return Sequences(ids[rows], mask[rows], mask[rows])

    monkeypatch.setattr(pairs, "sample", sample_these)
    given = [f"--sft_model_path={checkpoints / 'policy1'}", f"--data_dir={checkpoints}"]
    given += [f"--out_dir={tmp_path / 'rows'}", "--num_responses=4", "--max_samples=2"]
    pairs.main(pairs.parse_args([*given, "--annotator=noiseless"]))
    prompts = list(requests())[::1000]
    for side, asked in (("train", prompts[:2]), ("eval", prompts)):
        records = read_split(tmp_path / "rows", side, SCORED)
        texts = ["hi ada", "bye", "good-day ada"]  # twins are left out
        assert [(r["prompt"], r["response"]) for r in records] == list(product(asked, texts))
        scores = [to_score("noiseless", reward(r["prompt"], r["response"])) for r in records]
        assert [record["score"] for record in records] == scores


def test_a_number_of_pairs_means_nothing_to_scored_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        pairs.parse_args(["--sft_model_path=x", "--num_responses=4", "--num_pairs=10"])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--num_pairs=10" in message and "--num_responses" in message
