"""Talking in the terminal as a user does it, and what can be wrong with the arguments."""

import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import run_chat
from rlhf.chat import Answer, Exchange, Settings, Voice
from rlhf.disk import write_checksums
from rlhf.errors import InputError, RunError
from rlhf.models import LANGUAGE_MODEL, load_tokenizer
from toyworld.base_model import save_base_model

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(1.0, 0, 1.0, 8, 42)


def run(monkeypatch, typed: str, *options: str) -> None:
    """Run the script on what is typed into a pipe."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    run_chat.main(run_chat.parse_args(["--max_len=100", "--max_new_tokens=8", *options]))


def talk(monkeypatch, capsys, typed: str, *options: str) -> list[str]:
    """The lines of stdout."""
    run(monkeypatch, typed, *options)
    return capsys.readouterr().out.splitlines()


class Name(str):
    """A model whose answers are made up."""

    name = property(str)


def refused(capsys, *options: str) -> str:
    """The one line that argparse ends with."""
    with pytest.raises(SystemExit) as caught:
        run_chat.parse_args(options)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    return line


@pytest.fixture
def judge_path(base_path, tmp_path) -> str:
    """A text classifier with two labels, as somebody else trained it."""
    config = AutoConfig.from_pretrained(base_path, num_labels=2)
    config.pad_token_id, config.id2label = 0, {0: "bad", 1: "good"}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(base_path).save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


# In the terminal


def test_one_model_answers_each_line(base_path, monkeypatch, capsys):
    out = talk(monkeypatch, capsys, "Name a colour.\n\nAnother?", f"--model_path=A={base_path}")
    text = "\n".join(out)
    assert text and "A: " not in text and "\x1b" not in text and "> " not in out[0][:2]
    again = talk(monkeypatch, capsys, "Name a colour.\n\nAnother?", f"--model_path=A={base_path}")
    assert out == again


def test_several_models_answer_in_turn_by_name_and_are_scored(
    base_path, judge_path, monkeypatch, capsys
):
    models = [f"--model_path={name}={base_path}" for name in ("A", "B")]
    judge = [f"--rm_model_path={judge_path}", "--reward_label=good"]
    out = "\n".join(talk(monkeypatch, capsys, "Name a colour.\n", *models, *judge))
    form = r"A: (.*)\n  \[reward .*\]\nB: (.*)\n  \[reward .*\]"
    first, second = re.fullmatch(form, out, re.DOTALL).groups()
    assert first != second  # each has noise of its own, even of one checkpoint
    assert len(re.findall(r"\[reward -?\d+\.\d\d\]", out)) == 2


def test_commands_change_what_comes(base_path, monkeypatch, capsys):
    model = f"--model_path=A={base_path}"
    ask = "Name a colour.\n"
    greedy = talk(monkeypatch, capsys, ask, model, "--temperature=0")
    sampled = talk(monkeypatch, capsys, ask, model, "--temperature=3")
    assert greedy != sampled
    assert talk(monkeypatch, capsys, f"/temperature 0\n{ask}", model) == greedy
    # Of the likeliest one alone, any temperature makes the same.
    assert talk(monkeypatch, capsys, f"/top_k 1\n{ask}", model, "--temperature=3") == greedy
    both = talk(monkeypatch, capsys, f"{ask}/reset\n{ask}", model, "--temperature=3")
    assert both == 2 * sampled
    assert talk(monkeypatch, capsys, f"{ask}{ask}", model, "--temperature=3") != both
    assert talk(monkeypatch, capsys, f"/quit\n{ask}", model) == []


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/nonsense 3", "/nonsense: there is no such command; /help shows them"),
        ("/temperature hot", "temperature must be a number >= 0, not 'hot'"),
        ("/top_p 0", "top_p must be a number > 0 and <= 1, not '0'"),
        ("/max_new_tokens", "max_new_tokens must be a whole number >= 1, not ''"),
        ("/better C", "/better wants one of A, B, not 'C'"),
        ("/better A", "no pair: there is no answer"),
        ("/better", "/better wants one of A, B, not ''"),
        ("x" * 4001, "a question may have 4,000 characters, not 4,001"),
    ],
)
def test_what_cannot_be_done_says_so_in_one_line_and_goes_on(
    base_path, monkeypatch, capsys, typed, told
):
    models = [f"--model_path={name}={base_path}" for name in ("A", "B")]
    with pytest.raises(RunError, match="2 lines of the input could not be done"):
        run(monkeypatch, f"{typed}\n/seed -1\n/help\n", *models)
    seen = capsys.readouterr()
    assert seen.out == f"{run_chat.HELP}\n"  # what was asked for; the rest is told on stderr
    assert seen.err.splitlines()[1:] == [
        told,
        "seed must be a whole number >= 0 and <= 4294967295, not '-1'",
    ]


def test_a_question_that_one_model_cannot_read_is_answered_by_the_other(monkeypatch, capsys):
    def answer(voice, exchanges, question, settings, **options):
        if voice == "A":
            raise InputError("ask a shorter one")
        yield Exchange(question, Answer([1], "yes", True), voice, question, 0)

    monkeypatch.setattr(run_chat, "answer", answer)
    monkeypatch.setattr(run_chat, "unknown_note", lambda *_: "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Q\nR\n"))
    assert run_chat.talk([Name("A"), Name("B")], None, SETTINGS, None, Path()) == 2
    seen = capsys.readouterr()
    assert seen.out == "B: yes\n" * 2 and seen.err == "A: ask a shorter one\n" * 2


def test_words_that_a_model_does_not_know_are_told_of(tmp_path, monkeypatch, capsys):
    save_base_model(tmp_path / "toy", seed=0)
    models = [f"--model_path={name}={tmp_path}/toy" for name in ("A", "B")]
    run(monkeypatch, "greet the <unk> ada\ngreet ada\n", *models, "--max_len=32")
    notes = [line for line in capsys.readouterr().err.splitlines() if "unknown" in line]
    assert notes == ["note: 2 of 4 tokens of this question are unknown to A, B"]


def test_a_byte_level_tokenizer_knows_everything(base_path):
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2 has it
    voice = Voice("A", base_path, None, tokenizer, [], 64)
    assert run_chat.unknown_note([voice], f"Zoë 猫 {tokenizer.eos_token}") == ""


def test_nobody_reads_more_than_the_reward_model_can(base_path, tmp_path, monkeypatch, capsys):
    config = AutoConfig.from_pretrained(base_path, num_labels=1, n_positions=24)
    tokenizer = load_tokenizer(base_path, flag="--x", kind=LANGUAGE_MODEL, max_len=0)
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    reward = {"loss": "regression", "max_reward": 5.0, "logit_mean": 0.0, "reward_mean": 0.0}
    (tmp_path / "rm" / "run.json").write_text(json.dumps({"stage": "rm", "reward": reward}))
    write_checksums(tmp_path / "rm")
    paths = [f"--rm_model_path={tmp_path}/rm", f"--model_path=A={base_path}"]
    run(monkeypatch, "Hello.\n", *paths, "--max_len=100", "--max_new_tokens=90")
    seen = capsys.readouterr()
    told = "note: --rm_model_path has 24 positions, and reads no more, whatever --max_len=100 says"
    assert told in seen.err and "[reward " in seen.out


def test_a_setting_that_was_emptied_on_the_page_is_told_to_be_empty():
    with pytest.raises(InputError, match=r"^temperature is empty: give a number, as 0\.7$"):
        run_chat.read_settings(None, 50, 1.0, 8, 42)
    with pytest.raises(InputError, match=r"^seed is empty: give a number, as 42$"):
        run_chat.read_settings(0.7, 50, 1.0, 8, None)
    assert run_chat.read_settings(0.7, 50, 1, 8, 42) == Settings(0.7, 50, 1.0, 8, 42)


def test_a_name_may_be_written_in_any_case_that_leaves_one():
    assert run_chat.row_of("dpo", ["SFT", "DPO"]) == 1
    assert run_chat.row_of("a", ["A", "a"]) == 1
    for name in ("dpo2", "Dpo", ""):
        with pytest.raises(InputError, match="/better wants one of DPO, dpo, not"):
            run_chat.row_of(name, ["DPO", "dpo"])


def test_help_names_every_command(base_path, monkeypatch, capsys):
    text = "\n".join(talk(monkeypatch, capsys, "/help\n", f"--model_path=A={base_path}"))
    for name in ("reset", "better", "quit", "help", *Settings._fields):
        assert f"/{name}" in text


def test_the_better_answer_is_kept_and_the_other_goes_on_from_it(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(voice, exchanges, question, settings, **options):
        asked.append((voice, [x.author for x in exchanges]))
        yield Exchange(question, Answer([1], f"{voice} says", True), voice, question, 0)

    monkeypatch.setattr(run_chat, "answer", answer)
    monkeypatch.setattr(run_chat, "unknown_note", lambda *_: "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Q\n/better B\nR\n"))
    assert run_chat.talk([Name("A"), Name("B")], None, SETTINGS, None, tmp_path) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"1 new pair in {tmp_path}/train.jsonl; now 1 in train and 0 in eval")
    row = json.loads((tmp_path / "train.jsonl").read_text())
    assert (row["chosen"], row["rejected"]) == ("B says", "A says")
    assert asked == [("A", []), ("B", []), ("A", ["B"]), ("B", ["B"])]


def test_an_answer_in_bits_is_shown_whole(capsys):
    def answer():
        for text in ("", "", "H", "He", "He", "Hello"):
            yield Exchange("Q", Answer([1], text, text == "Hello"), "A", "Q", 2)

    run_chat.show(answer(), "A: ")
    note = "note: A answers without the oldest 2 questions, for which there was no room"
    assert capsys.readouterr() == ("A: Hello\n", f"{note}\n")


def test_an_answer_that_was_cut_says_so(capsys):
    run_chat.show(iter([Exchange("Q", Answer([1], "Once", False), "A", "Q", 0, 0.5)]), "A: ")
    assert capsys.readouterr().out == "A: Once (cut)\n  [reward 0.50]\n"


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(capsys):
    def answer():
        yield Exchange("Q", Answer([1], "Once", False), "A", "Q", 0)
        raise KeyboardInterrupt

    exchange = run_chat.show(answer(), "A: ")
    assert exchange.answer.text == "Once"
    assert capsys.readouterr().out == "A: Once (stopped)\n"


def test_a_model_cannot_command_the_terminal(capsys):
    text = "a\x1b[2Jb\x07c\rd\x9be\tf\ng"

    def answer():
        for end in range(1, len(text) + 1):
            yield Exchange("Q", Answer([1], text[:end], end == len(text)), "A", "Q", 0)

    run_chat.show(answer(), "")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\tf\ng\n"


@pytest.mark.slow
@pytest.mark.parametrize("leave", [b"\x03", b"\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_at_the_prompt_of_a_terminal_a_key_leaves(base_path, leave):
    main, child = pty.openpty()
    # A session of its own, whose terminal the child is: so keys become signals.
    code = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    code += "; os.execv(sys.argv[1], sys.argv[1:])"
    script = [sys.executable, "run_chat.py", f"--model_path=A={base_path}", "--max_len=128"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *script], stdin=child, stdout=child, stderr=child, cwd=ROOT
    )
    os.close(child)

    def read_until(mark: bytes) -> None:
        start, seen = time.monotonic(), b""
        while mark not in seen and time.monotonic() - start < 60:
            seen += os.read(main, 1000)
        assert mark in seen

    read_until(b"> ")
    os.write(main, b"Name a colour.\n")
    for _ in range(2):  # the first Ctrl-C may come in time to stop the answer
        os.write(main, leave)
        with suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=10) == 0
            break
    assert process.returncode == 0
    os.close(main)


# Wrong use


def test_arguments_that_cannot_be_meant_end_in_one_line(capsys):
    model = "--model_path=A=x"
    four = [f"--model_path={name}=x" for name in "ABCD"]
    for options, told in (
        ([], "required: --model_path"),
        (["--model_path=x"], "must be NAME=PATH, as SFT=folder, not 'x'"),
        ([*four, "--model_path=E=x"], "5 models are given"),
        ([model, "--reward_label=good"], "--reward_label=good needs --rm_model_path"),
        ([model, "--host=0.0.0.0"], "--host=0.0.0.0 is for the page: add --web"),
        ([model, "--port=80"], "--port=80 is for the page: add --web"),
        ([model, "--web", "--port=70000"], "must be a whole number >= 1 and <= 65535"),
        ([model, "--temperature=-1"], "must be a number >= 0"),
        ([model, "--top_p=0"], "must be a number > 0"),
    ):
        assert told in refused(capsys, *options)
    again = run_chat.parse_args([*four, "--model_path=B=y"])
    assert again.model_path == {"A": "x", "B": "y", "C": "x", "D": "x"} and again.web is False


def copy_of(path: str, to: Path, *without: str) -> str:
    shutil.copytree(path, to)
    for name in without:
        (to / name).unlink()
    return str(to)


def test_checkpoints_that_cannot_talk_end_in_one_line(base_path, judge_path, tmp_path):
    bare = copy_of(base_path, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json")
    damaged = copy_of(base_path, tmp_path / "damaged")
    (tmp_path / "damaged" / "run.json").write_text("{}")
    for path, told in (
        (judge_path, "is a reward model (GPT2ForSequenceClassification); it must be a language"),
        (bare, "holds no tokenizer"),
        (damaged, "is damaged: its SHA256SUMS cannot be read"),
        ("nowhere/at/all", "no such checkpoint folder"),
    ):
        with pytest.raises(InputError) as caught:
            run_chat.main(run_chat.parse_args([f"--model_path=A={path}"]))
        text = str(caught.value)
        assert told in text and path in text and ("--model_path=A=" in text or path == bare)


def test_a_judge_that_does_not_fit_ends_in_one_line(base_path, judge_path):
    model = f"--model_path=A={base_path}"
    for options, told in (
        ([f"--rm_model_path={base_path}"], "is a language model"),
        ([f"--rm_model_path={judge_path}"], r"has several labels; name one by --reward_label"),
    ):
        with pytest.raises(InputError, match=told):
            run_chat.main(run_chat.parse_args([model, *options]))


def test_a_page_that_cannot_open_says_so_before_any_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_chat.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").write_text("x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options, told in (
            ([f"--port={port}"], f"--port={port} on --host=127.0.0.1: cannot be opened"),
            (["--host=192.0.2.1"], "--host=192.0.2.1: cannot be opened"),
            (["--host=no such name"], "--host=no such name: is no address"),
            ([f"--feedback_dir={tmp_path}/file"], "file is a file; name a folder"),
        ):
            with pytest.raises(InputError, match=re.escape(told)):
                run_chat.main(run_chat.parse_args(["--model_path=A=x", "--web", *options]))


def test_without_gradio_the_page_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(run_chat.importlib.util, "find_spec", lambda name: None)
    command = f"{sys.executable} -m pip install -r requirements-chat.txt"
    with pytest.raises(InputError, match=f"--web needs gradio: {re.escape(command)}"):
        run_chat.main(run_chat.parse_args(["--model_path=A=x", "--web"]))


def test_only_addresses_of_this_machine_need_no_warning():
    assert all(map(run_chat.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(run_chat.is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.com")))
