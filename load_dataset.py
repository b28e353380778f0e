"""Make `.data/{sft,rm,pref}` from a data set of graded or compared responses.

    rows -> filter -> split by prompt, per source -> pairs -> .data

A row is a prompt with its responses. What cannot be used is dropped and counted under a reason, in
the table at the end and in `.data/manifest.json`: read = kept + dropped, for rows, prompts and
responses. A prompt goes to one split, and there to one side, train or eval:

    sft, rm   a line for each response, with its score
    pref      a line for each prompt: the best-scored against the worst-scored response

A healthy run keeps nearly all of an English data set; what pref loses besides are ties.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf.arguments import Parser, count, inner_ratio, non_negative, ratio
from rlhf.errors import InputError, run_script
from rlhf.records import (
    MANIFEST,
    SPLITS,
    PairRecord,
    ScoredRecord,
    pair_record,
    read_rows,
    replace_splits,
    scored_records,
    sha256_of,
    write_records,
)
from rlhf.sources import (
    SCALE,
    Example,
    UnusablePrompt,
    form_of,
    language_filter,
    num_responses,
    parse_row,
)

ULTRAFEEDBACK = "openbmb/UltraFeedback"
REPAIRED_REVISION = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"  # many a score of 10 was a 1 before
SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
HUB_TIMEOUT = 10  # seconds

Splits = dict[str, dict[str, list[Example]]]  # split to side to prompts


def build_parser() -> Parser:
    parser = Parser(description="Make the splits for SFT, the reward model, and PPO or DPO.")
    add = parser.add_argument
    add("--seed", type=count, default=42, help="which prompts go where")
    add("--data_dir", default=".data", help="the folder for the splits")
    add("--sft_ratio", type=ratio, default=0.1, help="share of the prompts for SFT (0 = no split)")
    add(
        "--rm_ratio", type=ratio, default=0.1, help="share for the reward model; pref gets the rest"
    )
    add("--train_ratio", type=inner_ratio, default=0.8, help="share of a split for training")
    files = "a .json, .jsonl or .parquet file, gzipped or not, or a folder of them"
    add("--dataset", default=ULTRAFEEDBACK, help=f"an id on the Hugging Face Hub, or {files}")
    add("--dataset_revision", help=f"revision on the Hub (default: repaired for {ULTRAFEEDBACK})")
    add("--language", default="en", help="drop prompts and responses in another (any = keep all)")
    gap = "least difference of the scores of a pair in pref"
    add("--min_score_gap", type=non_negative, default=0.0, help=gap)
    add("--exclude_source", action="append", help="drop prompts from this source (repeatable)")
    which = "SFT learns from every response, or from the best-scored to each prompt"
    add("--sft_responses", choices=("all", "best"), default="all", help=which)
    add("--max_samples", type=count, default=0, help="prompts to use (0 = all)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.sft_ratio + args.rm_ratio >= 1:
        given = f"--sft_ratio={args.sft_ratio} and --rm_ratio={args.rm_ratio}"
        parser.error(f"{given} must sum to less than 1: pref gets the rest")
    here = Path(args.dataset).exists()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", args.dataset) is not None
    if not here and (args.dataset.lower().endswith(SUFFIXES) or not is_hub_id):
        parser.error(f"--dataset={args.dataset}: there is no such file or folder")
    if here and args.dataset_revision:
        parser.error(f"--dataset_revision is for the Hub, but --dataset={args.dataset} is here")
    data_dir = Path(args.data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        parser.error(f"--data_dir={data_dir} is a file: give a folder")
    strange = [split for split in SPLITS if (data_dir / split).exists()]
    if strange and not (data_dir / MANIFEST).exists():
        parser.error(
            f"--data_dir={data_dir}: {', '.join(strange)} there came without a {MANIFEST}, so not "
            f"from this script, which would replace them: move them away or give another folder"
        )
    return args


def main(args: argparse.Namespace) -> None:
    in_language = language_filter(args.language)
    folder, files = find_files(args)
    print(f"reading {', '.join(file.name for file in files)}", flush=True)
    counts = Counts()
    examples = load_examples(files, args, in_language, counts)
    splits = divide_into_splits(examples, args, counts)
    origin = {
        "dataset": args.dataset,
        "revision": None if Path(args.dataset).exists() else folder.name,
        "files": {str(file.relative_to(folder)): sha256_of(file) for file in files},
        "arguments": vars(args),
    }
    print_summary(write_splits(splits, origin, args, counts), args)


@dataclass
class Ledger:
    """What became of all that was read: read = kept + dropped."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        dropped = {reason: n for reason, n in self.dropped.most_common() if n}
        return {"read": self.read, "kept": self.kept, "dropped": dropped}


@dataclass
class Counts:
    """What is counted on the way from rows to splits."""

    rows: Ledger = field(default_factory=Ledger)
    prompts: Ledger = field(default_factory=Ledger)
    responses: Ledger = field(default_factory=Ledger)
    forms: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    repaired_scores: int = 0

    def drop_prompt(self, example: Example, reason: str) -> None:
        """Count a prompt and its responses as dropped, after all."""
        self.prompts.dropped[reason] += 1
        self.responses.dropped["prompt is dropped"] += len(example.responses)


# 1. Rows


def find_files(args: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The folder of the data set and the files in it, sorted, without hidden ones."""
    path = Path(args.dataset)
    if not path.exists():
        pinned = REPAIRED_REVISION if args.dataset == ULTRAFEEDBACK else None
        path = download(args.dataset, args.dataset_revision or pinned)
    folder = path if path.is_dir() else path.parent
    files = [
        file
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.name.lower().endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"--dataset={args.dataset}: no file there ends in {', '.join(SUFFIXES)}")
    replaced = [Path(args.data_dir, split).resolve() for split in SPLITS]
    for file in files:
        if any(file.resolve().is_relative_to(folder) for folder in replaced):
            raise InputError(
                f"--dataset={args.dataset}: {file} is one of the splits that this run would "
                f"replace: give it from another folder, or give another --data_dir"
            )
    return folder, files


def download(dataset: str, revision: str | None) -> Path:
    """Fetch a Hub data set's files into the cache; return their folder, named by its revision.

    The raw files, since `datasets.load_dataset` wants one schema for all of them, which one score
    of another type or one lone surrogate breaks. What is in the cache serves without the Hub.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    failures = (EntryNotFoundError, HTTPError, OSError, ValueError)
    unreachable = None
    try:  # snapshot_download alone waits minutes for a Hub that does not answer
        HfApi().dataset_info(dataset, revision=revision, timeout=HUB_TIMEOUT)
    except failures as error:
        unreachable = error
    try:
        folder = snapshot_download(
            dataset,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
            local_files_only=unreachable is not None,
        )
    except failures as error:
        cause = unreachable or error
        raise InputError(
            f"--dataset={dataset}: neither a file or folder here, nor given by the Hugging Face "
            f"Hub at revision {revision or 'main'} ({type(cause).__name__}: {str(cause)[:200]}); "
            f"without the Hub, give a local .jsonl, .json or .parquet file"
        ) from cause
    return Path(folder)


# 2. Filter


def load_examples(
    files: list[Path],
    args: argparse.Namespace,
    in_language: Callable[[str], bool],
    counts: Counts,
) -> list[Example]:
    """The usable prompts, none twice, each with two or more usable responses."""
    examples: dict[str, Example] = {}
    columns: set[str] = set()  # of rows of no known form
    default_source = re.split(r"\.(?:json|parquet)", Path(args.dataset).name)[0]
    rows = (row for path in files for row in read_rows(path))
    for row in tqdm(rows, unit=" rows", disable=None):
        counts.rows.read += 1
        if not isinstance(row, dict):
            counts.rows.dropped["row is not a JSON object"] += 1
            continue
        form = form_of(row)
        if form is None:
            counts.rows.dropped["columns are of no known form"] += 1
            columns.update(row)
            continue
        counts.rows.kept += 1
        counts.forms[form] += 1
        counts.prompts.read += 1
        counts.responses.read += num_responses(row)
        lost: Counter[str] = Counter()  # this prompt's responses
        try:
            example = parse_row(row, default_source)
            counts.sources[example.source] += 1
            counts.repaired_scores += example.repaired
            lost += example.dropped
            if example.source in (args.exclude_source or []):
                raise UnusablePrompt("source is excluded")
            if example.prompt_id in examples:
                raise UnusablePrompt("prompt is a duplicate")
            example = keep_language(example, args.language, in_language, lost)
            if len(example.responses) < 2:
                raise UnusablePrompt("fewer than two usable responses")
            examples[example.prompt_id] = example
        except UnusablePrompt as flaw:
            counts.prompts.dropped[str(flaw)] += 1
            lost["prompt is dropped"] = num_responses(row) - lost.total()
        counts.responses.dropped += lost
    check_loaded(examples, columns, args, counts)
    return list(examples.values())


def keep_language(
    example: Example, language: str, in_language: Callable[[str], bool], lost: Counter[str]
) -> Example:
    """Drop the responses in another language, or the prompt."""
    prompt = example.prompt
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    if not in_language(text):
        raise UnusablePrompt(f"prompt is not in language {language}")
    responses = [response for response in example.responses if in_language(response.text)]
    lost[f"response is not in language {language}"] = len(example.responses) - len(responses)
    return example._replace(responses=responses)


def check_loaded(
    examples: dict[str, Example], columns: set[str], args: argparse.Namespace, counts: Counts
) -> None:
    """Stop where nothing can be used, or a source that was to be left out never came."""
    where = f"--dataset={args.dataset}"
    if not counts.rows.read:
        raise InputError(f"{where} holds no rows")
    if not counts.forms and columns:
        raise InputError(
            f"{where}: no row has a known form; columns: {', '.join(sorted(columns))[:200]}; "
            f"expected: instruction and completions, or chosen and rejected"
        )
    unknown = sorted(set(args.exclude_source or []) - counts.sources.keys())
    if unknown:
        raise InputError(
            f"--exclude_source={unknown[0]}: no such source; there are "
            f"{', '.join(sorted(counts.sources))[:500]}"
        )
    if not examples:
        reasons = (counts.rows.dropped + counts.prompts.dropped).most_common(3)
        told = ", ".join(f"{reason}: {n}" for reason, n in reasons)
        raise InputError(f"{where}: none of {counts.rows.read} rows can be used ({told})")


# 3. Split


def divide_into_splits(examples: list[Example], args: argparse.Namespace, counts: Counts) -> Splits:
    """Give each prompt to one split and one side, whatever the order of the rows."""

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{args.seed} {example.prompt_id}".encode()).digest()

    examples = sorted(examples, key=place)
    if args.max_samples:
        for example in examples[args.max_samples :]:
            counts.drop_prompt(example, "beyond --max_samples")
        del examples[args.max_samples :]
    sft, rest = divide(examples, args.sft_ratio)
    rm, pref = divide(rest, args.rm_ratio / (1 - args.sft_ratio))
    pref = [example for example in pref if is_comparable(example, args.min_score_gap, counts)]
    shares = (args.sft_ratio, args.rm_ratio, 1 - args.sft_ratio - args.rm_ratio)
    splits: Splits = {}
    for name, part, share in zip(SPLITS, (sft, rm, pref), shares, strict=True):
        if share == 0:
            continue
        train, evaluation = divide(part, args.train_ratio)
        if not train or not evaluation:
            # From this number on, rounding to the nearest prompt leaves one to each side.
            least = math.floor(0.5 / min(args.train_ratio, 1 - args.train_ratio)) + 1
            flag = f"--{name}_ratio={share}"
            if name == "pref":
                flag = f"--sft_ratio, --rm_ratio, --min_score_gap={args.min_score_gap} and ties"
            raise InputError(
                f"{flag}: of {len(examples)} usable prompts {name} gets {len(part)}, and train and "
                f"eval at --train_ratio={args.train_ratio} take {least}: change a ratio, or give "
                f"about {math.ceil(least / share)} prompts"
            )
        splits[name] = {"train": sorted(train, key=place), "eval": sorted(evaluation, key=place)}
    return splits


def divide(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Cut the prompts of each source at `share`, as their order stands.

    What rounding adds or takes at one source carries over to the next: the whole is divided to the
    nearest prompt, each source to within one, and a hundred sources of one prompt each still give
    ten prompts to a share of 0.1.
    """
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    first: list[Example] = []
    second: list[Example] = []
    passed = 0
    for group in by_source.values():
        cut = math.floor((passed + len(group)) * share + 0.5) - math.floor(passed * share + 0.5)
        first += group[:cut]
        second += group[cut:]
        passed += len(group)
    return first, second


def is_comparable(example: Example, min_score_gap: float, counts: Counts) -> bool:
    """Can the best and the worst response be told apart by their scores?"""
    scores = [response.score for response in example.responses]
    gap = max(scores) - min(scores)
    if gap > 0 and gap >= min_score_gap:
        return True
    counts.drop_prompt(example, "scores tie (pref)" if gap == 0 else "score gap too small (pref)")
    return False


# 4. Pairs and files


def write_splits(
    splits: Splits, origin: dict[str, Any], args: argparse.Namespace, counts: Counts
) -> dict[str, Any]:
    """Write splits and manifest aside, then put them in place of the old ones; return it."""
    data_dir = Path(args.data_dir)
    finished = data_dir / ".unfinished"
    shutil.rmtree(finished, ignore_errors=True)  # of a run that was killed
    finished.mkdir(parents=True)
    try:
        files: dict[str, dict[str, Any]] = {}
        for split, sides in splits.items():
            (finished / split).mkdir()
            files[split] = {}
            for side, examples in sides.items():
                path = finished / split / f"{side}.jsonl"
                files[split][side] = write_side(path, split, examples, args, counts)
        manifest = origin | describe(splits, counts) | {"splits": files}
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (finished / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if (data_dir / MANIFEST).exists():
            print(f"replacing the splits that are in {data_dir}")
        replace_splits(data_dir, finished)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
    return manifest


def write_side(
    path: Path, split: str, examples: list[Example], args: argparse.Namespace, counts: Counts
) -> dict[str, Any]:
    def records() -> Iterator[ScoredRecord | PairRecord]:
        for example in examples:
            if split == "pref":
                yield pair_record(example)
            else:
                # Of a bare preference, nobody should learn to write the rejected response.
                best_only = split == "sft" and (args.sft_responses == "best" or not example.scored)
                yield from scored_records(example, best_only=best_only)

    rows = write_records(path, records())
    num_used = 2 * rows if split == "pref" else rows
    unused = "neither best nor worst (pref)" if split == "pref" else "not the best (sft)"
    counts.prompts.kept += len(examples)
    counts.responses.kept += num_used
    counts.responses.dropped[unused] += sum(len(e.responses) for e in examples) - num_used
    return {"rows": rows, "prompts": len(examples), "sha256": sha256_of(path)}


def describe(splits: Splits, counts: Counts) -> dict[str, Any]:
    """The manifest's account of the prompts that are in the splits, and of those that are not."""
    sources: dict[str, Counter[str]] = {}
    unscored = 0
    for split, sides in splits.items():
        for example in sides["train"] + sides["eval"]:
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
        "sources": {source: sources[source] for source in sorted(sources)},
    }


def print_summary(manifest: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"{args.dataset}: {', '.join(manifest['forms'])}")
    print(f"{'':48}{'read':>9}{'kept':>9}{'dropped':>9}")
    for name in ("rows", "prompts", "responses"):
        ledger = manifest[name]
        dropped = sum(ledger["dropped"].values())
        print(f"{name:48}{ledger['read']:9,}{ledger['kept']:9,}{dropped:9,}")
        for reason, number in ledger["dropped"].items():
            print(f"  {reason:64}{number:9,}")
    if manifest["repaired_scores"]:
        print(f"{manifest['repaired_scores']:,} scores of 10 taken as 1, as their ratings say")
    if unscored := manifest["pairs_without_scores"]["prompts"]:
        print(f"{unscored:,} pairs without scores: 10 for chosen, 1 for rejected, SFT has chosen")
    print(f"\n{'split':12}{'train rows':>12}{'eval rows':>12}{'prompts':>12}")
    for split, sides in manifest["splits"].items():
        train, evaluation = sides["train"], sides["eval"]
        prompts = train["prompts"] + evaluation["prompts"]
        print(f"{split:12}{train['rows']:12,}{evaluation['rows']:12,}{prompts:12,}")
    first = next(iter(manifest["splits"]))
    script = {"sft": "exec_run_sft.sh", "rm": "exec_run_rm.sh", "pref": "exec_run_dpo.sh"}[first]
    where = "" if args.data_dir == ".data" else f" --data_dir={Path(args.data_dir, first)}"
    print(f"\nnext: sh {script}{where}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
