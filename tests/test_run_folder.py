"""Run folders: one process each, never overwritten, and `best` always one of the checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpoints import content_of, model_name, weights_fingerprint
from rlhf.disk import Lock, link
from rlhf.earlier import EARLIER, move_to_earlier
from rlhf.errors import InputError, RunError
from rlhf.run_folder import RunFolder
from tests.test_checkpoints import Interrupted

ARGUMENTS = {"seed": 42, "max_len": 64, "use_peft": False}
DATA = {"train.jsonl": "abc", "eval.jsonl": "def"}


def build_run(path: Path, resume: str = "auto", **inputs: str) -> RunFolder:
    return RunFolder(
        str(path),
        stage="sft",
        inputs={"--model_id": "openai-community/gpt2", "--data_dir": "nowhere/sft", **inputs},
        arguments=ARGUMENTS,
        defaults={},
        data=DATA,
        resume=resume,
    )


def open_run(path: Path) -> RunFolder:
    """Start a run; another may start there as soon as nobody holds this one."""
    folder = build_run(path, "never")
    with folder:
        folder.start()
    return folder


def save_losses(folder: RunFolder, model: Any, tokenizer: Any, losses: list[float]) -> None:
    for epoch, loss in enumerate(losses, start=1):
        folder.save_epoch(
            model,
            tokenizer,
            epoch=epoch,
            figure=f"loss={loss:.4f}",
            objective=loss,
            facts={"metrics": {"eval_loss": loss}, "before_training": {"eval_loss": 7.5}},
        )


def names(folder: Path) -> list[str]:
    """What is in a folder, but for what a run notes for itself."""
    return sorted(e.name for e in folder.iterdir() if e.name not in (".resume", ".lock"))


def test_a_checkpoint_is_a_plain_folder_that_other_tools_load(gpt2, tokenizer, tmp_path):
    folder = open_run(tmp_path / "sft")
    save_losses(folder, gpt2, tokenizer, [2.5])
    path = tmp_path / "sft" / "gpt2_sft_epoch=1_loss=2.5000"
    assert names(tmp_path / "sft") == ["best", path.name]
    assert {"config.json", "model.safetensors", "run.json", "tokenizer.json"} <= set(names(path))
    assert not [file for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    model = AutoModelForCausalLM.from_pretrained(path)
    assert weights_fingerprint(model) == weights_fingerprint(gpt2)
    theirs, text = AutoTokenizer.from_pretrained(path), "The cat <response>sat</response>."
    assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert theirs.chat_template == tokenizer.chat_template is not None


def test_run_json_tells_where_a_checkpoint_comes_from(gpt2, tokenizer, tmp_path):
    folder = open_run(tmp_path)
    save_losses(folder, gpt2, tokenizer, [2.5])
    run = json.loads((tmp_path / "best" / "run.json").read_text(encoding="utf-8"))
    versions, commit = run.pop("versions"), run.pop("git_commit")
    assert run == {
        "stage": "sft",
        "model": "gpt2",
        "arguments": ARGUMENTS,
        "parent": "openai-community/gpt2",
        "parent_content": content_of("openai-community/gpt2"),
        "base_model": "openai-community/gpt2",
        "other_inputs": {},
        "data": DATA,
        "data_origin": {"split": "sft"},
        "epoch": 1,
        "metrics": {"eval_loss": 2.5},
        "before_training": {"eval_loss": 7.5},
    }
    assert versions["torch"] == torch.__version__ and {"python", "transformers"} <= set(versions)
    assert commit is None or len(commit) == 40


@pytest.mark.parametrize("victim", ["model", "tokenizer"])
def test_a_crash_while_saving_leaves_no_checkpoint_and_no_best(
    victim, gpt2, tokenizer, tmp_path, monkeypatch
):
    folder = open_run(tmp_path)
    objects = {"model": gpt2, "tokenizer": tokenizer}
    whole = type(objects[victim]).save_pretrained

    def half(self: Any, path: Path, **options: Any) -> None:
        whole(self, path, **options)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(type(objects[victim]), "save_pretrained", half)
        with pytest.raises(Interrupted):
            save_losses(folder, gpt2, tokenizer, [2.5])
    assert [name for name in names(tmp_path) if not name.endswith(".tmp")] == []
    # What the crash left doesn't end up in the next attempt.
    (left,) = tmp_path.glob(".*.tmp")
    (left / "stale.txt").write_text("stale")
    save_losses(folder, gpt2, tokenizer, [2.5])
    assert names(tmp_path) == ["best", "gpt2_sft_epoch=1_loss=2.5000"]
    assert not (tmp_path / "best" / "stale.txt").exists()


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([3.0, 2.0, 1.0], 3),
        ([1.0, 1.0], 1),  # of equal ones the first: less training for the same
        ([-1.0, -2.0], 2),  # PPO's objective is the negated one
    ],
)
def test_best_is_a_relative_link_to_the_lowest_objective(
    losses, best, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.run_folder.save_checkpoint", lambda folder, name, **_: folder / name)
    save_losses(open_run(tmp_path), None, tokenizer, losses)
    assert os.readlink(tmp_path / "best") == f"gpt2_sft_epoch={best}_loss={losses[best - 1]:.4f}"


@pytest.mark.claim(25)
@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_an_epoch_that_cannot_be_judged_stops_the_run_before_it_is_saved(
    loss, gpt2, tokenizer, tmp_path
):
    folder = open_run(tmp_path)
    save_losses(folder, gpt2, tokenizer, [1.0])
    with pytest.raises(RunError, match=f"epoch 1: the evaluation gave loss={loss:.4f}"):
        save_losses(folder, gpt2, tokenizer, [loss])
    assert names(tmp_path) == ["best", "gpt2_sft_epoch=1_loss=1.0000"]


def test_best_is_valid_at_every_moment(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    link(tmp_path / "best", "first")
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        assert (tmp_path / "best").resolve().name == "first"
        replace(source, target)
        assert (tmp_path / "best").resolve().name == "second"

    monkeypatch.setattr(os, "replace", watched)
    (tmp_path / ".best.tmp").symlink_to("nowhere")  # left by a crash
    link(tmp_path / "best", "second")
    assert names(tmp_path) == ["best", "first", "second"]


def test_a_moved_run_keeps_a_valid_best(gpt2, tokenizer, tmp_path):
    save_losses(open_run(tmp_path), gpt2, tokenizer, [2.5])
    open_run(tmp_path)
    assert model_name(str(tmp_path / EARLIER / "1" / "best"), flag="--x") == "gpt2"


def test_an_earlier_run_is_moved_whole_and_never_overwritten(tmp_path):
    folder = tmp_path / "ppo"
    folder.mkdir()
    assert move_to_earlier(folder) == "" and names(folder) == []
    for run in ("one", "two"):
        (folder / "gpt2_ppo_epoch=1_reward=1.00").mkdir()
        (folder / "gpt2_ppo_epoch=1_reward=1.00" / "run.json").write_text(run)
        (folder / "metrics.jsonl").write_text(run)
        (folder / ".resume").mkdir()
        (folder / "best").symlink_to("gpt2_ppo_epoch=1_reward=1.00")
        number = "1" if run == "one" else "2"
        line = move_to_earlier(folder)
        assert line == f"the earlier run in {folder} is now in {folder / EARLIER / number}"
        assert names(folder) == [EARLIER]
    for number, run in (("1", "one"), ("2", "two")):
        moved = folder / EARLIER / number
        assert names(moved) == ["best", "gpt2_ppo_epoch=1_reward=1.00", "metrics.jsonl"]
        assert (moved / ".resume").is_dir()
        assert (moved / "best" / "run.json").read_text() == run
        assert (moved / "metrics.jsonl").read_text() == run
    assert move_to_earlier(folder) == ""  # nothing but earlier runs: nothing to move


def test_nothing_is_written_or_moved_before_the_start(tmp_path):
    with build_run(tmp_path / "sft") as folder:
        assert names(tmp_path) == []
        assert folder.start() == "" and names(tmp_path) == ["sft"]
    (tmp_path / "sft" / "metrics.jsonl").touch()
    with build_run(tmp_path / "sft", "never") as folder:
        assert names(tmp_path / "sft") == ["metrics.jsonl"]
        assert str(tmp_path / "sft" / EARLIER / "1") in folder.start()
    assert sorted(os.listdir(tmp_path / "sft")) == [".resume", EARLIER]  # the lock is gone


def test_a_run_that_must_go_on_is_refused_where_there_is_none(tmp_path):
    for resume in ("auto", "never"):
        build_run(tmp_path, resume)
    with pytest.raises(InputError, match="--resume=must: "):
        build_run(tmp_path / "sft", "must")
    assert names(tmp_path) == []


@pytest.mark.parametrize("foreign", ["README.md", ".git", "sft", ".env"])
def test_what_no_run_wrote_is_never_moved(foreign, tmp_path):
    (tmp_path / foreign).mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match=f"--ckpt_dir={tmp_path}: holds {foreign}, "):
        build_run(tmp_path)
    assert names(tmp_path) == sorted([foreign, "metrics.jsonl"])


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "sft").touch()
    with pytest.raises(InputError, match=r"--ckpt_dir=.*/sft: is a file"):
        build_run(tmp_path / "sft")


def test_what_a_run_reads_never_moves_away_under_it(gpt2, tokenizer, tmp_path):
    folder = open_run(tmp_path / "sft")
    save_losses(folder, gpt2, tokenizer, [2.5])
    best = str(tmp_path / "sft/best")
    with pytest.raises(InputError, match=f"--sft_model_path={best} lies in --ckpt_dir="):
        build_run(tmp_path / "sft", **{"--sft_model_path": best})
    open_run(tmp_path / "sft")  # once it stands in earlier/ it stays where it is
    best = f"{tmp_path}/sft/earlier/1/best"
    build_run(tmp_path / "sft", "never", **{"--sft_model_path": best})


def test_a_folder_that_happens_to_be_called_earlier_protects_nothing(gpt2, tokenizer, tmp_path):
    folder = open_run(tmp_path / "earlier/sft")
    save_losses(folder, gpt2, tokenizer, [2.5])
    with pytest.raises(InputError, match="lies in --ckpt_dir="):
        build_run(tmp_path / "earlier/sft", **{"--x": str(tmp_path / "earlier/sft/best")})


def test_earlier_runs_are_counted_on_from_the_highest_number(tmp_path):
    for name in ("3", "notes"):
        (tmp_path / EARLIER / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    move_to_earlier(tmp_path)
    assert names(tmp_path / EARLIER) == ["3", "4", "notes"]


def test_of_several_processes_the_main_one_alone_locks_links_and_writes(
    gpt2, tokenizer, tmp_path, monkeypatch
):
    save_losses(open_run(tmp_path), gpt2, tokenizer, [2.5])
    best = os.readlink(tmp_path / "best")
    (tmp_path / "best").unlink()
    with Lock(tmp_path, flag="--ckpt_dir"):  # as the main process may, while another one starts
        with pytest.raises(InputError, match="is in use by"):
            build_run(tmp_path, "never")
        monkeypatch.setattr("rlhf.run_folder.is_main_process", lambda: False)
        folder = build_run(tmp_path, "never")
    before = names(tmp_path)
    folder.restore_best(best, 2.5)
    save_losses(folder, gpt2, tokenizer, [1.5])
    assert names(tmp_path) == before == [best]
