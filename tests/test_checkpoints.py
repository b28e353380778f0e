"""Checkpoints: whole or absent, described, and as they were written when they are read."""

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from rlhf.checkpoints import (
    load_tensors,
    model_name,
    named_checkpoint,
    read_run,
    require_undamaged,
    save_checkpoint,
    save_tensors,
    weights_fingerprint,
)
from rlhf.disk import sha256_of, without_nan
from rlhf.errors import InputError, RunError
from tests.conftest import build_gpt2

CPU = torch.device("cpu")


class Interrupted(BaseException):
    """Stands for whatever may end a process."""


def test_numbers_that_json_cannot_hold_become_null(gpt2, tokenizer, tmp_path):
    run = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), "é")}}
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run=run)
    text = (path / "run.json").read_text(encoding="utf-8")
    assert "é" in text and text.endswith("}\n")
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": [None, "é"]}}


def test_only_numbers_that_are_not_finite_are_replaced():
    value = {"n": np.float64("nan"), "i": 3, "t": True, "s": "nan", "none": None, "z": 0.0}
    assert without_nan(value) == {**value, "n": None}


def test_a_crash_before_run_json_is_written_leaves_no_checkpoint(gpt2, tokenizer, tmp_path):
    with pytest.raises(TypeError):  # a set is nothing that JSON can hold
        save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={"a": {1}})
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_an_error_in_one_line(gpt2, tokenizer, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rlhf.checkpoints.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(RunError, match=r"/t: cannot be written .*No space left"):
        save_tensors(tmp_path / "t", {}, {})
    with pytest.raises(RunError, match=r"/x: cannot be written .*No space left"):
        save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})


def test_parent_is_the_checkpoint_that_best_named(tmp_path, monkeypatch):
    (tmp_path / "sft/one").mkdir(parents=True)
    (tmp_path / "sft/best").symlink_to("one")
    assert named_checkpoint(f"{tmp_path}/sft/best") == f"{tmp_path}/sft/one"
    monkeypatch.chdir(tmp_path)
    assert named_checkpoint("sft/best") == "sft/one"
    assert named_checkpoint("openai-community/gpt2") == "openai-community/gpt2"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_lets(umask, gpt2, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})
        save_tensors(tmp_path / "t", {"a": torch.ones(2)}, {})
        assert os.umask(umask) == umask  # looked at, and put back
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
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
def test_tensors_come_back_bit_for_bit_with_their_facts(tmp_path):
    folder = tmp_path / ".resume" / "ref_logprobs"
    assert load_tensors(folder, device=CPU) is None
    tensors = {"train": torch.tensor([[-1.5, -2.25]]), "eval": torch.tensor([[0.1, 1e-30]])}
    save_tensors(folder, tensors, {"made_from": "a"})
    loaded, facts = load_tensors(folder, device=CPU)
    assert facts == {"made_from": "a"} and set(loaded) == {"train", "eval"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    # They can be replaced while what was read is in use.
    save_tensors(folder, {"train": torch.zeros(1)}, {"made_from": "b"})
    assert torch.equal(loaded["train"], tensors["train"])
    assert load_tensors(folder, device=CPU)[1] == {"made_from": "b"}
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.claim(22)
def test_a_crash_while_saving_tensors_keeps_the_old_ones(tmp_path, monkeypatch):
    save_tensors(tmp_path / "t", {"a": torch.ones(1)}, {})

    def half(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("rlhf.checkpoints.save_file", half)
        with pytest.raises(Interrupted):
            save_tensors(tmp_path / "t", {"a": torch.zeros(1)}, {})
    assert load_tensors(tmp_path / "t", device=CPU)[0]["a"].item() == 1.0
    save_tensors(tmp_path / "t", {"a": torch.zeros(1)}, {})  # what the crash left is no obstacle
    assert load_tensors(tmp_path / "t", device=CPU)[0]["a"].item() == 0.0


@pytest.mark.claim(25)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_is_not_finite_reaches_the_disk(value, tokenizer, tmp_path):
    model = build_gpt2(tokenizer)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    with pytest.raises(RunError, match=r"h\.1\.mlp\.c_fc\.weight is not finite; nothing was saved"):
        save_checkpoint(tmp_path, "x", model=model, tokenizer=tokenizer, run={})
    with pytest.raises(RunError, match="moment is not finite; nothing was saved"):
        save_tensors(tmp_path / "t", {"moment": torch.tensor([1.0, value])}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "run.json"])
def test_one_flipped_bit_or_a_missing_file_is_named(name, gpt2, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})
    require_undamaged(str(path), flag="--x")
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 4
    (path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"--x={path}: is damaged: {name} has changed; "):
        require_undamaged(str(path), flag="--x")
    (path / name).unlink()
    with pytest.raises(InputError, match=f"is damaged: {name} is missing; "):
        require_undamaged(str(path), flag="--x")


def test_a_checkpoint_of_ours_has_checksums_and_a_foreign_one_needs_none(gpt2, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})
    (path / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="its SHA256SUMS cannot be read"):
        require_undamaged(str(path), flag="--x")
    (path / "run.json").unlink()
    for foreign in (path, tmp_path / "nowhere", "openai-community/gpt2"):
        require_undamaged(str(foreign), flag="--x")


def test_a_card_has_a_checksum_and_may_be_edited_or_removed(gpt2, tokenizer, tmp_path):
    cards = {"README.md": "ours\n"}
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={}, cards=cards)
    assert f"{sha256_of(path / 'README.md')}  README.md\n" in (path / "SHA256SUMS").read_text()
    (path / "README.md").write_text("a model card of one's own")
    require_undamaged(str(path), flag="--x")
    save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={}, cards=cards)
    assert (path / "README.md").read_text() == "a model card of one's own"  # nothing else differs
    (path / "README.md").unlink()
    require_undamaged(str(path), flag="--x")


def test_checksums_are_those_that_sha256sum_checks(gpt2, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, "x", model=gpt2, tokenizer=tokenizer, run={})
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=path, check=True)


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


def test_the_command_that_is_told_renews_the_checksums(gpt2, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, "a b", model=gpt2, tokenizer=tokenizer, run={})
    (path / "within").mkdir()
    (path / "within/more.txt").write_text("as in adapter/")
    (path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json has changed") as caught:
        require_undamaged(str(path), flag="--x")
    subprocess.run(str(caught.value).partition("yourself, run ")[2], shell=True, check=True)
    require_undamaged(str(path), flag="--x")
    (path / "within/more.txt").write_text("other")
    with pytest.raises(InputError, match=r"within/more\.txt has changed"):
        require_undamaged(str(path), flag="--x")
