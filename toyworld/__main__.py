"""Write the toy world to a folder: `ultrafeedback.jsonl`, and the base model `gpt2-toy`.

python -m toyworld --out_dir .data/toyworld
"""

import argparse
import json
import shutil
from pathlib import Path

from rlhf.arguments import Parser, count, number
from rlhf.errors import run_script
from toyworld.annotators import ANNOTATORS
from toyworld.rows import build_rows
from toyworld.world import requests


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = Parser("Write the toy world: rows in UltraFeedback's schema, and a base model.")
    parser.prog = "toyworld"
    add = parser.add_argument
    most = len(requests())
    add("--out_dir", default=".data/toyworld", help="folder for ultrafeedback.jsonl and gpt2-toy")
    add("--seed", type=count, default=42, help="of prompts, answers, noise and weights")
    add(
        "--num_prompts",
        type=number(int, least=1, most=most),
        default=most,
        help=f"rows to write, of the {most} prompts that there are",
    )
    add("--annotator", choices=ANNOTATORS, default="noiseless", help="who scores the answers")
    args = parser.parse_args(argv)
    if Path(args.out_dir).exists() and not Path(args.out_dir).is_dir():
        parser.error(f"--out_dir={args.out_dir} is a file; give a folder")
    return args


def main(args: argparse.Namespace) -> None:
    """Write both in a folder aside, then put them in the place of what was there."""
    from toyworld.base_model import save_base_model  # torch takes seconds: arguments come first

    out_dir = Path(args.out_dir)
    partial, old = out_dir / ".partial", out_dir / ".partial" / "old"
    shutil.rmtree(partial, ignore_errors=True)
    old.mkdir(parents=True)
    with (partial / "ultrafeedback.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for row in build_rows(args.seed, args.num_prompts, args.annotator):
            file.write(json.dumps(row) + "\n")
    save_base_model(partial / "gpt2-toy", args.seed)
    for name in ("ultrafeedback.jsonl", "gpt2-toy"):
        if (out_dir / name).exists():
            (out_dir / name).rename(old / name)
        (partial / name).rename(out_dir / name)
    shutil.rmtree(partial)
    print(f"{out_dir}: {args.num_prompts} prompts with 4 answers each, and a base model")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
