"""Checkpoints: whole or absent, described, never overwritten, and `best` always one of them."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpoints import (
    EARLIER,
    RunFolder,
    link_best,
    load_tensors,
    model_name,
    named_checkpoint,
    read_run,
    save_checkpoint,
    save_tensors,
    start_run_folder,
    weights_fingerprint,
    without_nan,
)
from rlhf.errors import InputError, RunError

CPU = torch.device("cpu")


def build_run(path: Path, resume: str = "auto", **inputs: str) -> RunFolder:
    return RunFolder(
        str(path),
        stage="sft",
        inputs={"--model_id": "openai-community/gpt2", **inputs},
        arguments={"seed": 42},
        data={"train.jsonl": "abc"},
        resume=resume,
    )


def open_run(path: Path) -> RunFolder:
    folder = build_run(path)
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
            facts={"metrics": {"eval_loss": loss}},
        )


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Interrupted(BaseException):
    """Stands for whatever may end a process."""


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
        "arguments": {"seed": 42},
        "parent": "openai-community/gpt2",
        "data": {"train.jsonl": "abc"},
        "epoch": 1,
        "metrics": {"eval_loss": 2.5},
    }
    assert versions["torch"] == torch.__version__ and {"python", "transformers"} <= set(versions)
    assert commit is None or len(commit) == 40


def test_numbers_that_json_cannot_hold_become_null(gpt2, tokenizer, tmp_path):
    run = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), "é")}}
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run=run)
    text = (path / "run.json").read_text(encoding="utf-8")
    assert "é" in text and text.endswith("}\n")
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": [None, "é"]}}


def test_only_numbers_that_are_not_finite_are_replaced():
    value = {"n": np.float64("nan"), "i": 3, "t": True, "s": "nan", "none": None, "z": 0.0}
    assert without_nan(value) == {**value, "n": None}


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
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []
    # What the crash left doesn't end up in the next attempt.
    (left,) = tmp_path.iterdir()
    (left / "stale.txt").write_text("stale")
    save_losses(folder, gpt2, tokenizer, [2.5])
    assert names(tmp_path) == ["best", "gpt2_sft_epoch=1_loss=2.5000"]
    assert not (tmp_path / "best" / "stale.txt").exists()


def test_a_crash_before_run_json_is_written_leaves_no_checkpoint(gpt2, tokenizer, tmp_path):
    with pytest.raises(TypeError):  # a set is nothing that JSON can hold
        save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={"a": {1}})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([3.0, 2.0, 1.0], 3),
        ([1.0, 1.0], 1),  # of equal ones the first: less training for the same
        ([-1.0, -2.0], 2),  # PPO's objective is the negated one
    ],
)
def test_best_is_a_relative_link_to_the_lowest_objective(losses, best, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.checkpoints.save_checkpoint", lambda folder, name, **_: folder / name)
    save_losses(open_run(tmp_path), None, None, losses)
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


def test_a_full_disk_is_an_error_in_one_line(gpt2, tokenizer, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rlhf.checkpoints.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(RunError, match=r"t\.safetensors: cannot be written .*No space left"):
        save_tensors(tmp_path / "t.safetensors", {}, fingerprint="f")
    with pytest.raises(RunError, match=r"/x: cannot be written .*No space left"):
        save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})


def test_best_is_valid_at_every_moment(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    link_best(tmp_path, "first")
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        assert (tmp_path / "best").resolve().name == "first"
        replace(source, target)
        assert (tmp_path / "best").resolve().name == "second"

    monkeypatch.setattr(os, "replace", watched)
    (tmp_path / ".best.tmp").symlink_to("nowhere")  # left by a crash
    link_best(tmp_path, "second")
    assert names(tmp_path) == ["best", "first", "second"]


def test_a_moved_run_keeps_a_valid_best(gpt2, tokenizer, tmp_path):
    save_losses(open_run(tmp_path), gpt2, tokenizer, [2.5])
    open_run(tmp_path)
    assert model_name(str(tmp_path / EARLIER / "1" / "best"), flag="--x") == "gpt2"


def test_an_earlier_run_is_moved_whole_and_never_overwritten(tmp_path):
    folder = tmp_path / "ppo"
    assert start_run_folder(folder) == "" and names(folder) == []
    for run in ("one", "two"):
        (folder / "gpt2_ppo_epoch=1_reward=1.00").mkdir()
        (folder / "gpt2_ppo_epoch=1_reward=1.00" / "run.json").write_text(run)
        (folder / "metrics.jsonl").write_text(run)
        (folder / ".resume").mkdir()
        (folder / "best").symlink_to("gpt2_ppo_epoch=1_reward=1.00")
        number = "1" if run == "one" else "2"
        line = start_run_folder(folder)
        assert line == f"the earlier run in {folder} is now in {folder / EARLIER / number}"
        assert names(folder) == [EARLIER]
    for number, run in (("1", "one"), ("2", "two")):
        moved = folder / EARLIER / number
        assert names(moved) == [".resume", "best", "gpt2_ppo_epoch=1_reward=1.00", "metrics.jsonl"]
        assert (moved / "best" / "run.json").read_text() == run
        assert (moved / "metrics.jsonl").read_text() == run
    assert start_run_folder(folder) == ""  # nothing but earlier runs: nothing to move


def test_nothing_is_written_or_moved_before_the_start(tmp_path):
    folder = build_run(tmp_path / "sft")
    assert names(tmp_path) == []
    assert folder.start() == "" and names(tmp_path) == ["sft"]
    (tmp_path / "sft" / "metrics.jsonl").touch()
    folder = build_run(tmp_path / "sft")
    assert names(tmp_path / "sft") == ["metrics.jsonl"]
    assert str(tmp_path / "sft" / EARLIER / "1") in folder.start()


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
    folder.start()  # once it stands in earlier/ it stays where it is
    build_run(tmp_path / "sft", **{"--sft_model_path": f"{tmp_path}/sft/earlier/1/best"})


def test_a_folder_that_happens_to_be_called_earlier_protects_nothing(gpt2, tokenizer, tmp_path):
    folder = open_run(tmp_path / "earlier/sft")
    save_losses(folder, gpt2, tokenizer, [2.5])
    with pytest.raises(InputError, match="lies in --ckpt_dir="):
        build_run(tmp_path / "earlier/sft", **{"--x": str(tmp_path / "earlier/sft/best")})


def test_parent_is_the_checkpoint_that_best_named(tmp_path, monkeypatch):
    (tmp_path / "sft/one").mkdir(parents=True)
    (tmp_path / "sft/best").symlink_to("one")
    assert named_checkpoint(f"{tmp_path}/sft/best") == f"{tmp_path}/sft/one"
    monkeypatch.chdir(tmp_path)
    assert named_checkpoint("sft/best") == "sft/one"
    assert named_checkpoint("openai-community/gpt2") == "openai-community/gpt2"


def test_earlier_runs_are_counted_on_from_the_highest_number(tmp_path):
    for name in ("3", "notes"):
        (tmp_path / EARLIER / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    start_run_folder(tmp_path)
    assert names(tmp_path / EARLIER) == ["3", "4", "notes"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_lets(umask, gpt2, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})
        save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)}, fingerprint="f")
        assert os.umask(umask) == umask  # looked at, and put back
    finally:
        os.umask(before)
    files = [tmp_path / "t.safetensors", *(file for file in path.rglob("*") if file.is_file())]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


def test_model_is_named_by_run_json_and_else_by_its_path(tmp_path, monkeypatch):
    folder = tmp_path / "gpt2-tiny" / "epoch=1"
    folder.mkdir(parents=True)
    assert model_name("openai-community/gpt2", flag="--x") == "gpt2"
    assert model_name("gpt2", flag="--x") == "gpt2"
    assert model_name(f"{folder.parent}", flag="--x") == "gpt2-tiny"
    assert model_name(f"{folder.parent}/", flag="--x") == "gpt2-tiny"
    monkeypatch.chdir(folder)
    assert model_name("..", flag="--x") == "gpt2-tiny"
    assert model_name(".", flag="--x") == "epoch=1"
    for text, name in (('{"model": "llama"}', "llama"), ('{"model": 3}', "epoch=1")):
        (folder / "run.json").write_text(text)
        assert model_name(str(folder), flag="--x") == name


def test_a_missing_run_json_is_no_error_and_a_broken_one_is(tmp_path):
    assert read_run("openai-community/gpt2", flag="--x") == {}
    assert read_run(str(tmp_path), flag="--x") == {}
    file = tmp_path / "run.json"
    for data, message in (
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            read_run(str(tmp_path), flag="--sft_model_path")
        assert f"--sft_model_path={tmp_path}: {file} " in str(caught.value)


@pytest.mark.claim(22)
def test_tensors_come_back_only_for_what_they_were_made_from(tmp_path):
    path = tmp_path / ".resume" / "ref_logprobs.safetensors"
    assert load_tensors(path, fingerprint="a", device=CPU) is None
    tensors = {"train": torch.tensor([[-1.5, -2.25]]), "eval": torch.tensor([[0.1, 1e-30]])}
    save_tensors(path, tensors, fingerprint="a")
    loaded = load_tensors(path, fingerprint="a", device=CPU)
    assert loaded is not None and set(loaded) == {"train", "eval"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert load_tensors(path, fingerprint="b", device=CPU) is None
    # The file can be replaced while what was read from it is in use.
    save_tensors(path, {"train": torch.zeros(1)}, fingerprint="b")
    assert torch.equal(loaded["train"], tensors["train"])
    assert load_tensors(path, fingerprint="a", device=CPU) is None
    assert names(path.parent) == [path.name]


@pytest.mark.claim(22)
def test_a_crash_while_saving_tensors_keeps_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(1)}, fingerprint="f")

    def half(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise Interrupted

    monkeypatch.setattr("rlhf.checkpoints.save_file", half)
    with pytest.raises(Interrupted):
        save_tensors(path, {"a": torch.zeros(1)}, fingerprint="f")
    loaded = load_tensors(path, fingerprint="f", device=CPU)
    assert loaded is not None and loaded["a"].item() == 1.0


@pytest.mark.claim(22)
def test_one_bit_of_one_weight_changes_the_fingerprint(gpt2):
    before = weights_fingerprint(gpt2)
    assert weights_fingerprint(gpt2) == before and len(before) == 64
    weight = gpt2.transformer.h[1].mlp.c_fc.weight.data
    bits = weight.view(torch.int32)
    bits[3, 5] ^= 1
    assert weights_fingerprint(gpt2) != before
    bits[3, 5] ^= 1
    assert weights_fingerprint(gpt2) == before


@pytest.mark.claim(22)
def test_the_same_weights_under_other_names_have_another_fingerprint():
    layer = torch.nn.Linear(2, 2)
    one, other = torch.nn.ModuleDict({"a": layer}), torch.nn.ModuleDict({"b": layer})
    assert weights_fingerprint(one) != weights_fingerprint(other)
