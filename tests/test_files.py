"""Data files are found here or on the Hub, and give their rows in whatever dress they come."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.files import find_files, read_rows

# --- finding them


def test_a_folder_gives_its_data_files_in_order_without_hidden_ones(tmp_path):
    wanted = ["a.jsonl.gz", "b/2.json", "b/3.PARQUET", "c.json.gz", "d.jsonl"]
    for name in [*reversed(wanted), ".hidden/x.jsonl", "b/.x.json", "notes.txt", "x.jsonl.bak"]:
        path = tmp_path / ".cache" / "data" / name  # a hidden folder above it hides nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    data = tmp_path / ".cache" / "data"
    (data / "folder.json").mkdir()
    assert find_files(str(data), None) == (data, [data / name for name in wanted])


def test_a_file_stands_for_itself(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    assert find_files(str(tmp_path / "a.jsonl"), None) == (tmp_path, [tmp_path / "a.jsonl"])


def test_a_folder_without_data_files_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"no file there ends in \.json, "):
        find_files(str(tmp_path), None)


def hub_answers(monkeypatch: pytest.MonkeyPatch, folder: Path | Exception) -> list[dict[str, Any]]:
    """Put a Hub in place that gives a folder or fails; returns the calls it gets."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def answer(*names: Any, **options: Any) -> str:
        calls.append(options | {"dataset": names[-1]})
        if isinstance(folder, Exception):
            raise folder
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
    return calls


@pytest.mark.parametrize(
    ("dataset", "revision", "expected"),
    [
        ("openbmb/UltraFeedback", None, "40b436560ca83a8dba36114c22ab3c66e43f6d5e"),
        ("openbmb/UltraFeedback", "v2", "v2"),
        ("my/data", "v2", "v2"),
        ("my/data", None, None),
    ],
)
def test_only_ultrafeedback_is_pinned_to_the_revision_with_repaired_scores(
    dataset, revision, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "rows.jsonl").touch()
    calls = hub_answers(monkeypatch, snapshot)
    assert find_files(dataset, revision) == (snapshot, [snapshot / "rows.jsonl"])
    asked = {(call["dataset"], call["revision"]) for call in calls}
    assert (len(calls), asked) == (2, {(dataset, expected)})


def test_a_hub_that_fails_ends_in_one_line_with_the_local_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = hub_answers(monkeypatch, ConnectionError("no route"))
    with pytest.raises(InputError) as caught:
        find_files("openbmb/UltraFeedback", None)
    for word in ("--dataset=openbmb/UltraFeedback", "no route", ".jsonl"):
        assert word in str(caught.value)
    assert calls[-1]["local_files_only"]  # what an earlier run fetched still serves
    assert list(tmp_path.iterdir()) == []


# --- reading them

ROWS = [{"a": 1}, {"a": 2}]
LINES = b'{"a": 1}\n\n{"a": 2}\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.jsonl", gzip.compress(LINES)),  # gzipped, whatever its name
        ("x.json", LINES),
        ("x.json", json.dumps(ROWS).encode()),
        ("x.JSON", json.dumps(ROWS, indent=2).encode("utf-8-sig")),
        ("x.json", json.dumps({"data": ROWS}).encode()),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json_in_any_dress_gives_its_rows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_rows(tmp_path / name)) == ROWS


def test_a_json_file_of_one_object_is_one_row(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "b": [2]}')
    assert list(read_rows(tmp_path / "x.json")) == [{"a": 1, "b": [2]}]


def test_a_line_that_is_not_json_costs_that_line_only(tmp_path):
    broken = [b"{", b"\xff", b"[" * 100_000, b'{"a": 1} {"a": 2}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([b'{"a": 1}', *broken, b'{"a": 2}']))
    assert list(read_rows(tmp_path / "x.jsonl")) == [ROWS[0], None, None, None, None, ROWS[1]]


def test_parquet_gives_its_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "with [glob] signs*"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "x.parquet")
    assert list(read_rows(folder / "x.parquet")) == ROWS


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.parquet", b"PAR1 and no more"),
        ("x.parquet", b""),
        ("x.jsonl.gz", gzip.compress(LINES * 100)[:30]),
        ("x.jsonl.gz", b"\x1f\x8b and no more"),
    ],
)
def test_a_damaged_file_ends_in_one_line_that_names_it(tmp_path, name, data, capfd):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(read_rows(tmp_path / name))
    assert capfd.readouterr() == ("", "")
