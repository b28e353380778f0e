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
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from matplotlib.figure import Figure

from toyworld.annotators import NOISE
from toyworld.measure import load_policy, load_tokenizer, read_prompts
from toyworld.optimum import prepare_exam, share_of_gain
from toyworld.pictures import COLORS, FRONTIER_BETAS, Optimum, draw_frontier
from toyworld.tables import markdown_table

RESULTS = ROOT / "benchmarks/results/toyworld_frontier.json"
PICTURE = ROOT / "docs/toyworld_frontier.png"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of seeds
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


def run(log: Path, *command: str, **arguments: object) -> None:
    """Run one of the project's scripts; its output goes to the log."""
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    with log.open("a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *command, *flags],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
        )


def train_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[float, Path]]:
    """Train everything for one seed; return the checkpoints by method and beta."""
    folder.mkdir(parents=True, exist_ok=True)
    log, sft, rm = folder / "log.txt", folder / "sft", folder / "rm"
    world = {"dataset": folder / "ultrafeedback.jsonl", "data_dir": folder / "data"}
    run(log, "-m", "toyworld", seed=seed, out_dir=folder)
    ratios = {"sft_ratio": 0.35, "rm_ratio": 0.4}
    run(log, "load_dataset.py", seed=seed, **world, language="any", **ratios)
    prompts = folder / "data/pref"
    common = {"seed": seed, "log_step": 1000}
    run(
        log,
        "run_sft.py",
        **common,
        model_id=folder / "gpt2-toy",
        data_dir=folder / "data/sft",
        ckpt_dir=sft,
        max_len=64,
        batch_size=32,
        num_epochs=6,
        learning_rate=2e-3,
    )
    start = {**common, "sft_model_path": sft / "best", "learning_rate": 5e-4}
    run(
        log,
        "run_rm.py",
        **{**start, "learning_rate": 1e-3},
        data_dir=folder / "data/rm",
        ckpt_dir=rm,
        max_len=64,
        batch_size=16,
        num_epochs=5,
    )
    drawn = {"own": 1.5, "own-t1": 1.0, "own-t1.25": 1.25}
    for name, temperature in drawn.items():
        source = {"sft_model_path": sft / "best", "data_dir": prompts, "out_dir": folder / name}
        amount = {"num_pairs": args.num_pairs, "temperature": temperature}
        run(log, "-m", "toyworld.pairs", seed=seed, **source, **amount)

    def ppo(name: str, beta: float, **reward: object) -> Path:
        out = folder / f"{name}-{beta:g}"
        sampling = {"max_len": 64, "max_new_tokens": 4, "temperature": 1, "top_k": 0}
        sizes = {"batch_size": 256, "minibatch_size": 64, "num_outer_epoch": 6}
        where = {"data_dir": prompts, "ckpt_dir": out}
        run(log, "run_ppo.py", **start, **where, **sampling, **sizes, beta=beta, **reward)
        return out / "best"

    def dpo(name: str, data: Path, beta: float, **settings: object) -> Path:
        out = folder / f"{name}-{beta:g}"
        settings = {**start, "max_len": 14, "batch_size": 50, **settings}
        run(log, "run_dpo.py", **settings, data_dir=data, ckpt_dir=out, beta=beta)
        return out / "best"

    gold, beta = "toyworld:gold_reward", args.practice_beta
    best_worst = {"max_len": 64, "batch_size": 16, "learning_rate": 2e-4}
    return {
        "sft": {0.0: sft / "best"},
        "ppo-gold": {b: ppo("ppo-gold", b, reward_fn=gold) for b in args.betas},
        "dpo-own": {b: dpo("dpo-own", folder / "own", b / NOISE) for b in args.betas},
        "ppo-learned": {beta: ppo("ppo-learned", beta, rm_model_path=rm / "best")},
        **{
            name: {beta: dpo(name, folder / name.removeprefix("dpo-"), beta / NOISE)}
            for name in ("dpo-own-t1", "dpo-own-t1.25")
        },
        "dpo-best-worst": {beta: dpo("dpo-best-worst", prompts, 1.0, **best_worst)},
    }


def judge_seed(args: argparse.Namespace, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train and judge one seed: a record for each checkpoint, and one for the frontier."""
    checkpoints = train_seed(args, seed, folder)
    torch.set_num_threads(1)
    reference = checkpoints.pop("sft")[0.0]
    exam = prepare_exam(
        load_policy(reference, flag="reference"),
        load_tokenizer(reference, flag="reference"),
        read_prompts(str(folder / "data/pref"), "eval")[: args.num_exact],
        temperature=1.0,
        min_gen_len=1,
        max_new_tokens=4,
        missing_eos_penalty=1.0,
    )
    betas = sorted({*FRONTIER_BETAS, *args.betas})
    records: list[dict[str, Any]] = [
        {"seed": seed, "method": "optimum", "beta": beta, "kl": kl, "reward": reward, "share": 1.0}
        for beta, (kl, reward) in zip(betas, exam.frontier(betas), strict=True)
    ]
    for method, by_beta in checkpoints.items():
        for beta, path in by_beta.items():
            figures = exam.figures(load_policy(path, flag=method), beta)
            records.append(
                {
                    "seed": seed,
                    "method": method,
                    "beta": beta,
                    "kl": statistics.mean(f.kl for f in figures),
                    "reward": statistics.mean(f.reward for f in figures),
                    "share": share_of_gain(figures),
                }
            )
            print(records[-1], flush=True)
    return records


def mean_and_interval(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Write a mean over seeds with its 95% interval."""
    mean = scale * statistics.mean(values)
    if len(values) not in T_95:
        return f"{mean:.{digits}f}"
    half = scale * T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def results_table(records: list[dict[str, Any]]) -> str:
    """Lay out a row for each method and beta: means over seeds with 95% intervals."""
    rows = [["method", "β", "gold reward", "KL", "share of the possible gain, %", "each seed"]]

    def figures(method: str, beta: float, field: str) -> list[float]:
        return [r[field] for r in records if (r["method"], r["beta"]) == (method, beta)]

    for method, label in {"optimum": "the optimum", **METHODS}.items():
        found = {r["beta"] for r in records if r["method"] == method}
        tried = {r["beta"] for r in records if r["method"] != "optimum"}
        for beta in sorted(found & tried):
            shares = figures(method, beta, "share")
            rows.append(
                [
                    label,
                    f"{beta:g}",
                    mean_and_interval(figures(method, beta, "reward")),
                    mean_and_interval(figures(method, beta, "kl")),
                    "100" if method == "optimum" else mean_and_interval(shares, 100, 1),
                    "" if method == "optimum" else ", ".join(f"{s:.1%}" for s in shares),
                ]
            )
    return markdown_table(rows)


def draw(records: list[dict[str, Any]]) -> None:
    """Draw all checkpoints of all seeds under the mean frontier."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for color, (method, label) in zip(COLORS, METHODS.items(), strict=False):
        points = [(r["kl"], r["reward"]) for r in records if r["method"] == method]
        axis.plot(
            *zip(*points, strict=True), "o", color=color, markersize=6, alpha=0.8, label=label
        )
    optima: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] == "optimum":
            optima.setdefault(record["beta"], []).append(record)
    draw_frontier(
        axis,
        [
            Optimum(
                beta,
                statistics.mean(r["kl"] for r in found),
                statistics.mean(r["reward"] for r in found),
            )
            for beta, found in optima.items()
        ],
    )
    axis.legend(loc="lower right", fontsize=9)
    figure.savefig(PICTURE, dpi=120)


def main(args: argparse.Namespace) -> None:
    if args.from_results:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
            work_dir = Path(args.work_dir or temporary).resolve()
            jobs = [pool.submit(judge_seed, args, s, work_dir / f"seed{s}") for s in args.seeds]
            records = [record for job in jobs for record in job.result()]
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        arguments = {k: v for k, v in vars(args).items() if k not in ("work_dir", "from_results")}
        results = {"arguments": arguments, "versions": versions, "records": records}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results["records"])
    print(results_table(results["records"]))


if __name__ == "__main__":
    main(parse_args())
