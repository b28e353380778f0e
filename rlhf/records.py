"""RECORDS: what `.data` holds, and how it is read, checked and written.

    <data_dir>/train.jsonl, eval.jsonl   one JSON object a line, UTF-8
    <data_dir>/../manifest.json          where the records come from, the scale of their scores

Records of one's own need no manifest, no `source` and no `prompt_id`.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, cast

from rlhf.disk import sha256_of, sync_to_disk, sync_tree
from rlhf.errors import InputError
from rlhf.sources import SCALE, Example, Prompt, UnusablePrompt, as_prompt, prompt_id, text_flaw
from rlhf.splits import SIDES, SPLITS, Counts, Splits

MANIFEST = "manifest.json"
OLD = "old"
REMEDY = "make it with sh exec_load_dataset.sh, or pairs by /better on two questions in run_chat.py"


class PromptRecord(TypedDict):
    """What PPO needs of a line: rollouts write the responses."""

    prompt: Prompt
    source: str
    prompt_id: str


class ScoredRecord(PromptRecord):
    """A line of the sft and rm splits."""

    response: str
    score: float


class PairRecord(PromptRecord):
    """A line of the pref split."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


Record = TypeVar("Record", PromptRecord, ScoredRecord, PairRecord)


class Schema(NamedTuple, Generic[Record]):
    """The fields that a kind of record must have beside its prompt; the best response first."""

    texts: tuple[str, ...]
    scores: tuple[str, ...]
    home: str = ""  # the split, or splits, with such rows


PROMPT: Schema[PromptRecord] = Schema((), ())
SCORED: Schema[ScoredRecord] = Schema(("response",), ("score",), ".data/rm or .data/sft")
PAIR: Schema[PairRecord] = Schema(
    ("chosen", "rejected"), ("chosen_score", "rejected_score"), ".data/pref"
)


def scored_records(example: Example, *, best_only: bool) -> Iterator[ScoredRecord]:
    """Yield one record a response, or the best-scored response alone."""
    best = max(example.responses, key=lambda response: response.score)
    for response in [best] if best_only else example.responses:
        yield ScoredRecord(
            prompt=example.prompt,
            response=response.text,
            score=response.score,
            source=example.source,
            prompt_id=example.prompt_id,
        )


def pair_record(example: Example) -> PairRecord:
    """Pair the best-scored response with the worst-scored (of equal ones, the first)."""
    best = max(example.responses, key=lambda response: response.score)
    worst = min(example.responses, key=lambda response: response.score)
    return PairRecord(
        prompt=example.prompt,
        chosen=best.text,
        rejected=worst.text,
        chosen_score=best.score,
        rejected_score=worst.score,
        source=example.source,
        prompt_id=example.prompt_id,
    )


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line; return the number of lines."""
    lines = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            lines += 1
    return lines


def describe(splits: Splits, counts: Counts) -> dict[str, Any]:
    """Return the manifest's account of what is in the splits and of what was dropped."""
    sources: dict[str, Counter[str]] = {}
    unscored = 0
    for split, sides in splits.items():
        for example in chain(*sides.values()):
            sources.setdefault(example.source, Counter())[split] += 1
            unscored += not example.scored
    return {
        "forms": counts.forms,
        "score_scale": SCALE,
        "repaired_scores": counts.repaired_scores,
        "pairs_without_scores": {
            "prompts": unscored,
            "chosen_score": SCALE[1],
            "rejected_score": SCALE[0],
            "sft_responses": "best",
        },
        "rows": counts.rows.as_dict(),
        "prompts": counts.prompts.as_dict(),
        "responses": counts.responses.as_dict(),
        "sources": dict(sorted(sources.items())),
    }


def replace_splits(data_dir: Path, finished: Path) -> None:
    """Move the manifest and the splits in `finished` into `data_dir`, in place of the old ones.

    The old ones leave (for `finished/old`) before the first new one comes, and a manifest is there
    as long as a split is: if this is interrupted, what can be seen is whole and of one making, and
    `end_replacing` ends it.
    """
    sync_tree(finished)
    (finished / OLD).mkdir()
    for name in (*SPLITS, MANIFEST):
        if (data_dir / name).exists():
            (data_dir / name).rename(finished / OLD / name)
    (finished / MANIFEST).rename(data_dir / MANIFEST)
    end_replacing(data_dir, finished)


def end_replacing(data_dir: Path, finished: Path) -> None:
    """Bring all new splits in if the first of them is there, and else all old ones back."""
    if (finished / OLD).exists():
        source = finished / OLD if (finished / MANIFEST).exists() else finished
        for name in (*SPLITS, MANIFEST):
            if (source / name).exists():
                (source / name).rename(data_dir / name)
        sync_to_disk(data_dir)


def read_split(
    data_dir: str | Path, side: str, schema: Schema[Record], max_samples: int = 0
) -> list[Record]:
    """Read one side, "train" or "eval", of a split; its first `max_samples` records (0 = all).

    Raises: InputError if the file is missing or empty, or naming the first line that is not a
    record of this schema.
    """
    path = _split_file(data_dir, side)
    scale = score_scale(data_dir)
    records: list[Record] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                records.append(_checked(row, schema, scale))
            except (ValueError, RecursionError, UnusablePrompt) as flaw:
                raise InputError(
                    f"--data_dir={data_dir}: {path} line {number}: {flaw or 'nested too deep'}; "
                    f"mend this line, or replace the split: {REMEDY}"
                ) from flaw
            if len(records) == max_samples:
                break
    if not records:
        raise InputError(f"--data_dir={data_dir}: {path} is empty; {REMEDY}")
    return records


def holds_pairs(data_dir: str | Path, side: str) -> bool:
    """Tell by its first line if a side holds pairs. Raises: InputError if there is no such file."""
    with _split_file(data_dir, side).open("rb") as file:
        line = next(filter(bytes.strip, file), b"")
    try:
        row = json.loads(line.decode("utf-8-sig"))
        return {*PAIR.texts} <= {*row} and "response" not in row
    except (ValueError, RecursionError, TypeError):  # `read_split` says what is wrong with it
        return False


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one text to look at: a dialogue as `User: ...`, `Assistant: ...`."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """Read the manifest beside a split's folder; {} where there is none.

    Raises: InputError if it is not a JSON object.
    """
    path = Path(os.path.abspath(data_dir)).parent / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise InputError(f"--data_dir={data_dir}: {path} is not a JSON object; {REMEDY}")
    return manifest


def score_scale(data_dir: str | Path) -> tuple[float, float]:
    """Return the lowest and the highest score of the scale that a split's scores are on.

    Raises: InputError if the manifest names a scale that is none.
    """
    scale = read_manifest(data_dir).get("score_scale", SCALE)
    is_pair = isinstance(scale, list | tuple) and len(scale) == 2
    if not (is_pair and all(map(_is_number, scale)) and scale[0] < scale[1]):
        raise InputError(
            f"--data_dir={data_dir}: score_scale in {MANIFEST} is {_shown(scale)}, expected the "
            f"lowest and the highest score, as [1, 10]"
        )
    return float(scale[0]), float(scale[1])


def fingerprint(data_dir: str | Path) -> dict[str, str]:
    """Return the SHA-256 of both files of a split, by file name.

    Raises: InputError if one is missing.
    """
    paths = [_split_file(data_dir, side) for side in SIDES]
    return {path.name: sha256_of(path) for path in paths}


def changed_since_written(data_dir: str | Path) -> str:
    """Say which file of a split is not the one that its manifest tells of; "" if none.

    A split of one's own, which no manifest tells of, has nothing to differ from.
    """
    told = read_manifest(data_dir).get("splits", {}).get(Path(os.path.abspath(data_dir)).name, {})
    for name, digest in fingerprint(data_dir).items():
        expected = told.get(Path(name).stem, {}).get("sha256", digest)
        if digest != expected:
            return f"note: {Path(data_dir) / name} is not as {MANIFEST} tells: damaged, or changed"
    return ""


def _split_file(data_dir: str | Path, side: str) -> Path:
    path = Path(data_dir) / f"{side}.jsonl"
    if not path.is_file():
        raise InputError(f"--data_dir={data_dir}: there is no {path}; {REMEDY}")
    return path


def _checked(row: object, schema: Schema[Record], scale: tuple[float, float]) -> Record:
    """Return a row as a record; raise ValueError or UnusablePrompt with what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, not {_shown(row)}")
    for name in ("prompt", *schema.texts, *schema.scores):
        if name not in row:
            where = "" if name == "prompt" else f" (rows with it: --data_dir={schema.home})"
            raise ValueError(f"has no {name!r}{where}, only {_shown(list(row))}")
    prompt = as_prompt(row["prompt"])
    fields: dict[str, Any] = {"source": "user", "prompt_id": prompt_id(prompt), **row}
    for name in (*schema.texts, "source", "prompt_id"):
        if flaw := text_flaw(fields[name]):
            raise ValueError(f"{name} {flaw}: {_shown(fields[name])}")
    for name in schema.scores:
        if not (_is_number(fields[name]) and scale[0] <= fields[name] <= scale[1]):
            raise ValueError(
                f"{name} is {_shown(fields[name])}, expected a number from {scale[0]:g} to "
                f"{scale[1]:g} (score_scale in {MANIFEST} sets another scale)"
            )
    scores = {name: float(fields[name]) for name in schema.scores}
    if schema is PAIR and scores["chosen_score"] < scores["rejected_score"]:
        raise ValueError("chosen is scored below rejected")
    record = {"prompt": prompt, **{name: fields[name] for name in schema.texts}, **scores}
    return cast(Record, record | {"source": fields["source"], "prompt_id": fields["prompt_id"]})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
