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
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf.arguments import Parser, count, inner_ratio, non_negative, nonempty, ratio, seed
from rlhf.disk import Lock, sha256_of
from rlhf.errors import InputError, run_script
from rlhf.files import SUFFIXES, ULTRAFEEDBACK, find_files, read_rows
from rlhf.language import keep_language, language_filter
from rlhf.records import (
    MANIFEST,
    PairRecord,
    ScoredRecord,
    describe,
    end_replacing,
    pair_record,
    replace_splits,
    scored_records,
    write_records,
)
from rlhf.sources import Example, UnusablePrompt, form_of, num_responses, parse_row
from rlhf.splits import SPLITS, Counts, Splits, divide_into_splits

UNFINISHED = ".unfinished"  # in --data_dir: splits on their way


def build_parser() -> Parser:
    parser = Parser(description="Make the splits for SFT, the reward model, and PPO or DPO.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="which prompts go where")
    add("--data_dir", type=nonempty, default=".data", help="the folder for the splits")
    add("--sft_ratio", type=ratio, default=0.1, help="share of the prompts for SFT (0 = no split)")
    add(
        "--rm_ratio", type=ratio, default=0.1, help="share for the reward model; pref gets the rest"
    )
    add("--train_ratio", type=inner_ratio, default=0.8, help="share of a split for training")
    files = "a .json, .jsonl or .parquet file, gzipped or not, or a folder of them"
    add(
        "--dataset",
        type=nonempty,
        default=ULTRAFEEDBACK,
        help=f"a Hub id, or {files}",
    )
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
    data_dir = Path(args.data_dir)
    is_new = not data_dir.exists()
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(data_dir, flag="--data_dir"):
            end_replacing(data_dir, data_dir / UNFINISHED)  # of a run that was killed
            shutil.rmtree(data_dir / UNFINISHED, ignore_errors=True)
            make_splits(args)
    finally:
        if is_new and not any(data_dir.iterdir()):
            data_dir.rmdir()


def make_splits(args: argparse.Namespace) -> None:
    in_language = language_filter(args.language)

    # 1. Rows
    folder, files = find_files(args.dataset, args.dataset_revision)
    check_files(files, args)
    print(f"reading {', '.join(file.name for file in files)}", flush=True)

    # 2. Filter
    counts = Counts()
    examples = load_examples(files, args, in_language, counts)

    # 3. Split
    splits = divide_into_splits(
        examples,
        counts,
        seed=args.seed,
        max_samples=args.max_samples,
        sft_ratio=args.sft_ratio,
        rm_ratio=args.rm_ratio,
        train_ratio=args.train_ratio,
        min_score_gap=args.min_score_gap,
    )

    # 4. Pairs and files
    origin = {
        "dataset": args.dataset,
        "revision": None if Path(args.dataset).exists() else folder.name,
        "files": {str(file.relative_to(folder)): sha256_of(file) for file in files},
        "arguments": vars(args),
    }
    manifest = write_splits(splits, origin, args, counts)
    print_summary(manifest, args)


def check_files(files: list[Path], args: argparse.Namespace) -> None:
    """Stop before a file is read and replaced at once."""
    replaced = [Path(args.data_dir, split).resolve() for split in SPLITS]
    for file in files:
        if any(file.resolve().is_relative_to(folder) for folder in replaced):
            raise InputError(
                f"--dataset={args.dataset}: {file} is one of the splits that this run would "
                f"replace: give it from another folder, or give another --data_dir"
            )


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
        lost: Counter[str] = Counter()  # responses of this prompt that are dropped, by reason
        try:
            example = parse_row(row, default_source)
            counts.sources[example.source] += 1
            counts.repaired_scores += example.repaired
            lost = example.dropped
            if example.source in (args.exclude_source or []):
                raise UnusablePrompt("source is excluded")
            if example.prompt_id in examples:
                raise UnusablePrompt("prompt is a duplicate")
            example = keep_language(example, args.language, in_language)
            lost = example.dropped
            if len(example.responses) < 2:
                raise UnusablePrompt("fewer than two usable responses")
            examples[example.prompt_id] = example
        except UnusablePrompt as flaw:
            counts.prompts.dropped[str(flaw)] += 1
            lost["prompt is dropped"] = num_responses(row) - lost.total()
        counts.responses.dropped += lost
    check_loaded(examples, columns, args, counts)
    return list(examples.values())


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
        lost = counts.rows.dropped + counts.prompts.dropped + counts.responses.dropped
        del lost["prompt is dropped"]  # the prompt's own reason tells more
        reasons = lost.most_common(3)
        told = ", ".join(f"{reason}: {n}" for reason, n in reasons)
        raise InputError(f"{where}: none of {counts.rows.read} rows can be used ({told})")


def write_splits(
    splits: Splits, origin: dict[str, Any], args: argparse.Namespace, counts: Counts
) -> dict[str, Any]:
    """Write splits and manifest aside, then put them in place of the old; return the manifest."""
    data_dir = Path(args.data_dir)
    finished = data_dir / UNFINISHED
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
        end_replacing(data_dir, finished)
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
