"""What the benchmarks on the toy world share: a world for every seed, its exam, and the figures."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from toyworld.measure import load_policy, load_tokenizer, read_prompts
from toyworld.optimum import Exact, Exam, prepare_exam, share_of_gain
from toyworld.pictures import Optimum

ROOT = Path(__file__).resolve().parent.parent
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of seeds
Record = dict[str, Any]  # seed, method, beta, kl, reward, share


class World(NamedTuple):
    """The world of one seed: its rows, its splits, its SFT model, and all that started from it."""

    seed: int
    folder: Path

    @property
    def sft(self) -> Path:
        return self.folder / "sft/best"

    @property
    def prompts(self) -> Path:
        return self.folder / "data/pref"

    def run(self, *command: str, **arguments: object) -> None:
        """Run one of the project's scripts, unless this very command was finished here before.

        Its output goes to the log. After a change of the code, delete the folder.
        """
        line = [*command, f"--seed={self.seed}", *(f"--{k}={v}" for k, v in arguments.items())]
        finished = self.folder / "finished.txt"
        if finished.exists() and " ".join(line) in finished.read_text("utf-8").splitlines():
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(
                [sys.executable, *line],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        with finished.open("a", encoding="utf-8") as file:
            file.write(" ".join(line) + "\n")

    def write_rows(self, out_dir: Path, annotator: str) -> None:
        """Write the rows of this world as an annotator scores them, and split them."""
        rows = out_dir / "ultrafeedback.jsonl"
        ratios = {"sft_ratio": 0.35, "rm_ratio": 0.4}
        self.run("-m", "toyworld", out_dir=out_dir, annotator=annotator)
        source = {"dataset": rows, "data_dir": out_dir / "data", "language": "any"}
        self.run("load_dataset.py", **source, **ratios)

    def train(self, script: str, name: str, **settings: object) -> Path:
        """Train in a folder of this name; return its best checkpoint."""
        out = self.folder / name
        self.run(script, **{"log_step": 1000, "ckpt_dir": out, **settings})
        return out / "best"

    def sft_model(self) -> None:
        self.train(
            "run_sft.py",
            "sft",
            model_id=self.folder / "gpt2-toy",
            data_dir=self.folder / "data/sft",
            max_len=64,
            batch_size=32,
            num_epochs=6,
            learning_rate=2e-3,
        )

    def reward_model(self, name: str, **settings: object) -> Path:
        usual = {"max_len": 64, "batch_size": 16, "num_epochs": 5, "learning_rate": 1e-3}
        return self.train("run_rm.py", name, **{**usual, "sft_model_path": self.sft, **settings})

    def ppo(self, name: str, **settings: object) -> Path:
        sampling = {"max_len": 64, "max_new_tokens": 4, "temperature": 1, "top_k": 0}
        start = {"sft_model_path": self.sft, "data_dir": self.prompts, "learning_rate": 5e-4}
        sizes = {"batch_size": 256, "minibatch_size": 64, "num_outer_epoch": 6}
        return self.train("run_ppo.py", name, **{**start, **sampling, **sizes, **settings})

    def dpo(self, name: str, **settings: object) -> Path:
        usual = {"max_len": 14, "batch_size": 50, "learning_rate": 5e-4}
        return self.train("run_dpo.py", name, **{**usual, "sft_model_path": self.sft, **settings})

    def pairs(self, name: str, **settings: object) -> Path:
        """Draw responses of the SFT model for the preference losses; return their folder."""
        out, source = self.folder / name, {"sft_model_path": self.sft, "data_dir": self.prompts}
        self.run("-m", "toyworld.pairs", **source, out_dir=out, **settings)
        return out

    def exam(self, num_prompts: int) -> Exam:
        """Enumerate every response to held-out prompts."""
        return prepare_exam(
            load_policy(self.sft, flag="reference"),
            load_tokenizer(self.sft, flag="reference"),
            read_prompts(str(self.prompts), "eval")[:num_prompts],
            temperature=1.0,
            min_gen_len=1,
            max_new_tokens=4,
            missing_eos_penalty=1.0,
        )

    def record(self, method: str, beta: float, figures: Sequence[Exact]) -> Record:
        record = {
            "seed": self.seed,
            "method": method,
            "beta": beta,
            "kl": statistics.mean(f.kl for f in figures),
            "reward": statistics.mean(f.reward for f in figures),
            "share": share_of_gain(figures),
        }
        print(record, flush=True)
        return record

    def optima(self, exam: Exam, betas: Sequence[float]) -> list[Record]:
        frontier = zip(betas, exam.frontier(betas), strict=True)
        place = {"seed": self.seed, "method": "optimum"}
        return [
            {**place, "beta": b, "kl": kl, "reward": r, "share": 1.0} for b, (kl, r) in frontier
        ]


def make_world(seed: int, folder: Path) -> World:
    """Write a world, and train its SFT model, which is the reference of all that follows."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(seed, folder)
    world.write_rows(folder, "noiseless")
    world.sft_model()
    return world


def measure_seeds(
    judge: Callable[[Namespace, int, Path], list[Record]], args: Namespace
) -> list[Record]:
    """Let `judge` train and judge every seed, `--jobs` of them at a time, a core each.

    In processes, since transformers cannot load two models at once in one: it sets torch's defaults
    while it does, and another thread's weights stay as the memory was.
    """
    one_core: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(args.jobs, get_context("spawn"), **one_core) as pool,
    ):
        work_dir = Path(args.work_dir or temporary).resolve()
        jobs = [pool.submit(judge, args, s, work_dir / f"seed{s}") for s in args.seeds]
        return [record for job in jobs for record in job.result()]


def write_results(path: Path, args: Namespace, records: list[Record]) -> None:
    """Write what was measured, with the arguments and the versions that it was measured with."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    about_the_run = ("work_dir", "from_results", "only")
    arguments = {k: v for k, v in vars(args).items() if k not in about_the_run}
    results = {"arguments": arguments, "versions": versions, "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def mean_and_interval(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Write a mean over seeds with its 95% interval."""
    mean = scale * statistics.mean(values)
    if len(values) not in T_95:
        return f"{mean:.{digits}f}"
    half = scale * T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def figure_cells(records: Sequence[Record]) -> list[str]:
    """Lay out one method at one beta: reward, KL and share over seeds, and each seed's share."""
    if records[0]["method"] == "optimum":
        share, seeds = "100", ""
    else:
        share = mean_and_interval([r["share"] for r in records], 100, 1)
        seeds = ", ".join(f"{r['share']:.1%}" for r in records)
    reward, kl = (mean_and_interval([r[name] for r in records]) for name in ("reward", "kl"))
    return [reward, kl, share, seeds]


FIGURES = ["gold reward", "KL", "share of the possible gain, %", "each seed"]


def mean_frontier(records: Sequence[Record]) -> list[Optimum]:
    """Average the worlds' optima."""
    found: dict[float, list[Record]] = {}
    for record in records:
        if record["method"] == "optimum":
            found.setdefault(record["beta"], []).append(record)
    return [
        Optimum(b, *(statistics.mean(r[name] for r in some) for name in ("kl", "reward")))
        for b, some in found.items()
    ]
