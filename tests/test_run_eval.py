"""Evaluation from end to end: figures that others wrote too, files in others' forms, wrong use."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

import run_eval
from rlhf import answers
from rlhf.checkpoints import content_of
from rlhf.disk import Lock, write_checksums
from rlhf.errors import InputError, RunError
from tests.stub_judge import Asked, Reply, error, serve, truthful, verbosity_biased
from tests.test_scripts import PPO, rows, run
from toyworld.base_model import save_base_model

SAMPLING = ["--temperature=1", "--top_k=0", "--max_new_tokens=8", "--max_len=64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, base_path, data_dir):
    """SFT, RM and PPO, a few steps of each."""
    root = tmp_path_factory.mktemp("model")
    run("sft", root, data_dir, f"--model_id={base_path}", "--num_epochs=1")
    run("rm", root, data_dir, "--num_epochs=1", "--learning_rate=1e-3", "--max_reward=4")
    few = ["--max_reward=4", "--max_samples=16", "--eval_samples=6", "--missing_eos_penalty=0"]
    run("ppo", root, data_dir, *PPO, *few, "--learning_rate=1e-3")
    return root


def polite(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response) % 3) for response in responses]


@pytest.fixture
def evaluate(models, data_dir, tmp_path):
    """Run an evaluation; returns its folder."""

    def evaluate(*options: str, out_dir: Path = tmp_path / "eval") -> Path:
        named = [f"--model_path=SFT={models}/sft/best", f"--model_path=PPO={models}/ppo/best"]
        prompts = f"--prompts={data_dir}/pref/eval.jsonl"
        argv = [*named, prompts, f"--out_dir={out_dir}", *SAMPLING, *options]
        run_eval.main(run_eval.parse_args(argv))
        return out_dir

    return evaluate


def record_of(folder: Path) -> dict:
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def outputs_of(folder: Path, name: str) -> list[str]:
    rows = json.loads((folder / f"outputs/{name}.json").read_text(encoding="utf-8"))
    return [row["output"] for row in rows]


def test_figures_are_those_that_the_run_of_ppo_wrote(evaluate, models):
    """Another script, other batches, and scores without training's penalties: the same numbers."""
    record = record_of(evaluate(f"--rm_model_path={models}/rm/best", "--max_prompts=6"))
    told = [row for row in rows(models / "ppo") if "eval_kl" in row]  # before training, and after
    assert told[1]["eval_kl"] > 10 * told[0]["eval_kl"]
    (judge,) = record["judges"]
    for name, figures in zip(("SFT", "PPO"), told, strict=True):
        model, score = record["models"][name], judge["models"][name]["score"]
        assert score[0] == pytest.approx(figures["eval_scores"], abs=1e-5)
        assert model["kl"][0] == pytest.approx(figures["eval_kl"], abs=1e-5)
        assert model["tokens"][0] == pytest.approx(figures["eval_length"], abs=1e-5)
        assert model["eos_rate"] == pytest.approx(figures["eval_eos_rate"])


def test_wins_can_be_counted_again_from_the_scores(evaluate):
    folder = evaluate(f"--reward_fn={__file__}:polite")
    judge = record_of(folder)["judges"][0]["models"]
    scores = {name: polite([], outputs_of(folder, name)) for name in ("SFT", "PPO")}
    pairs = list(zip(scores["PPO"], scores["SFT"], strict=True))
    won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    ppo = judge["PPO"]
    assert (ppo["won"], ppo["lost"], ppo["tied"]) == (won, lost, len(pairs) - won - lost)
    assert won and lost, "the test wants both"
    assert ppo["win_rate"][0] == pytest.approx((won + (len(pairs) - won - lost) / 2) / len(pairs))
    assert ppo["gain"][0] == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert ppo["scores"] == scores["PPO"] and judge["SFT"]["scores"] == scores["SFT"]
    assert "win_rate" not in judge["SFT"], "nobody is compared with itself"


def finished(prompts: list[str], responses: list[str], ended: list[bool]) -> list[float]:
    return [float(end) for end in ended]


@pytest.mark.slow
def test_how_many_prompts_are_answered_at_once_changes_nothing(
    evaluate, models, monkeypatch, tmp_path
):
    judges = [f"--rm_model_path={models}/rm/best", f"--reward_fn={__file__}:finished"]
    judges += ["--max_new_tokens=100", "--max_len=128", "--temperature=4"]
    records = []
    for size in (64, 3):
        monkeypatch.setattr(answers, "AT_ONCE", size)
        records.append(record_of(evaluate(*judges, out_dir=tmp_path / str(size))))
    for name in ("SFT", "PPO"):
        one, other = ([judge["models"][name]["scores"] for judge in x["judges"]] for x in records)
        assert one[1] == other[1] and one[0] == pytest.approx(other[0], abs=1e-5)
        assert 0 < np.mean(one[1]) < 1
        assert records[0]["models"][name]["eos_rate"] == pytest.approx(np.mean(one[1]))
        assert records[0]["models"][name]["kl"] == pytest.approx(records[1]["models"][name]["kl"])


def test_a_checkpoint_under_two_names_is_as_good_as_itself(evaluate, models):
    folder = evaluate(f"--rm_model_path={models}/rm/best", f"--model_path=again={models}/sft/best")
    again = record_of(folder)["judges"][0]["models"]["again"]
    assert again["win_rate"] == again["win_rate_at_equal_length"] == [0.5, 0.5, 0.5]
    assert again["tied"] == len(again["wins"]) and again["gain"] == [0, 0, 0]


def test_responses_are_in_the_form_of_alpaca_eval_and_can_be_asked_for_again(evaluate, data_dir):
    folder = evaluate()
    written = json.loads((folder / "outputs/PPO.json").read_text())
    asked = [json.loads(line) for line in (data_dir / "pref/eval.jsonl").read_text().splitlines()]
    assert [row["instruction"] for row in written] == [row["prompt"] for row in asked]
    assert {tuple(row) for row in written} == {("instruction", "output", "generator")}
    assert {row["generator"] for row in written} == {"PPO"}
    assert any(row["output"] for row in written)
    again = evaluate(f"--prompts={folder}/outputs/SFT.json", out_dir=folder / "again")
    assert json.loads((again / "outputs/PPO.json").read_text()) == written


@pytest.mark.slow
def test_the_same_arguments_give_the_same_files(evaluate, models, tmp_path):
    options = [f"--rm_model_path={models}/rm/best", "--max_prompts=4"]
    first, second = (evaluate(*options, out_dir=tmp_path / name) for name in ("a", "b"))
    for file in ("eval.json", "report.md", "report.html", "outputs/SFT.json"):
        texts = [(folder / file).read_text(encoding="utf-8") for folder in (first, second)]
        assert texts[0].replace(str(first), "") == texts[1].replace(str(second), ""), file
    other = record_of(evaluate(*options, "--seed=7"))["judges"][0]["models"]["PPO"]["scores"]
    assert other != record_of(first)["judges"][0]["models"]["PPO"]["scores"]


def test_the_page_needs_no_network_and_shows_the_whole_lineage(evaluate, models):
    page = (evaluate(f"--rm_model_path={models}/rm/best") / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
    curves = re.findall(r'alt="training of (\w+)"', page)
    assert curves == ["SFT", "rm", "PPO"], "parents before their children"


def test_what_flatters_is_told(evaluate, models, data_dir, tmp_path):
    few, told, pleased = record_of(evaluate(f"--rm_model_path={models}/rm/best"))["notes"]
    assert few.startswith("With fewer than 30 prompts")
    assert told == "The best epoch was chosen by these prompts in the runs of: PPO."
    assert pleased.startswith(f"Trained to please {models}/rm/best: PPO.")
    (told,) = record_of(evaluate(f"--prompts={data_dir}/sft/train.jsonl"))["notes"]
    assert told == "Trained on these very prompts: SFT, rm."  # whose files are the same here


def test_a_reward_model_is_known_by_what_it_holds_wherever_it_is(evaluate, models, tmp_path):
    shutil.copytree(models / "rm/best", tmp_path / "copy")
    notes = record_of(evaluate(f"--rm_model_path={tmp_path}/copy"))["notes"]
    assert notes[-1].startswith(f"Trained to please {tmp_path}/copy: PPO.")
    model = models / "ppo" / (models / "ppo/best").readlink()
    facts = json.loads((model / "run.json").read_text())
    assert facts["other_inputs"]["--rm_model_path"]["content"] == content_of(f"{models}/rm/best")
    facts["other_inputs"]["--rm_model_path"]["content"] = "another one"
    shutil.copytree(model, tmp_path / "ppo")
    (tmp_path / "ppo/run.json").write_text(json.dumps(facts))
    write_checksums(tmp_path / "ppo")
    options = [f"--model_path=PPO={tmp_path}/ppo", f"--rm_model_path={models}/rm/best"]
    notes = record_of(evaluate(*options))["notes"]
    assert not any("Trained to please" in note for note in notes)


def test_a_damaged_checkpoint_is_not_evaluated(evaluate, models, tmp_path):
    for option, model in (("--model_path=D=", "sft"), ("--rm_model_path=", "rm")):
        copy = tmp_path / model
        shutil.copytree(models / model / "best", copy)
        weights = bytearray((copy / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "model.safetensors").write_bytes(weights)
        with pytest.raises(InputError, match=r"is damaged: model\.safetensors has changed"):
            evaluate(f"{option}{copy}")


def test_greedy_responses_have_no_kl(evaluate):
    record = record_of(evaluate("--do_sampling=false", f"--reward_fn={__file__}:polite"))
    assert record["models"]["PPO"]["kl"] is None and "no KL" in record["how"]


@pytest.mark.slow
def test_no_more_than_two_models_are_in_memory(evaluate, models, monkeypatch):
    real, alive, most = run_eval.load_policy, weakref.WeakSet(), []

    def load(*args, **options):
        gc.collect()
        model = real(*args, **options)
        alive.add(model)
        most.append(len(alive))
        return model

    monkeypatch.setattr(run_eval, "load_policy", load)
    evaluate(f"--model_path=X={models}/ppo/best", f"--model_path=Y={models}/ppo/best")
    assert most == [1, 2, 2, 2]


def test_checkpoints_with_other_tokenizers_have_no_kl(evaluate, toy_base):
    folder = evaluate(f"--model_path=toy={toy_base}", f"--reward_fn={__file__}:polite")
    record = record_of(folder)
    assert record["models"]["toy"]["kl"] is None and record["models"]["PPO"]["kl"]
    assert record["how"].startswith("10 prompts")
    assert "| toy   | –" in (folder / "report.md").read_text()


def test_a_prompt_that_has_no_room_with_one_tokenizer_is_asked_of_nobody(
    evaluate, toy_base, tmp_path
):
    """In the toy world's words, `instruction` is one token; in ours, many."""
    lines = [{"prompt": "Hi"}, {"prompt": "zqxv wk " * 8}]
    (tmp_path / "two.json").write_text(json.dumps(lines))
    options = [f"--prompts={tmp_path}/two.json", f"--model_path=toy={toy_base}", "--max_len=40"]
    for folder in (evaluate(*options), evaluate(*options, f"--model_path=SFT={toy_base}")):
        assert [len(outputs_of(folder, name)) for name in ("PPO", "toy")] == [1, 1]


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory):
    """A model with words of its own."""
    path = tmp_path_factory.mktemp("toy") / "gpt2-toy"
    save_base_model(path, seed=0)
    return path


def test_a_language_model_judges_and_is_asked_nothing_twice(
    evaluate, monkeypatch, tmp_path, capsys
):
    with serve(verbosity_biased) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
        record = record_of(evaluate("--judge_model=stub"))
        asked = len(stub.bodies) - 2  # two were to see that there is a judge
        again = record_of(evaluate("--judge_model=stub"))
    assert asked and len(stub.bodies) == asked + 2
    pairs = list(
        zip(*(outputs_of(tmp_path / "eval", name) for name in ("PPO", "SFT")), strict=True)
    )
    longer = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in pairs]
    (judge,) = record["judges"]
    assert judge["models"]["PPO"]["wins"] == longer and judge["models"]["PPO"]["consistency"] == 1.0
    assert judge["models"] == again["judges"][0]["models"]
    assert (judge["num_asked"], again["judges"][0]["num_asked"]) == (asked, 0)
    everything = [file.read_bytes() for file in (tmp_path / "eval").rglob("*") if file.is_file()]
    assert not any(b"sk-secret" in x for x in [*everything, capsys.readouterr().out.encode()])


def test_what_a_run_leaves_is_of_this_run_or_of_the_one_before(
    evaluate, models, monkeypatch, tmp_path
):
    folder = evaluate(f"--model_path=X={models}/ppo/best")
    before = {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}

    def judge(asked: Asked) -> str | Reply:
        return truthful(asked) if asked.number <= 2 else error(503)

    with serve(judge) as stub:
        monkeypatch.setenv("OPENAI_BASE_URL", stub.url)
        with pytest.raises(RunError, match="20 questions in a row without a verdict"):
            evaluate("--judge_model=stub", "--judge_retries=0", "--temperature=2")
    (folder / "verdicts.jsonl").unlink()
    after = {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert after == before
    evaluate()
    assert {path.name for path in (folder / "outputs").iterdir()} == {"SFT.json", "PPO.json"}


def test_without_a_key_no_model_answers_first(evaluate, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_eval, "write_all", None)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        evaluate("--judge_model=stub")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_path=PPO"], "--model_path: must be NAME=PATH, as SFT=folder, not 'PPO'"),
        (["--model_path=a/b=x"], "--model_path=a/b=...: a name is a file's too"),
        (["--reward_label=good"], "--reward_label=good needs a text classifier"),
        (["--judge_timeout=3"], "--judge_timeout=3 needs --judge_model"),
        (["--max_new_tokens=2", "--min_gen_len=3"], "--max_new_tokens=2 is less than"),
        (["--judge_model=x"], "--judge_model=x compares: give --model_path twice or more"),
    ],
)
def test_wrong_arguments_take_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_eval.parse_args(["--model_path=A=a", *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line


def test_a_name_given_again_takes_the_later_path():
    args = run_eval.parse_args(["--model_path=A=a", "--model_path=B=b", "--model_path=A=c"])
    assert args.model_path == {"A": "c", "B": "b"}


def test_what_cannot_be_evaluated_is_one_line_before_any_model_answers(
    evaluate, models, toy_base, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_eval, "write_all", None)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text('[{"prompt": "Hi"}, {"text": "Hi"}]')
    for options, message in (
        (["--model_path=x=nowhere/at/all"], "--model_path=x=nowhere/at/all: no such checkpoint"),
        ([f"--model_path=x={models}/rm/best"], "is a reward model"),
        ([f"--rm_model_path={models}/sft/best"], "--rm_model_path="),
        ([f"--rm_model_path={models}/rm/best", f"--model_path=t={toy_base}"], "tokenizer"),
        (["--reward_fn=nowhere:score"], "--reward_fn=nowhere:score: cannot be imported"),
        ([f"--prompts={tmp_path}/none.jsonl"], "there is no such file"),
        ([f"--prompts={tmp_path}/empty.jsonl"], "empty.jsonl: holds no prompt"),
        (
            [f"--prompts={tmp_path}/broken.json"],
            "broken.json: row 2: expected a prompt or an instruction",
        ),
        (["--max_len=3"], "--max_len=3: no prompt in eval.jsonl leaves room"),
        ([f"--out_dir={tmp_path}/empty.jsonl"], "empty.jsonl is a file; give a folder"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            evaluate(*options)


def test_a_folder_in_use_or_without_room_is_one_line(evaluate, tmp_path, monkeypatch):
    folder = tmp_path / "busy"
    folder.mkdir()
    with Lock(folder, flag="--out_dir"), pytest.raises(InputError, match="is in use by process"):
        evaluate(out_dir=folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_eval, "replace_json", full)
    with pytest.raises(RunError, match=r"busy: cannot be written .*No space left"):
        evaluate("--max_prompts=2", out_dir=folder)
