"""Ids that were kept: the same as new ones, and used only for what they were made of."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

import run_sft
from rlhf import token_cache
from rlhf.records import fingerprint
from rlhf.tokens import encode_samples, encode_texts

TEXTS = ["A cat.", "", "Two <b>dogs</b>", "Ünï\ud800"]


@pytest.fixture(autouse=True)
def keep_few(monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST_TEXTS", 1)


@pytest.fixture
def counted(tokenizer):
    """A way to tokenise that counts how often it is taken."""

    def encode(texts):
        encode.calls += 1
        return encode_texts(tokenizer, texts)

    encode.calls = 0
    return encode


def caches(folder: Path) -> list[Path]:
    return sorted((folder / token_cache.FOLDER).iterdir())


def test_kept_ids_are_those_that_were_made(tokenizer, counted, tmp_path):
    texts = TEXTS[:3]
    made, kept = (token_cache.cached_ids(tokenizer, texts, counted, tmp_path) for _ in range(2))
    assert made == kept == encode_texts(tokenizer, texts) and counted.calls == 1
    assert all(type(i) is int for row in kept for i in row)
    assert [path.suffix for path in caches(tmp_path)] == [".safetensors"]


def test_a_key_is_of_each_text_their_order_and_the_whole_tokenizer(tokenizer, base_tokenizer):
    keys = {
        token_cache.key_of(*facts)
        for facts in (
            (tokenizer, TEXTS),
            (base_tokenizer, TEXTS),
            (tokenizer, TEXTS[::-1]),
            (tokenizer, [*TEXTS, ""]),
            (tokenizer, ["A cat.Two", "", " <b>dogs</b>", TEXTS[3]]),
        )
    }
    assert len(keys) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not safetensors", "another type"])
def test_a_damaged_cache_is_made_again(tokenizer, counted, tmp_path, damage):
    texts = TEXTS[:3]
    token_cache.cached_ids(tokenizer, texts, counted, tmp_path)
    (path,) = caches(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    new = {"cut": whole[:-5], "flipped": flipped, "empty": b"", "not safetensors": b"x" * 99}
    new["another type"] = whole.replace(b'"I32"', b'"F32"')
    path.write_bytes(new[damage])
    ids = token_cache.cached_ids(tokenizer, texts, counted, tmp_path)
    assert ids == encode_texts(tokenizer, texts) and counted.calls == 2
    assert path.read_bytes() == whole


def test_a_folder_that_takes_no_cache_stops_nothing(tokenizer, counted, tmp_path, monkeypatch):
    (tmp_path / token_cache.FOLDER).write_text("in the way")
    texts = TEXTS[:3]
    expected = encode_texts(tokenizer, texts)
    assert token_cache.cached_ids(tokenizer, texts, counted, tmp_path) == expected
    (tmp_path / token_cache.FOLDER).unlink()

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(token_cache, "save_file", full)
    assert token_cache.cached_ids(tokenizer, texts, counted, tmp_path) == expected
    assert caches(tmp_path) == []


def test_only_the_newest_caches_stay(tokenizer, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MOST_FILES", 3)
    for text in "abcab":  # a and b are used again, and so c is the oldest
        token_cache.cached_ids(tokenizer, [text], counted, tmp_path)
    token_cache.cached_ids(tokenizer, ["d"], counted, tmp_path)
    assert len(caches(tmp_path)) == 3 and counted.calls == 4
    for text in "abd":
        token_cache.cached_ids(tokenizer, [text], counted, tmp_path)
    assert counted.calls == 4


def test_few_texts_and_texts_without_a_folder_are_not_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST_TEXTS", 3)
    encode_texts(tokenizer, TEXTS[:2], tmp_path)
    encode_samples(tokenizer, TEXTS[:3], TEXTS[:3], max_len=64, min_len=1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_kept_ids_writes_the_same_bytes(base_path, data_dir, tmp_path):
    before = fingerprint(data_dir / "sft")
    weights = []
    for name in ("made", "kept"):
        options = [f"--model_id={base_path}", f"--data_dir={data_dir}/sft", "--max_len=64"]
        options += [f"--ckpt_dir={tmp_path}/{name}", "--max_steps=2", "--batch_size=4"]
        run_sft.main(run_sft.parse_args(options))
        weights.append((tmp_path / name / "best/model.safetensors").read_bytes())
    assert weights[0] == weights[1] and fingerprint(data_dir / "sft") == before
    assert caches(data_dir / "sft")
