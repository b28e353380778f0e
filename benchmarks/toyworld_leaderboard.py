"""Every algorithm of the project on the toy world, each with the same number of samples.

    python benchmarks/toyworld_leaderboard.py

The currency is a response that is sampled from a policy and judged. Every method gets the same
number of them: six to each of 1,536 training prompts by default. PPO and its relatives write their
own, the preference losses learn from the reference's, in pairs or scored, and best-of-n spends them
on answering. Every seed has a world of its own, and its own SFT model, which is the reference. All
figures are exact, on held-out prompts. What is compared, and how to read it: docs/leaderboard.md.

Prints two tables, writes benchmarks/results/toyworld_leaderboard.json and
docs/toyworld_leaderboard.png. `--from_results` draws and prints again what was measured. A run that
was stopped goes on where it was, if `--work_dir` is given.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.toyworld_runs import (
    FIGURES,
    Record,
    World,
    figure_cells,
    make_world,
    mean_frontier,
    measure_seeds,
    write_results,
)
from rlhf.markdown import markdown_table
from toyworld.annotators import NOISE
from toyworld.measure import load_policy
from toyworld.pictures import COLORS, FRONTIER_BETAS, draw_frontier

RESULTS = ROOT / "benchmarks/results/toyworld_leaderboard.json"
PICTURE = ROOT / "docs/toyworld_leaderboard.png"
BETA = 0.2  # of E[r] - beta * KL, which is what all are judged by
GROUP = 4  # responses to a prompt at a time, where they are compared with each other
ROLLOUT = 256  # responses in a rollout
NEAR_BEST = 0.3  # the half of the picture with the best: gold reward from there on

# Those whose optimum is the one that the share is measured by, and those that want something else.
SAME_OPTIMUM = {
    "ppo": "PPO",
    "rloo": "RLOO",
    "dr_grpo": "Dr. GRPO",
    "dpo": "DPO",
    "ppo-regression": "PPO, learned reward: regression",
    "ppo-pairwise": "PPO, learned reward: pairwise",
    "ppo-listwise": "PPO, learned reward: listwise",
}
OTHER_OPTIMUM = {
    "grpo": "GRPO",
    "cdpo": "cDPO, label smoothing 0.1",
    "dpo-sft": "DPO + SFT term, weight 0.1",
    "ipo": "IPO",
    "hinge": "hinge",
    "simpo": "SimPO",
    "rrhf": "RRHF",
    "best-of-n": "best of n",
}
METHODS = SAME_OPTIMUM | OTHER_OPTIMUM
FAMILIES = {  # in the picture: a marker for each, and within it a color for each method
    "o": ["ppo", "rloo", "dr_grpo", "grpo"],
    "^": ["ppo-regression", "ppo-pairwise", "ppo-listwise"],
    "s": ["dpo", "cdpo", "dpo-sft", "ipo", "hinge", "simpo"],
    "D": ["rrhf", "best-of-n"],
}


class Shares(NamedTuple):
    """What one method does with the samples that every method gets, in the scripts' arguments."""

    num_samples: int
    ppo: dict[str, int]  # a rollout has one response to each of its prompts
    groups: dict[str, int]  # a rollout has GROUP responses to each of its prompts
    pairs: dict[str, int]  # drawn from the reference
    scored: dict[str, int]  # drawn from the reference
    n: int  # best of n


def shares(num_prompts: int, per_prompt: int) -> Shares:
    """Deal `per_prompt` samples for each of `num_prompts` prompts, a multiple of ROLLOUT."""
    total, prompts = num_prompts * per_prompt, {"max_samples": num_prompts}
    return Shares(
        num_samples=total,
        ppo={**prompts, "batch_size": ROLLOUT, "num_outer_epoch": per_prompt},
        groups={
            **prompts,
            "batch_size": ROLLOUT // GROUP,
            "num_responses": GROUP,
            "num_outer_epoch": math.ceil(per_prompt / GROUP),
            "max_steps": total // ROLLOUT,
        },
        pairs={**prompts, "num_pairs": total // 2},
        scored={**prompts, "num_responses": per_prompt},
        n=per_prompt,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--only", choices=METHODS, nargs="+", help="train these and print, write nothing")
    add("--num_prompts", type=int, default=1536, help=f"for training, a multiple of {ROLLOUT}")
    add("--per_prompt", type=int, default=6, help="samples for each of them")
    add("--num_exact", type=int, default=16, help="held-out prompts")
    add("--jobs", type=int, default=2, help="seeds at a time, a core each")
    add("--work_dir", help="keep data and checkpoints here (default: a temporary folder)")
    add("--from_results", action="store_true", help="train nothing, read the results file")
    args = parser.parse_args()
    if args.num_prompts % ROLLOUT or args.num_prompts < 1:
        parser.error(f"--num_prompts={args.num_prompts} is no multiple of {ROLLOUT}")
    return args


def trainers(world: World, share: Shares) -> dict[str, Callable[[], Path]]:
    """How the checkpoint of each method is made; nothing is trained before it is called."""
    gold: dict[str, Any] = {"reward_fn": "toyworld:gold_reward", "beta": BETA}
    speed, slower = {"learning_rate": 2e-3}, {"learning_rate": 1e-3}
    judged = world.folder / "judged"  # the same rows, as a Bradley-Terry annotator scores them
    drawn = {"temperature": 1.5}
    ppo = partial(world.ppo, **share.ppo)

    def compared(advantage: str) -> Path:
        return world.ppo(advantage, **share.groups, **gold, advantage=advantage)

    def learned(loss: str) -> Path:
        data, scale = world.folder / "data/rm", 1.0
        if loss != "regression":
            world.write_rows(judged, "bradley-terry")
            data, scale = judged / "data/rm", 1 / NOISE  # in theory its logits are rewards / NOISE
        guard = {"max_reward": 5 * scale}
        rm = world.reward_model(f"rm-{loss}", data_dir=data, loss=loss, **guard)
        return ppo(f"ppo-{loss}", rm_model_path=rm, beta=BETA * scale, **guard)

    def preferred(name: str, **settings: object) -> Path:
        data = world.pairs("pairs", **share.pairs, **drawn)
        return world.dpo(name, data_dir=data, num_epochs=6, **{**speed, **settings})

    def ranked(name: str) -> Path:
        data = world.pairs("scored", **share.scored, **drawn, annotator="noiseless")
        return world.dpo(name, data_dir=data, loss="rrhf", num_epochs=3, batch_size=32, **slower)

    return {
        "ppo": lambda: ppo("ppo", **gold),
        "rloo": lambda: compared("rloo"),
        "dr_grpo": lambda: compared("dr_grpo"),
        "grpo": lambda: compared("grpo"),
        "ppo-regression": lambda: learned("regression"),
        "ppo-pairwise": lambda: learned("pairwise"),
        "ppo-listwise": lambda: learned("listwise"),
        "dpo": lambda: preferred("dpo", beta=BETA / NOISE),
        "cdpo": lambda: preferred("cdpo", beta=BETA / NOISE, label_smoothing=0.1),
        "dpo-sft": lambda: preferred("dpo-sft", beta=BETA / NOISE, sft_coeff=0.1),
        "ipo": lambda: preferred("ipo", loss="ipo", beta=0.2),
        "hinge": lambda: preferred("hinge", loss="hinge", beta=0.2),
        "simpo": lambda: preferred("simpo", loss="simpo", beta=1.0, simpo_gamma=0.5, **slower),
        "rrhf": lambda: ranked("rrhf"),
    }


def judge_seed(args: argparse.Namespace, seed: int, folder: Path) -> list[Record]:
    """Train and judge one seed: a record for each method, and the frontier's."""
    world, share = make_world(seed, folder), shares(args.num_prompts, args.per_prompt)
    train = trainers(world, share)
    exam = world.exam(args.num_exact)
    records = world.optima(exam, sorted({*FRONTIER_BETAS, BETA}))
    for method in args.only or METHODS:
        if method == "best-of-n":
            figures = exam.best_of(share.n, BETA)
        else:
            figures = exam.figures(load_policy(train[method](), flag=method), BETA)
        records.append(world.record(method, BETA, figures))
    return records


def results_table(records: list[Record], methods: dict[str, str]) -> str:
    """Lay out a row for each method: means over seeds with 95% intervals."""
    rows = [["method", *FIGURES]]
    for method, label in {"optimum": "the optimum", **methods}.items():
        if some := [r for r in records if (r["method"], r["beta"]) == (method, BETA)]:
            rows.append([label, *figure_cells(some)])
    return markdown_table(rows)


def draw(records: list[Record]) -> None:
    """Draw the mean of each method over seeds under the mean frontier, each seed faintly.

    Once all of them, and once those near the best.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, near = figure.subplots(1, 2, width_ratios=(1, 1.3))
    judged = [record for record in records if record["method"] != "optimum"]
    best = [r for r in judged if r["reward"] > max(s["reward"] for s in judged) - NEAR_BEST]
    for axis, shown in ((whole, judged), (near, best)):
        draw_methods(axis, records)
        draw_frontier(axis, mean_frontier(records))
        kl, reward = ([r[name] for r in shown] for name in ("kl", "reward"))
        axis.set_xlim(0.9 * min(kl), 1.05 * max(kl))
        margin = (max(reward) - min(reward)) / 20
        axis.set_ylim(min(reward) - margin, max(reward) + 2 * margin)
    near.set_ylabel("")
    near.set_title("near the best")
    figure.legend(*near.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.savefig(PICTURE, dpi=110)


def draw_methods(axis: Axes, records: list[Record]) -> None:
    for marker, methods in FAMILIES.items():
        for color, method in zip(COLORS, methods, strict=False):
            some = [r for r in records if r["method"] == method]
            kl, reward = ([r[name] for r in some] for name in ("kl", "reward"))
            axis.plot(kl, reward, marker, color=color, markersize=4, alpha=0.5)
            mean = statistics.mean(kl), statistics.mean(reward)
            edge = {"markeredgecolor": "black", "markeredgewidth": 0.6}
            label = METHODS[method]
            axis.plot(*mean, marker, color=color, markersize=9, alpha=0.9, label=label, **edge)


def main(args: argparse.Namespace) -> None:
    if args.only:
        records = measure_seeds(judge_seed, args)
    else:
        if not args.from_results:
            write_results(RESULTS, args, measure_seeds(judge_seed, args))
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        args, records = argparse.Namespace(**results["arguments"]), results["records"]
        draw(records)
    share = shares(args.num_prompts, args.per_prompt)
    print(f"{share.num_samples:,} samples each\n\nOptimum of E[r] - {BETA} KL:\n")
    print(results_table(records, SAME_OPTIMUM))
    print("\nAnother optimum; the share is descriptive:\n")
    print(results_table(records, OTHER_OPTIMUM))
    bound = math.log(share.n) - (share.n - 1) / share.n
    print(f"\nbest of n: n = {share.n}; its KL is at most log n - (n - 1) / n = {bound:.3f}")


if __name__ == "__main__":
    main(parse_args())
