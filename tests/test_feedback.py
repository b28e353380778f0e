"""Pairs that people make: in the form that DPO reads, each prompt on one side, each line whole."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import feedback
from rlhf.disk import Lock
from rlhf.errors import InputError
from rlhf.feedback import add_pairs, cannot_write, require_folder
from rlhf.records import PAIR, read_split
from rlhf.sources import prompt_id

ROOT = Path(__file__).parent.parent
DIALOGUE = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
]


def lines(folder: Path, side: str) -> list[dict]:
    path = folder / f"{side}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add(folder: Path, prompt="Name a colour.", chosen="Blue.", rejected=("No.",)):
    return add_pairs(folder, prompt, chosen=chosen, rejected=list(rejected))


def test_a_pair_is_what_stands_in_the_pref_split(tmp_path):
    added = add(tmp_path / "new" / "chat", rejected=["No.", "What?", "No."])
    assert added.num_new == 2 and added.totals == {"train": 2, "eval": 0}
    common = {"prompt": "Name a colour.", "chosen": "Blue.", "source": "chat"}
    common |= {
        "chosen_score": 10.0,
        "rejected_score": 1.0,
        "prompt_id": prompt_id("name a COLOUR."),
    }
    assert lines(tmp_path / "new" / "chat", "train") == [
        {**common, "rejected": "No."},
        {**common, "rejected": "What?"},
    ]
    assert read_split(tmp_path / "new" / "chat", "train", PAIR)[0]["rejected"] == "No."


def test_the_second_prompt_goes_to_eval_then_every_tenth(tmp_path):
    for number in range(22):
        add(tmp_path, prompt=f"Name number {number}.")
    evals = [row["prompt"] for row in lines(tmp_path, "eval")]
    assert evals == ["Name number 1.", "Name number 11.", "Name number 21."]
    assert len(lines(tmp_path, "train")) == 19


def test_a_prompt_stays_on_its_side_however_it_is_written(tmp_path):
    add(tmp_path, prompt="First")
    assert add(tmp_path, prompt="Second").path.name == "eval.jsonl"
    assert add(tmp_path, prompt="  SECOND ", chosen="x").path.name == "eval.jsonl"
    assert add(tmp_path, prompt="first", chosen="x").path.name == "train.jsonl"
    assert add(tmp_path, prompt=DIALOGUE).path.name == "train.jsonl"
    assert lines(tmp_path, "train")[-1]["prompt"] == DIALOGUE
    sides = [{row["prompt_id"] for row in lines(tmp_path, side)} for side in ("train", "eval")]
    assert not sides[0] & sides[1]


def test_the_same_click_adds_nothing_twice(tmp_path):
    assert add(tmp_path).num_new == 1
    before = (tmp_path / "train.jsonl").read_bytes()
    assert add(tmp_path).num_new == 0
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert add(tmp_path, rejected=["No.", "Red?"]).num_new == 1


def test_scores_are_the_ends_of_the_scale_that_the_manifest_tells(tmp_path):
    (tmp_path / "manifest.json").write_text('{"score_scale": [0, 1]}')
    add(tmp_path / "chat")
    (row,) = read_split(tmp_path / "chat", "train", PAIR)
    assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "torn", ['{"prompt": "Na', '{"prompt": "Na\ud83d'.encode("utf-8", "ignore")]
)
def test_half_a_line_of_a_crash_goes_and_the_rest_stays(tmp_path, torn):
    add(tmp_path)
    with (tmp_path / "train.jsonl").open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    add(tmp_path, chosen="Green.")
    assert [row["chosen"] for row in lines(tmp_path, "train")] == ["Blue.", "Green."]


def test_a_last_line_without_its_end_is_ended(tmp_path):
    add(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    add(tmp_path, chosen="Green.")
    assert [row["chosen"] for row in lines(tmp_path, "train")] == ["Blue.", "Green."]


def test_what_cannot_reach_the_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    add(tmp_path)
    before = (tmp_path / "train.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feedback.os, "fsync", full)
        with pytest.raises(OSError) as caught:
            add(tmp_path, chosen="Green.")
    told = cannot_write(tmp_path, caught.value)
    assert told.startswith(f"--feedback_dir={tmp_path}: cannot be written to (No space left")
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert add(tmp_path, chosen="Green.").num_new == 1


def test_once_the_disk_has_room_again_clicks_count_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "PATIENCE", 0.1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feedback.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            add(tmp_path)
    assert add(tmp_path).num_new == 1


def test_what_is_written_is_put_onto_the_disk_before_the_click_is_answered(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        feedback.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd))
    )
    add(tmp_path)
    assert (tmp_path / "train.jsonl").stat().st_size in synced


def test_two_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rlhf.feedback import add_pairs\n"
        "folder, text = Path(sys.argv[1]), sys.argv[2] * 999\n"
        "for n in range(25):\n"
        "    add_pairs(folder, f'Prompt {n}', chosen=text, rejected=['No.'])"
    )
    commands = [[sys.executable, "-c", code, str(tmp_path), name] for name in "abc"]
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in running] == [0, 0, 0]
    rows = lines(tmp_path, "train") + lines(tmp_path, "eval")
    assert len({(row["prompt"], row["chosen"]) for row in rows}) == len(rows) == 75
    sides = [{row["prompt_id"] for row in lines(tmp_path, side)} for side in ("train", "eval")]
    assert not sides[0] & sides[1]


def test_nobody_else_writes_between_looking_and_adding(tmp_path, monkeypatch):
    kept, real = [], feedback.append

    def append(path, records):
        with pytest.raises(InputError):
            Lock(tmp_path, flag="--x")
        kept.append(real(path, records))

    monkeypatch.setattr(feedback, "append", append)
    add(tmp_path)
    Lock(tmp_path, flag="--x").release()
    assert len(kept) == 1


def test_a_folder_that_somebody_else_keeps_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "PATIENCE", 0.1)
    with (
        Lock(tmp_path, flag="--ckpt_dir"),
        pytest.raises(InputError, match=r"--feedback_dir=.* in use by process"),
    ):
        add(tmp_path)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "chat"):
        with pytest.raises(InputError, match=r"--feedback_dir=.*file is a file; name a folder"):
            require_folder(folder)
    require_folder(tmp_path / "new" / "chat")


def test_a_line_that_somebody_has_spoilt_is_named_not_overwritten(tmp_path):
    add(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(InputError) as caught:
        add(tmp_path, chosen="Green.")
    text = str(caught.value)
    assert text.startswith(f"--feedback_dir={tmp_path}: {tmp_path}/train.jsonl line 2: Expecting")
    assert text.endswith("; mend or remove it")
    assert "--data_dir" not in text and "exec_load_dataset" not in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("chat/train.jsonl", '{"prompt": "a; b"}\n', "train.jsonl line 1: has no 'chosen'"),
        ("chat/eval.jsonl", " \n\n", "eval.jsonl is empty"),
        ("manifest.json", "[]", "manifest.json is not a JSON object"),
        ("manifest.json", '{"score_scale": "; "}', "expected the lowest and the highest score"),
    ],
)
def test_whatever_is_wrong_with_the_files_is_told_to_who_clicks(tmp_path, name, content, told):
    (tmp_path / "chat").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        add(tmp_path / "chat")
    text = str(caught.value)
    assert text.startswith(f"--feedback_dir={tmp_path}/chat: ") and told in text
    assert text.endswith("; mend or remove it") and "--data_dir=" + str(tmp_path) not in text


def test_trainers_say_what_makes_the_side_that_one_click_leaves_out(tmp_path):
    add(tmp_path)
    with pytest.raises(InputError, match=r"eval\.jsonl; .*/better on two questions"):
        read_split(tmp_path, "eval", PAIR)


def test_a_choice_against_an_earlier_one_is_kept_and_told(tmp_path):
    assert "opposite" not in add(tmp_path, chosen="Blue.", rejected=["No."]).told()
    assert (
        "opposite" not in add(tmp_path, prompt="Another", chosen="No.", rejected=["Blue."]).told()
    )
    assert "opposite" not in add(tmp_path, chosen="Blue.", rejected=["Red?"]).told()
    added = add(tmp_path, prompt="name a COLOUR.", chosen="No.", rejected=["What?", "Blue."])
    assert (added.num_new, added.num_opposed) == (2, 1)
    told = "; the opposite stands there from earlier: remove whichever line is wrong"
    assert added.told().endswith(f"now 4 in train and 1 in eval{told}")
