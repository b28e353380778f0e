"""What is written can be read, and what cannot be a record ends in one line that says where."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.records import (
    PAIR,
    SCORED,
    fingerprint,
    holds_pairs,
    pair_record,
    prompt_text,
    read_manifest,
    read_split,
    replace_splits,
    score_scale,
    scored_records,
    write_records,
)
from rlhf.sources import parse_row

TALK = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]


def scored(**changes: Any) -> dict[str, Any]:
    record = {"prompt": "Why?", "response": "So.", "score": 7.0, "source": "s", "prompt_id": "1"}
    return record | changes


def pair(**changes: Any) -> dict[str, Any]:
    record = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "chosen_score": 7.0}
    return record | {"rejected_score": 2.5, "source": "s", "prompt_id": "1"} | changes


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def split_with(folder: Path, data: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def flaw_of(folder: Path, schema: Any = SCORED, side: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        read_split(folder, side, schema)
    message = str(caught.value)
    assert f"--data_dir={folder}" in message
    assert "exec_load_dataset.sh" in message
    return message


# --- a round trip


def test_written_records_are_read_back_unchanged(tmp_path):
    strange = 'Zoë 猫 🙂 \u2028 \x85 "quoted" \\ </response> \t\r\n end'
    records = [scored(prompt=strange, response=strange), scored(prompt=TALK, score=10)]
    assert write_records(tmp_path / "train.jsonl", records) == 2
    assert read_split(tmp_path, "train", SCORED) == records
    pairs = [pair(prompt=TALK), pair(chosen=strange)]
    write_records(tmp_path / "eval.jsonl", pairs)
    assert read_split(tmp_path, "eval", PAIR) == pairs


def test_files_are_utf8_with_one_object_a_line(tmp_path):
    write_records(tmp_path / "train.jsonl", [{"b": "猫\n", "a": 1.0}, {}])
    expected = '{"b": "猫\\n", "a": 1.0}\n{}\n'
    assert (tmp_path / "train.jsonl").read_bytes() == expected.encode()


def test_a_records_files_own_fields_and_no_others_are_read(tmp_path):
    split_with(tmp_path, json.dumps(scored(note="mine", id=3)))
    assert read_split(tmp_path, "train", SCORED) == [scored()]


def test_ones_own_file_needs_no_source_no_prompt_id_and_no_manifest(tmp_path):
    own = {"prompt": "Why?", "response": "So.", "score": 7}
    split_with(
        tmp_path, "\ufeff" + json.dumps(own) + "\n\n" + json.dumps(own | {"prompt": "WHY? "})
    )
    first, second = read_split(tmp_path, "train", SCORED)
    assert first["source"] == "user"
    assert first["prompt_id"] == second["prompt_id"] != ""
    assert isinstance(first["score"], float)


def test_max_samples_reads_the_first_records_only(tmp_path):
    lines = [json.dumps(scored(prompt=text)) for text in "abc"]
    split_with(tmp_path, "\n".join([*lines, "broken"]))
    assert [r["prompt"] for r in read_split(tmp_path, "train", SCORED, max_samples=2)] == ["a", "b"]
    assert "line 4" in flaw_of(tmp_path)


# --- what is wrong with a line


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1], "expected a JSON object, not [1]"),
        (None, "expected a JSON object, not None"),
        (
            without(scored(), "response"),
            "--data_dir=.data/rm or .data/sft), only ['prompt', 'score'",
        ),
        (pair(), "has no 'response'"),
        (scored(prompt=""), "prompt is empty"),
        (scored(prompt=5), "prompt is not a text"),
        (scored(prompt=TALK[:2]), "do not alternate"),
        (scored(prompt=[]), "do not alternate"),
        (scored(prompt=[{"role": "user"}]), "a message of the prompt is not a text"),
        (scored(prompt="\ud800"), "prompt holds a lone surrogate"),
        (scored(response=None), "response is not a text: None"),
        (scored(response=" "), "response is empty: ' '"),
        (scored(response="\ud800"), "response holds a lone surrogate"),
        (scored(score="7"), "score is '7', expected a number from 1 to 10"),
        (scored(score=True), "score is True"),
        (scored(score=None), "score is None"),
        (scored(score=float("nan")), "score is nan"),
        (scored(score=float("inf")), "score is inf"),
        (scored(score=10**400), "score is 1000"),
        (scored(score=0.9), "score is 0.9"),
        (scored(score=10.1), "score is 10.1"),
        (scored(source=None), "source is not a text"),
        (scored(prompt_id=3), "prompt_id is not a text: 3"),
    ],
)
def test_a_row_that_is_no_scored_record_is_named(tmp_path, row, told):
    split_with(tmp_path, json.dumps(scored()) + "\n\n" + json.dumps(row))
    message = flaw_of(tmp_path)
    assert "train.jsonl line 3" in message
    assert told in message


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (scored(), "has no 'chosen'"),
        (pair(rejected=""), "rejected is empty"),
        (pair(rejected_score="2"), "rejected_score is '2'"),
        (pair(chosen_score=2.0), "chosen is scored below rejected"),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, row, told):
    split_with(tmp_path, json.dumps(row))
    assert told in flaw_of(tmp_path, PAIR)


@pytest.mark.parametrize(
    "line", [b"{", b'{"prompt": "\xff"}', b"[" * 100_000, b"9" * 5_000, b"\x00"]
)
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    split_with(tmp_path, line + b"\n")
    assert "train.jsonl line 1: " in flaw_of(tmp_path)


def test_an_absent_or_empty_split_says_how_to_make_it(tmp_path):
    assert f"there is no {tmp_path / 'sft' / 'eval.jsonl'}" in flaw_of(
        tmp_path / "sft", side="eval"
    )
    split_with(tmp_path / "sft", "\n \n")
    assert "is empty" in flaw_of(tmp_path / "sft")


# --- the manifest


def test_the_manifest_beside_the_split_sets_the_scale(tmp_path):
    folder = split_with(tmp_path / "rm", json.dumps(scored(score=0.25)))
    assert read_manifest(folder) == {}
    assert score_scale(folder) == (1.0, 10.0)
    (tmp_path / "manifest.json").write_text('{"score_scale": [0, 1]}')
    assert read_manifest(folder) == {"score_scale": [0, 1]}
    assert score_scale(folder) == (0.0, 1.0)
    assert read_split(folder, "train", SCORED)[0]["score"] == 0.25


@pytest.mark.parametrize(
    "scale", ["[1]", '"1 to 10"', "[10, 1]", "[1, NaN]", "[1, Infinity]", "[true, 10]", "null"]
)
def test_a_scale_that_is_none_is_refused(tmp_path, scale):
    (tmp_path / "manifest.json").write_text(f'{{"score_scale": {scale}}}')
    with pytest.raises(InputError, match=r"score_scale in manifest\.json is"):
        score_scale(tmp_path / "rm")


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json is not a JSON object"):
        read_manifest(tmp_path / "rm")


def test_the_fingerprint_is_the_sha256_of_both_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"there is no .*eval\.jsonl"):
        fingerprint(tmp_path)
    (tmp_path / "eval.jsonl").write_bytes(b"")
    digests = fingerprint(tmp_path)
    assert digests["train.jsonl"] == hashlib.sha256(b"abc").hexdigest()
    # The well-known digest of nothing.
    assert digests["eval.jsonl"].startswith("e3b0c44298fc1c149afbf4c8996fb924")


# --- examples to records


def test_a_pair_is_the_best_against_the_worst_and_the_first_of_equals():
    scores = {"a": 4, "b": 9, "c": 2, "d": 9, "e": 2}
    completions = [{"response": text, "overall_score": score} for text, score in scores.items()]
    example = parse_row({"instruction": "Q", "completions": completions}, "mine")
    record = pair_record(example)
    assert (record["chosen"], record["chosen_score"]) == ("b", 9.0)
    assert (record["rejected"], record["rejected_score"]) == ("c", 2.0)
    assert [r["response"] for r in scored_records(example, best_only=False)] == list("abcde")
    (best,) = scored_records(example, best_only=True)
    assert best == {
        "prompt": "Q",
        "response": "b",
        "score": 9.0,
        "source": "mine",
        "prompt_id": example.prompt_id,
    }


def test_a_dialogue_can_be_read_as_one_text():
    assert prompt_text("Why?") == "Why?"
    assert prompt_text(TALK) == "User: A\n\nAssistant: B\n\nUser: C"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (json.dumps(pair()), True),
        ("\ufeff" + json.dumps(pair()), True),
        ("\n \n" + json.dumps(pair()), True),
        (json.dumps(scored()), False),
        (json.dumps(scored() | pair()), False),  # what is there for more than one stage is scored
        (json.dumps(scored()) + "\n" + json.dumps(pair()), False),
        (json.dumps(without(pair(), "rejected")), False),
        *((text, False) for text in ("", "\n", "{", "[1]", "[[1]]", "7", "null", "\x00")),
        (b"\xff\xfe", False),
    ],
)
def test_the_first_line_tells_if_a_file_holds_pairs(data, expected, tmp_path):
    assert holds_pairs(split_with(tmp_path, data), "train") is expected


def test_an_absent_file_holds_no_pairs_to_look_for(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        holds_pairs(tmp_path, "train")


# --- old splits make room for new ones


def test_at_no_moment_do_old_and_new_splits_stand_together(tmp_path, monkeypatch):
    data_dir, finished = tmp_path / "data", tmp_path / "data" / ".unfinished"
    for base, age in ((data_dir, "old"), (finished, "new")):
        for split in ("sft", "rm", "pref"):
            (base / split).mkdir(parents=True)
            (base / split / "train.jsonl").write_text(age)
        (base / "manifest.json").write_text(age)
    (data_dir / "toyworld").mkdir()
    rename = Path.rename
    seen: list[set[str]] = []

    def watched_rename(self: Path, target: Path) -> Path:
        result = rename(self, target)
        splits = {file.read_text() for file in data_dir.glob("[a-z]*/train.jsonl")}
        manifests = {file.read_text() for file in data_dir.glob("manifest.json")}
        assert splits <= manifests
        seen.append(manifests)
        return result

    monkeypatch.setattr(Path, "rename", watched_rename)
    replace_splits(data_dir, finished)
    assert seen == [{"old"}] * 3 + [set()] + [{"new"}] * 4
    assert (data_dir / "pref" / "train.jsonl").read_text() == "new"
    assert (data_dir / "toyworld").is_dir()
