"""Judge checkpoints on held-out prompts of the toy world; write `report.md` and `report.html`.

    python -m toyworld.report --data_dir .data/toyworld/pref --rm_model_path .model/toyworld/rm/best
        --model SFT=.model/toyworld/sft/best --model PPO=.model/toyworld/ppo/best

The first model is the reference of the others: gains are over it, KL is from it. Rewards and
lengths are means over samples; KL and the share of the possible gain are computed from every
response there can be, by `toyworld.optimum`, on the first `--num_exact` prompts. The pictures show
the other epochs too that stand beside a checkpoint.
"""

import argparse
from collections.abc import Mapping
from html import escape
from pathlib import Path

import torch

from rlhf.arguments import Parser, count, named_path, non_negative, positive, positive_count
from rlhf.disk import replace_text
from rlhf.errors import run_script
from rlhf.lineage import Run
from rlhf.markdown import markdown_table
from rlhf.page import html_table, page, picture, to_png
from toyworld.measure import (
    Model,
    load_policy,
    load_reward,
    load_tokenizer,
    measure,
    read_prompts,
)
from toyworld.optimum import Exam, prepare_exam
from toyworld.pictures import (
    FRONTIER_BETAS,
    MARKED_BETAS,
    Course,
    Optimum,
    Point,
    Told,
    frontier_picture,
    told_picture,
)
from toyworld.tables import (
    Verdict,
    results_rows,
    sample_rows,
)
from toyworld.world import MAX_RESPONSE_TOKENS, requests

FRONTIER_CAPTION = """The black line is the optimum: for every weight β of the KL it is known
exactly, from all responses. The grey above it is out of reach for any policy. A large dot is the
checkpoint in the table, the small ones are the other epochs on the way there from the reference. A
good policy lies on the line, near the β it was trained with; below the line it pays more KL for its
reward than it must, and far to the right it has left the reference for nothing."""
TOLD_CAPTION = """What PPO was told, and what was true. With a reward model that learned from a
careful annotator both rise together. One that learned from an annotator who likes long answers
pays for a name where none was asked for: on those prompts the learned reward rises while the gold
reward falls. That is over-optimisation (arXiv 2210.10760), and training itself cannot see it."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = Parser("Compare checkpoints on held-out prompts of the toy world.")
    parser.prog = "toyworld.report"
    add = parser.add_argument
    add("--data_dir", default=".data/toyworld/pref", help="its eval.jsonl holds the prompts")
    add(
        "--model",
        type=named_path,
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a checkpoint and its name; the first is the reference (repeatable)",
    )
    add("--rm_model_path", help="reward model, for the learned reward in the table")
    add("--out_dir", default=".model/toyworld", help="folder for report.md and report.html")
    add("--temperature", type=positive, default=1.0, help="of all models")
    add("--num_samples", type=positive_count, default=4, help="responses to each prompt")
    add("--max_prompts", type=count, default=0, help="held-out prompts to use (0 = all)")
    add("--num_exact", type=positive_count, default=16, help="prompts to enumerate")
    add("--beta", type=positive, default=0.2, help="weight of the KL in the optimum")
    add("--min_gen_len", type=count, default=1, help="as in the rollouts, for the optimum")
    add("--max_new_tokens", type=positive_count, default=MAX_RESPONSE_TOKENS, help="likewise")
    add("--missing_eos_penalty", type=non_negative, default=1.0, help="likewise")
    add("--seed", type=count, default=42, help="of the samples")
    args = parser.parse_args(argv)
    if Path(args.out_dir).exists() and not Path(args.out_dir).is_dir():
        parser.error(f"--out_dir={args.out_dir} is a file; give a folder")
    args.model = [Run(name, path, f"--model={name}") for name, path in args.model]
    names = [run.name for run in args.model]
    if len(set(names)) < len(names):
        parser.error(f"--model: each needs a name of its own, not {', '.join(names)}")
    return args


def main(args: argparse.Namespace) -> None:
    """Judge every checkpoint, print the tables, write the report."""
    prompts = read_prompts(args.data_dir, "eval")[: args.max_prompts or None]
    reference, *others = args.model
    tokenizer = load_tokenizer(reference.path, flag=reference.flag)
    first_policy = load_policy(reference.path, flag=reference.flag)
    exam = prepare_exam(
        first_policy,
        tokenizer,
        prompts[: args.num_exact],
        temperature=args.temperature,
        min_gen_len=args.min_gen_len,
        max_new_tokens=args.max_new_tokens,
        missing_eos_penalty=args.missing_eos_penalty,
    )
    followed = {run.followed_reward() for run in others}
    paths = sorted(path for path in {args.rm_model_path, *followed} if path)
    rewards = {path: load_reward(path, flag="--rm_model_path") for path in paths}

    def judge(policy: Model) -> Verdict:
        torch.manual_seed(args.seed)
        result = measure(
            policy,
            rewards,
            tokenizer,
            prompts,
            num_samples=args.num_samples,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
        )
        return Verdict(result, exam.figures(policy, args.beta))

    epochs = {
        run.name: {e: judge(load_policy(p, flag=run.flag)) for e, p in run.epochs().items()}
        for run in others
    }
    start = judge(first_policy)
    verdicts = {run.name: epochs[run.name][run.epoch] for run in others}
    verdicts = {reference.name: start, **verdicts}
    note = (
        f"{len(prompts)} held-out prompts, {args.num_samples} responses each, temperature "
        f"{args.temperature:g}. ± is one standard error over prompts. Exact KL, and the share of "
        f"the possible gain in reward - {args.beta:g} KL, are computed from all "
        f"{exam.tree.num_leaves():,} responses to each of {len(exam.questions)} prompts."
    )
    tables = results_rows(verdicts, args.rm_model_path), sample_rows(prompts, verdicts)
    text = f"{markdown_table(tables[0])}\n\n{note}\n\n{markdown_table(tables[1])}\n"
    out_dir = Path(args.out_dir)
    replace_text(out_dir / "report.md", text)
    sections = [
        ("Results", [html_table(tables[0]), f"<p>{note}</p>"]),
        ("Reward against KL", frontier_section(args.model, start, epochs, exam)),
        ("Learned against gold reward", told_section(args.model, start, epochs, prompts)),
        ("Samples", [html_table(tables[1])]),
        ("Training curves", training_curves(args.model, args.rm_model_path)),
    ]
    replace_text(out_dir / "report.html", page("The toy world: what was learned", sections))
    print(f"{text}\nreport: {out_dir / 'report.html'}, a page with pictures; as text: report.md")
    print("next: sh exec_run_eval.sh compares any models, sh exec_run_chat.sh talks to them, and")
    print("sh exec_load_dataset.sh begins the same stages on UltraFeedback and GPT-2")


def frontier_section(
    runs: list[Run],
    start: Verdict,
    epochs: Mapping[str, Mapping[int, Verdict]],
    exam: Exam,
) -> list[str]:
    """Draw all epochs of all runs under the frontier."""

    def point(verdict: Verdict) -> Point:
        return Point(verdict.mean("kl"), verdict.mean("reward"))

    courses = {runs[0].name: Course([], point(start))}
    for run in runs[1:]:
        points = {epoch: point(verdict) for epoch, verdict in epochs[run.name].items()}
        courses[run.name] = Course([*points.values()], points[run.epoch])
    betas = sorted({*FRONTIER_BETAS, *MARKED_BETAS})
    frontier = [Optimum(b, *best) for b, best in zip(betas, exam.frontier(betas), strict=True)]
    png = to_png(frontier_picture(courses, frontier))
    return [picture(png, "reward against KL"), f"<p>{FRONTIER_CAPTION}</p>"]


def told_section(
    runs: list[Run],
    start: Verdict,
    epochs: Mapping[str, Mapping[int, Verdict]],
    prompts: list[str],
) -> list[str]:
    """Draw what runs of PPO were told by a reward model, and what was true."""
    told = {
        run.name: [
            Told(epoch, verdict.result.learned[reward], verdict.result.gold)
            for epoch, verdict in {0: start, **epochs[run.name]}.items()
        ]
        for run in runs[1:]
        if (reward := run.followed_reward())
    }
    if not told:
        return []
    brief = torch.tensor([requests()[prompt].length == "brief" for prompt in prompts])
    groups = {"all prompts": torch.ones_like(brief), "brief answer wanted": brief}
    png = to_png(told_picture(told, groups))
    return [picture(png, "learned and gold reward over epochs"), f"<p>{TOLD_CAPTION}</p>"]


def training_curves(runs: list[Run], rm_model_path: str | None) -> list[str]:
    """Take over the pictures that the stages drew of themselves."""
    if rm_model_path:
        runs = [*runs, Run("RM", rm_model_path, "--rm_model_path")]
    found = {run.name: run.curves() for run in runs if run.curves().is_file()}
    return [
        f"<h3>{escape(name)}</h3>{picture(path.read_bytes(), f'training of {name}')}"
        for name, path in found.items()
    ]


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
