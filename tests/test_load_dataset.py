"""From a data set to `.data`: nothing lost without a count, no prompt twice, always the same."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import load_dataset
from rlhf.disk import Lock
from rlhf.errors import InputError
from rlhf.records import PAIR, SCORED, changed_since_written, read_split

ROOT = Path(load_dataset.__file__).parent
REAL_DATA = ROOT.parent / "shared" / "data"
ADJECTIVES = ("big", "small", "old", "new", "red", "quiet", "lazy", "brave", "clean", "empty")


def question(number: int) -> str:
    adjective = ADJECTIVES[number % len(ADJECTIVES)]
    return f"What should I know about the {adjective} house with the number {number}?"


def graded_row(number: int, scores: tuple[Any, ...] = (7, 3), source: str = "a") -> dict[str, Any]:
    answers = [f"The house number {number} has {k} windows and a door." for k in range(len(scores))]
    completions = [
        {"response": answer, "overall_score": score}
        for answer, score in zip(answers, scores, strict=True)
    ]
    return {"instruction": question(number), "completions": completions, "source": source}


def bare_pair(number: int) -> dict[str, Any]:
    return {"prompt": question(number), "chosen": "Yes, of course.", "rejected": "No, never."}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load(dataset: Path, data_dir: Path, *options: str) -> dict[str, Any]:
    argv = [f"--dataset={dataset}", f"--data_dir={data_dir}", *options]
    load_dataset.main(load_dataset.parse_args(argv))
    return json.loads((data_dir / "manifest.json").read_text())


def read_all(data_dir: Path) -> dict[tuple[str, str], list[Any]]:
    return {
        (split, side): read_split(data_dir / split, side, PAIR if split == "pref" else SCORED)
        for split in ("sft", "rm", "pref")
        for side in ("train", "eval")
        if (data_dir / split).exists()
    }


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that parse_args ends in."""
    with pytest.raises(SystemExit) as caught:
        load_dataset.parse_args(list(argv))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def assert_books_balance(manifest: dict[str, Any], data_dir: Path) -> None:
    for name in ("rows", "prompts", "responses"):
        ledger = manifest[name]
        assert ledger["read"] == ledger["kept"] + sum(ledger["dropped"].values()), name
        assert all(number > 0 for number in ledger["dropped"].values())
    assert manifest["rows"]["kept"] == manifest["prompts"]["read"]
    records = read_all(data_dir)
    ids = {record["prompt_id"] for side in records.values() for record in side}
    assert manifest["prompts"]["kept"] == len(ids)
    used = sum(len(side) * (2 if split == "pref" else 1) for (split, _), side in records.items())
    assert manifest["responses"]["kept"] == used
    for (split, side), rows in records.items():
        told = manifest["splits"][split][side]
        data = (data_dir / split / f"{side}.jsonl").read_bytes()
        assert told["sha256"] == hashlib.sha256(data).hexdigest()
        assert told["rows"] == len(rows)


@pytest.fixture
def dataset(tmp_path):
    rows = [graded_row(n, (8, 2, 5), "ab"[n % 2]) for n in range(100)]
    return write_rows(tmp_path / "rows.jsonl", rows)


# --- what goes where


def test_ratios_hold_in_every_source(dataset, tmp_path):
    manifest = load(dataset, tmp_path / "data")
    assert manifest["sources"] == {s: {"sft": 5, "rm": 5, "pref": 40} for s in "ab"}
    sizes = {key: len(rows) for key, rows in read_all(tmp_path / "data").items()}
    # 10 prompts with 3 responses each, cut at 8; 80 pairs, cut at 64
    assert sizes[("sft", "train")] == sizes[("rm", "train")] == 24
    assert sizes[("sft", "eval")] == sizes[("rm", "eval")] == 6
    assert (sizes[("pref", "train")], sizes[("pref", "eval")]) == (64, 16)
    assert_books_balance(manifest, tmp_path / "data")


def test_a_prompt_is_in_one_split_and_on_one_side(dataset, tmp_path):
    load(dataset, tmp_path / "data")
    records = read_all(tmp_path / "data")
    places = [{record["prompt_id"] for record in rows} for rows in records.values()]
    assert sum(map(len, places)) == len(set().union(*places)) == 100


def test_pref_pairs_the_best_with_the_worst(dataset, tmp_path):
    load(dataset, tmp_path / "data")
    for record in read_all(tmp_path / "data")[("pref", "train")]:
        assert record["chosen"].endswith("has 0 windows and a door.")
        assert record["rejected"].endswith("has 1 windows and a door.")
        assert (record["chosen_score"], record["rejected_score"]) == (8.0, 2.0)


def test_the_head_of_a_file_is_a_sample_of_all_sources(dataset, tmp_path):
    load(dataset, tmp_path / "data")
    head = read_split(tmp_path / "data" / "pref", "train", PAIR, max_samples=20)
    assert {record["source"] for record in head} == {"a", "b"}


def test_many_small_sources_together_get_their_share(tmp_path):
    rows = [graded_row(n, source=f"source {n}") for n in range(100)]
    manifest = load(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    shares = Counter(split for counts in manifest["sources"].values() for split in counts)
    assert shares == {"sft": 10, "rm": 10, "pref": 80}
    assert len(manifest["sources"]) == 100


def test_the_order_of_rows_changes_nothing_and_the_seed_does(tmp_path):
    rows = [json.dumps(graded_row(n, source="aaaaabb"[n % 7])) for n in range(103)]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    load(dataset, tmp_path / "data")
    load(write_rows(tmp_path / "other.jsonl", rows[::-1]), tmp_path / "reversed")
    load(dataset, tmp_path / "reseeded", "--seed=7")
    records = [read_all(tmp_path / name) for name in ("data", "reversed", "reseeded")]
    assert records[0] == records[1]
    assert records[0] != records[2]


def test_the_same_arguments_give_the_same_bytes(dataset, tmp_path):
    contents = []
    for hash_seed in "12":
        command = [sys.executable, ROOT / "load_dataset.py", "--dataset=rows.jsonl"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        files = sorted(path for path in (tmp_path / ".data").rglob("*") if path.is_file())
        contents.append({path.name: path.read_bytes() for path in files})
        assert len(files) == 7
    assert contents[0] == contents[1]
    assert "replacing the splits that are in .data\n" in result.stdout
    assert result.stdout.splitlines()[-1] == "next: sh exec_run_sft.sh"
    assert result.stderr == ""


# --- what is dropped


def test_every_reason_is_counted(tmp_path):
    rows = [
        *(graded_row(n) for n in range(30)),
        "{",
        "[1]",
        {"text": "no form"},
        graded_row(3) | {"instruction": question(3).upper() + " "},
        graded_row(40) | {"instruction": "Wo ist das alte Haus, und wer wohnt heute darin?"},
        graded_row(41, source="bad"),
        graded_row(42, (7,)),
        graded_row(43, ("N/A", 4)),
        graded_row(44, (10, 1)) | {"instruction": ""},
    ]
    rows[0]["completions"].append(
        {"response": "Das Haus ist sehr alt und hat einen Garten.", "overall_score": 1}
    )
    rows[1]["completions"][0] |= {"overall_score": 10, "fine-grained_score": 1.5}
    manifest = load(
        write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data", "--exclude_source=bad"
    )
    assert manifest["rows"] == {
        "read": 39,
        "kept": 36,
        "dropped": {"row is not a JSON object": 2, "columns are of no known form": 1},
    }
    assert manifest["prompts"]["dropped"] == {
        "fewer than two usable responses": 2,
        "prompt is a duplicate": 1,
        "prompt is not in language en": 1,
        "source is excluded": 1,
        "prompt is empty": 1,
    }
    dropped = manifest["responses"]["dropped"]
    assert dropped["response is not in language en"] == 1
    assert dropped["score is missing or not a number"] == 1
    assert dropped["prompt is dropped"] == 2 + 2 + 2 + 1 + 1 + 2
    assert manifest["repaired_scores"] == 1
    assert_books_balance(manifest, tmp_path / "data")


def garbage(noise: random.Random, depth: int = 0) -> Any:
    leaves = ("", " ", "Hi", "half \ud83d", "N/A", "7.5", None, True, -1, 3, 10, 1e400, "猫猫猫猫")
    kind = noise.randrange(6) if depth < 4 else 0
    if kind < 3:
        return noise.choice(leaves)
    if kind < 4:
        return [garbage(noise, depth + 1) for _ in range(noise.randrange(4))]
    names = ("instruction", "completions", "response", "overall_score", "chosen", "rejected")
    names += (
        "prompt",
        "role",
        "content",
        "score_chosen",
        "score_rejected",
        "annotations",
        "source",
    )
    return {noise.choice(names): garbage(noise, depth + 1) for _ in range(noise.randrange(6))}


@pytest.mark.parametrize("seed", range(20))
def test_kept_and_dropped_make_what_was_read_whatever_the_rows(tmp_path, seed):
    noise = random.Random(seed)
    rows: list[Any] = [json.dumps(garbage(noise)) for _ in range(300)]
    for number in range(60):  # forms that are known, with a part of them spoiled
        row = noise.choice([graded_row, bare_pair])(number)
        spot = noise.choice([row, *row.get("completions", [])])
        for _ in range(noise.randrange(3)):
            spot[noise.choice(list(spot))] = garbage(noise, 2)
        rows.append(row)
    rows += [graded_row(number, (9, 5, 1)) for number in range(100, 140)]
    noise.shuffle(rows)
    manifest = load(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data")
    assert manifest["rows"]["read"] == 400
    assert_books_balance(manifest, tmp_path / "data")


def test_a_pair_needs_a_gap_and_a_tie_is_none(tmp_path):
    scores = [(5, 5), (5, 4.5), (5, 4)]
    rows = [graded_row(n, scores[n % 3]) for n in range(90)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for gap, reasons in (
        ("0", {"scores tie (pref)"}),
        ("1", {"scores tie (pref)", "score gap too small (pref)"}),
    ):
        manifest = load(path, tmp_path / "data", f"--min_score_gap={gap}", "--sft_ratio=0.3")
        assert set(manifest["prompts"]["dropped"]) == reasons
        gaps = {
            record["chosen_score"] - record["rejected_score"]
            for side in ("train", "eval")
            for record in read_all(tmp_path / "data")[("pref", side)]
        }
        assert min(gaps) == (0.5 if gap == "0" else 1.0)
        assert manifest["sources"]["a"]["sft"] == 27  # where ties do no harm
        assert_books_balance(manifest, tmp_path / "data")


def test_bare_pairs_get_the_ends_of_the_scale_and_sft_the_chosen_alone(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [bare_pair(n) for n in range(50)])
    manifest = load(path, tmp_path / "data")
    records = read_all(tmp_path / "data")
    assert {r["response"] for r in records[("sft", "train")]} == {"Yes, of course."}
    assert Counter(r["score"] for r in records[("rm", "train")]) == {10.0: 4, 1.0: 4}
    assert {r["source"] for r in records[("pref", "train")]} == {"rows"}
    assert manifest["score_scale"] == [1.0, 10.0]
    assert manifest["pairs_without_scores"]["prompts"] == 50
    assert_books_balance(manifest, tmp_path / "data")


def test_sft_may_learn_from_the_best_response_alone(dataset, tmp_path):
    manifest = load(dataset, tmp_path / "data", "--sft_responses=best")
    records = read_all(tmp_path / "data")
    assert {r["score"] for r in records[("sft", "train")]} == {8.0}
    assert {r["score"] for r in records[("rm", "train")]} == {8.0, 2.0, 5.0}
    assert manifest["responses"]["dropped"]["not the best (sft)"] == 20
    assert_books_balance(manifest, tmp_path / "data")


def test_max_samples_takes_prompts_from_everywhere(dataset, tmp_path):
    manifest = load(dataset, tmp_path / "data", "--max_samples=40")
    assert manifest["prompts"]["kept"] == 40
    assert manifest["prompts"]["dropped"] == {"beyond --max_samples": 60}
    assert set(manifest["sources"]) == {"a", "b"}
    assert_books_balance(manifest, tmp_path / "data")


def test_a_ratio_of_zero_makes_no_split(dataset, tmp_path):
    load(dataset, tmp_path / "data")
    load(dataset, tmp_path / "data", "--sft_ratio=0")
    assert not (tmp_path / "data" / "sft").exists()
    assert {split for split, _ in read_all(tmp_path / "data")} == {"rm", "pref"}


# --- where rows come from


def test_folders_are_read_in_order_without_hidden_files(dataset, tmp_path):
    folder = tmp_path / "folder"
    lines = dataset.read_text().splitlines()
    write_rows(folder / "b" / "2.json", ["[" + ",".join(lines[50:]) + "]"])
    folder.joinpath("a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:50]).encode()))
    write_rows(folder / ".hidden" / "rows.jsonl", [{"strange": 1}])
    write_rows(folder / "notes.txt", ["no rows"])
    manifest = load(folder, tmp_path / "data")
    assert list(manifest["files"]) == ["a.jsonl.gz", "b/2.json"]
    assert manifest["rows"]["read"] == 100
    load(dataset, tmp_path / "whole")
    assert read_all(tmp_path / "data") == read_all(tmp_path / "whole")


def test_parquet_gives_the_same_splits_as_json(dataset, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(
        [json.loads(line) for line in dataset.read_text().splitlines()]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    load(dataset, tmp_path / "json")
    load(tmp_path / "rows.parquet", tmp_path / "parquet")
    assert read_all(tmp_path / "json") == read_all(tmp_path / "parquet")


def test_the_manifest_names_the_revision_that_the_hub_gave(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    path = dataset.rename(snapshot / "rows.jsonl")
    asked: list[Any] = []

    def find_files(*what: Any) -> tuple[Path, list[Path]]:
        asked.append(what)
        return snapshot, [path]

    monkeypatch.setattr(load_dataset, "find_files", find_files)
    load_dataset.main(load_dataset.parse_args([]))
    manifest = json.loads(Path(".data/manifest.json").read_text())
    assert (manifest["dataset"], manifest["revision"]) == ("openbmb/UltraFeedback", "0123abc")
    load_dataset.main(load_dataset.parse_args(["--dataset=my/data", "--dataset_revision=v2"]))
    assert asked == [("openbmb/UltraFeedback", None), ("my/data", "v2")]


@pytest.mark.parametrize(
    "name", ["hh_rlhf_helpful_base_test", "alpaca_eval_in_ultrafeedback_schema"]
)
def test_real_data_is_kept_but_for_one_prompt_in_fifty(tmp_path, name):
    path = REAL_DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} in {REAL_DATA}")
    manifest = load(path, tmp_path / "data")
    assert_books_balance(manifest, tmp_path / "data")
    assert manifest["prompts"]["kept"] > 0.98 * manifest["rows"]["read"]


# --- what is refused, before anything is written


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--sft_ratio=0.5", "--rm_ratio=0.5"], "--rm_ratio=0.5 must sum to less than 1"),
        (["--sft_ratio=1.5"], "--sft_ratio"),
        (["--train_ratio=1"], "--train_ratio"),
        (["--train_ratio=0"], "--train_ratio"),
        (["--rm_ratio=nan"], "--rm_ratio"),
        (["--min_score_gap=-1"], "--min_score_gap"),
        (["--max_samples=-1"], "--max_samples"),
        (["--sft_responses=some"], "--sft_responses"),
        (["--sft_rat=0.5"], "--sft_rat"),
        (["--dataset=absent.jsonl"], "--dataset=absent.jsonl: there is no such file or folder"),
        (["--dataset=./absent"], "--dataset=./absent: there is no such file or folder"),
        (["--dataset=rows.jsonl", "--dataset_revision=main"], "--dataset_revision is for the Hub"),
        (["--data_dir=rows.jsonl"], "--data_dir=rows.jsonl is a file"),
        (["--data_dir=own"], "rm there came without a manifest.json"),
    ],
)
def test_bad_arguments_end_in_one_line(argv, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [graded_row(1)])
    write_rows(tmp_path / "own" / "rm" / "train.jsonl", ["mine"])
    before = sorted(tmp_path.rglob("*"))
    assert told in refusal(capsys, *argv)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([], [], "holds no rows"),
        ([{"text": "x", "label": 1}], [], "no row has a known form; columns: label, text"),
        (["{", "3"], [], "none of 2 rows can be used (row is not a JSON object: 2)"),
        ([graded_row(1, (5,))], [], "fewer than two usable responses: 1"),
        (
            [graded_row(n) for n in range(50)],
            ["--exclude_source=b"],
            "--exclude_source=b: no such source; there are a",
        ),
        ([graded_row(n) for n in range(50)], ["--language=english"], "--language=english"),
        # round(0.1 * 14) = 1 prompt for sft; round(0.8 * 3) = 2 leaves one to eval, 30 * 0.1 = 3
        (
            [graded_row(n) for n in range(14)],
            [],
            "--sft_ratio=0.1: of 14 usable prompts sft gets 1, and train and eval at "
            "--train_ratio=0.8 take 3: change a ratio, or give about 30 prompts",
        ),
        ([graded_row(n, (5, 5)) for n in range(50)], [], "40 of 40 prompts for pref have no two"),
    ],
)
def test_a_data_set_that_cannot_serve_is_refused(rows, options, told, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load(path, tmp_path / "data", *options)
    assert told in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_damaged_parquet_file_ends_the_command_in_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    command = [sys.executable, ROOT / "load_dataset.py", "--dataset=rows.parquet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert "rows.parquet cannot be read as parquet" in line
    assert not (tmp_path / ".data").exists()


def test_splits_are_never_read_and_replaced_at_once(dataset, tmp_path):
    data_dir = tmp_path / "data"
    load(dataset, data_dir)
    before = read_all(data_dir)
    for source in (data_dir, data_dir / "pref", data_dir / "pref" / "train.jsonl"):
        with pytest.raises(InputError, match="one of the splits that this run would replace"):
            load(source, data_dir)
    assert read_all(data_dir) == before


def test_the_pairs_that_we_write_can_be_loaded_again(dataset, tmp_path):
    load(dataset, tmp_path / "data")
    manifest = load(tmp_path / "data" / "pref" / "train.jsonl", tmp_path / "again")
    assert manifest["forms"] == {"preference pairs": 64}
    assert manifest["prompts"]["kept"] == 64


def test_a_failing_disk_leaves_the_old_splits_as_they_were(dataset, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    load(dataset, data_dir)
    before = read_all(data_dir)
    write_records = load_dataset.write_records

    def fail_at_pref(path: Path, records: Any) -> int:
        if "pref" in path.parts:
            raise OSError(28, "No space left on device")
        return write_records(path, records)

    monkeypatch.setattr(load_dataset, "write_records", fail_at_pref)
    with pytest.raises(OSError, match="No space left"):
        load(dataset, data_dir, "--seed=7")
    assert read_all(data_dir) == before
    assert sorted(path.name for path in data_dir.iterdir()) == [
        "manifest.json",
        "pref",
        "rm",
        "sft",
    ]


def test_the_remains_of_a_killed_run_are_cleared(dataset, tmp_path):
    write_rows(tmp_path / "data" / ".unfinished" / "old" / "sft" / "train.jsonl", ["half"])
    load(dataset, tmp_path / "data")
    assert not (tmp_path / "data" / ".unfinished").exists()


def test_one_process_at_a_time_makes_a_data_folder(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", [graded_row(i) for i in range(60)])
    (tmp_path / "data").mkdir()
    told = rf"--data_dir=.*/data: is in use by process {os.getpid()} on "
    with Lock(tmp_path / "data", flag="--data_dir"), pytest.raises(InputError, match=told):
        load(dataset, tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []
    load(dataset, tmp_path / "data")
    assert not (tmp_path / "data/.lock").exists()


def test_a_failed_start_leaves_no_folder(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", ["not json"])
    with pytest.raises(InputError):
        load(dataset, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_changed_split_is_told(tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", [graded_row(i) for i in range(60)])
    load(dataset, tmp_path / "data")
    assert changed_since_written(tmp_path / "data/sft") == ""
    path = tmp_path / "data/sft/train.jsonl"
    path.write_text(path.read_text().replace("windows", "doors", 1))
    told = changed_since_written(tmp_path / "data/sft")
    assert told == f"note: {path} is not as manifest.json tells: damaged, or changed"
    path.parent.rename(tmp_path / "own")  # a split of one's own, which no manifest tells of
    assert changed_since_written(tmp_path / "own") == ""


@pytest.mark.parametrize("call", range(1, 9))
def test_splits_are_whole_and_of_one_making_wherever_their_replacement_is_cut(
    call, tmp_path, monkeypatch
):
    old = write_rows(tmp_path / "old.jsonl", [graded_row(i) for i in range(60)])
    new = write_rows(tmp_path / "new.jsonl", [graded_row(i) for i in range(100, 180)])
    data_dir = tmp_path / "data"
    load(old, data_dir)
    rename, calls = Path.rename, []

    def cut(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            load(new, data_dir)
    assert sorted(os.listdir(data_dir)) == ["manifest.json", "pref", "rm", "sft"]
    assert all(changed_since_written(data_dir / split) == "" for split in ("sft", "rm", "pref"))
