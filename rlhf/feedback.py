"""FEEDBACK: pairs that people make by a click, in the files that DPO reads.

    <feedback_dir>/train.jsonl, eval.jsonl   one PairRecord a line

Several processes may add pairs to one folder; what is added is on the disk, whole or not at all.
"""

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rlhf.disk import Lock, sync_to_disk
from rlhf.errors import InputError
from rlhf.records import PAIR, REMEDY, PairRecord, read_split, score_scale
from rlhf.sources import Prompt, as_prompt, prompt_id
from rlhf.splits import SIDES

FLAG = "--feedback_dir"
SOURCE = "chat"
EVAL_EVERY = 10  # a new prompt in so many goes to eval, the second first
PATIENCE = 5.0  # seconds for others who are adding a pair, which takes milliseconds


class Added(NamedTuple):
    """What became of a click."""

    path: Path
    num_new: int  # pairs that were not there yet
    totals: dict[str, int]  # pairs of each side
    num_opposed: int = 0  # pairs whose opposite stands there

    def told(self) -> str:
        """Say where the pairs are, how many there are, and what is still missing.

        >>> print(Added(Path("chat/train.jsonl"), 1, {"train": 3, "eval": 1}).told())
        1 new pair in chat/train.jsonl; now 3 in train and 1 in eval
        """
        pairs = "1 new pair" if self.num_new == 1 else f"{self.num_new} new pairs"
        numbers = " and ".join(f"{number} in {side}" for side, number in self.totals.items())
        text = f"{pairs if self.num_new else 'nothing new'} in {self.path}; now {numbers}"
        if not self.totals["eval"]:
            text += "; a better answer to another question goes to eval, without which none trains"
        if self.num_opposed:
            text += "; the opposite stands there from earlier: remove whichever line is wrong"
        return text


def require_folder(folder: Path) -> None:
    """Stop if pairs can never be written there. Raises: InputError."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{FLAG}={folder}: {path} is a file; name a folder")


def cannot_write(folder: Path, error: OSError) -> str:
    """Say that a pair could not be kept."""
    return f"{FLAG}={folder}: cannot be written to ({error.strerror}); the pair was not kept"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only one who writes to a folder, after whoever does so now. Raises: InputError."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            lock = Lock(folder, flag=FLAG)
            break
        except InputError:
            if time.monotonic() > last:
                raise
            time.sleep(0.05)
    with lock:
        yield


def side_of(num_prompts: int) -> str:
    """Choose the side of a new prompt behind so many others: two of them make both sides.

    >>> [side_of(n) for n in (0, 1, 2, 10, 11, 12)]
    ['train', 'eval', 'train', 'train', 'eval', 'train']
    """
    return SIDES[num_prompts % EVAL_EVERY == 1]


def mend(path: Path) -> None:
    """End the last line of a file, or take away the half of one that a crash has left."""
    if not path.is_file():
        return
    data = path.read_bytes()
    rest = data.rpartition(b"\n")[2]
    if not rest:
        return
    with path.open("r+b") as file:
        try:
            json.loads(rest)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            file.truncate(len(data) - len(rest))
    sync_to_disk(path)


def append(path: Path, records: Sequence[PairRecord]) -> None:
    """Add whole lines to a file and put them onto the disk; if that fails, none of them stays."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    data = "".join(lines).encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    sync_to_disk(path.parent)


@contextmanager
def told_of(folder: Path) -> Iterator[None]:
    """Let what is wrong with a file be told as clicks need it: nobody trains on a split here."""
    try:
        yield
    except InputError as error:
        flaw = str(error).removeprefix(f"--data_dir={folder}: ")
        if flaw.endswith(REMEDY):
            flaw = flaw.removesuffix(REMEDY).rpartition("; ")[0]
        raise InputError(f"{FLAG}={folder}: {flaw}; mend or remove it") from error


def read_side(folder: Path, side: str) -> list[PairRecord]:
    """Read the pairs of one side, none of which need be there. Raises: InputError."""
    path = folder / f"{side}.jsonl"
    return read_split(folder, side, PAIR) if path.is_file() and path.stat().st_size else []


def opposite(record: PairRecord) -> tuple[str, str, str]:
    """Name the pair that says the contrary."""
    return record["prompt_id"], record["rejected"], record["chosen"]


def add_pairs(folder: Path, prompt: Prompt, *, chosen: str, rejected: Sequence[str]) -> Added:
    """Add the pair of one chosen response and each rejected one, if it is not there yet.

    A prompt stays on the side where it is already.
    Raises: InputError, OSError.
    """
    require_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        for side in SIDES:
            mend(folder / f"{side}.jsonl")
        with told_of(folder):
            known = {side: read_side(folder, side) for side in SIDES}
            low, high = score_scale(folder)
        sides = {record["prompt_id"]: side for side in SIDES for record in known[side]}
        name = prompt_id(prompt)
        side = sides.get(name) or side_of(len(sides))
        records = [
            PairRecord(
                prompt=as_prompt(prompt),
                chosen=chosen,
                rejected=text,
                chosen_score=high,
                rejected_score=low,
                source=SOURCE,
                prompt_id=name,
            )
            for text in dict.fromkeys(rejected)
        ]
        new = [record for record in records if record not in known[side]]
        if new:
            append(folder / f"{side}.jsonl", new)
        totals = {s: len(known[s]) + len(new) * (s == side) for s in SIDES}
        stated = {(row["prompt_id"], row["chosen"], row["rejected"]) for row in known[side]}
        num_opposed = sum(opposite(record) in stated for record in records)
        return Added(folder / f"{side}.jsonl", len(new), totals, num_opposed)
