"""How close PPO and DPO come to the computed optimum: several betas, three seeds, the whole way.

    python benchmarks/toyworld_frontier.py

Every seed has a world of its own, and its own SFT model, which is the reference. From it start, at
each beta: PPO on the gold reward itself, and DPO on 100,000 pairs of the reference's own responses,
judged by Bradley-Terry, with beta_DPO = s * beta (s = 2 is the annotator's certainty). At one beta
also what people do in practice: PPO on a learned reward, and DPO on best-against-worst pairs; and
DPO on pairs drawn at temperatures 1 and 1.25 instead of 1.5. All figures are exact, on held-out
prompts.

Prints a table, writes benchmarks/results/toyworld_frontier.json and docs/toyworld_frontier.png.
About three quarters of an hour on 2 CPU cores. `--from_results` draws and prints again what was
measured.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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

RESULTS = ROOT / "benchmarks/results/toyworld_frontier.json"
PICTURE = ROOT / "docs/toyworld_frontier.png"
METHODS = {
    "ppo-gold": "PPO, gold reward",
    "dpo-own": "DPO, own pairs",
    "ppo-learned": "PPO, learned reward",
    "dpo-own-t1": "DPO, own pairs at temperature 1",
    "dpo-own-t1.25": "DPO, own pairs at temperature 1.25",
    "dpo-best-worst": "DPO, best against worst (β_DPO = 1)",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--betas", type=float, nargs="+", default=[0.1, 0.2, 0.5, 1.0])
    add("--practice_beta", type=float, default=0.2, help="where the other methods are tried too")
    add("--num_pairs", type=int, default=100_000)
    add("--num_exact", type=int, default=32, help="held-out prompts")
    add("--jobs", type=int, default=2, help="seeds at a time, a core each")
    add("--work_dir", help="keep data and checkpoints here (default: a temporary folder)")
    add("--from_results", action="store_true", help="train nothing, read the results file")
    return parser.parse_args()


def train_methods(args: argparse.Namespace, world: World) -> dict[str, dict[float, Path]]:
    """Train every method in one world; return the checkpoints by method and beta."""
    drawn = {"own": 1.5, "own-t1": 1.0, "own-t1.25": 1.25}
    for name, temperature in drawn.items():
        world.pairs(name, num_pairs=args.num_pairs, temperature=temperature)

    def ppo(name: str, beta: float, **reward: object) -> Path:
        return world.ppo(f"{name}-{beta:g}", beta=beta, **reward)

    def dpo(name: str, data: Path, beta: float, **settings: object) -> Path:
        return world.dpo(f"{name}-{beta:g}", data_dir=data, beta=beta, **settings)

    gold, beta, folder = "toyworld:gold_reward", args.practice_beta, world.folder
    rm = world.reward_model("rm", data_dir=folder / "data/rm")
    best_worst = {"max_len": 64, "batch_size": 16, "learning_rate": 2e-4}
    return {
        "ppo-gold": {b: ppo("ppo-gold", b, reward_fn=gold) for b in args.betas},
        "dpo-own": {b: dpo("dpo-own", folder / "own", b / NOISE) for b in args.betas},
        "ppo-learned": {beta: ppo("ppo-learned", beta, rm_model_path=rm)},
        **{
            name: {beta: dpo(name, folder / name.removeprefix("dpo-"), beta / NOISE)}
            for name in ("dpo-own-t1", "dpo-own-t1.25")
        },
        "dpo-best-worst": {beta: dpo("dpo-best-worst", world.prompts, 1.0, **best_worst)},
    }


def judge_seed(args: argparse.Namespace, seed: int, folder: Path) -> list[Record]:
    """Train and judge one seed: a record for each checkpoint, and one for the frontier."""
    world = make_world(seed, folder)
    checkpoints = train_methods(args, world)
    exam = world.exam(args.num_exact)
    records = world.optima(exam, sorted({*FRONTIER_BETAS, *args.betas}))
    for method, by_beta in checkpoints.items():
        for beta, path in by_beta.items():
            figures = exam.figures(load_policy(path, flag=method), beta)
            records.append(world.record(method, beta, figures))
    return records


def results_table(records: list[Record]) -> str:
    """Lay out a row for each method and beta: means over seeds with 95% intervals."""
    rows = [["method", "β", *FIGURES]]
    for method, label in {"optimum": "the optimum", **METHODS}.items():
        found = {r["beta"] for r in records if r["method"] == method}
        tried = {r["beta"] for r in records if r["method"] != "optimum"}
        for beta in sorted(found & tried):
            some = [r for r in records if (r["method"], r["beta"]) == (method, beta)]
            rows.append([label, f"{beta:g}", *figure_cells(some)])
    return markdown_table(rows)


def draw(records: list[Record]) -> None:
    """Draw all checkpoints of all seeds under the mean frontier."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for color, (method, label) in zip(COLORS, METHODS.items(), strict=False):
        points = [(r["kl"], r["reward"]) for r in records if r["method"] == method]
        axis.plot(
            *zip(*points, strict=True), "o", color=color, markersize=6, alpha=0.8, label=label
        )
    draw_frontier(axis, mean_frontier(records))
    axis.legend(loc="lower right", fontsize=9)
    figure.savefig(PICTURE, dpi=120)


def main(args: argparse.Namespace) -> None:
    if not args.from_results:
        write_results(RESULTS, args, measure_seeds(judge_seed, args))
    records = json.loads(RESULTS.read_text(encoding="utf-8"))["records"]
    draw(records)
    print(results_table(records))


if __name__ == "__main__":
    main(parse_args())
