"""Peak memory of a training step: ours, the plain way, TRL's, each in a process of its own.

    python benchmarks/bench_memory.py

What is measured is what a step adds to the loaded models: on CUDA the allocator's peak, on a CPU
the process's (resident set). Gradients are part of it, the optimiser's two moments are not: they
are 8 bytes a weight for everybody.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import bench_peers
from benchmarks import measuring as m

STAGES = ("sft", "dpo", "rm")
CHECKPOINTED = ", gradient checkpointing"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    m.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--only", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # stage and contender
    return parser.parse_args()


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        m.release_memory()  # so that the step cannot hide in memory that is held
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure_one(args: argparse.Namespace) -> None:
    """Print what the step of one contender adds to the memory of this process."""
    stage, name = args.one
    runtime = m.start(args)
    pairs = m.draw_pairs(args.rows // 2, args.max_len)
    checkpointing = name.endswith(CHECKPOINTED)
    steps = bench_peers.build_steps(stage, args, pairs, runtime, checkpointing=checkpointing)
    forget_peak(runtime.device)
    before = peak_bytes(runtime.device)
    steps[name.removesuffix(CHECKPOINTED)]()
    print(json.dumps({"peak": peak_bytes(runtime.device) - before}))


def main(args: argparse.Namespace) -> None:
    names = ["ours", f"ours{CHECKPOINTED}", "plain", "TRL", f"TRL{CHECKPOINTED}"]
    rows, record = [["stage", *names]], {}
    for stage in args.only:
        figures: list[str] = []
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", stage, name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{stage}, {name}: {done.stderr[-2000:]}")
            peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
            record[f"{stage}/{name}"] = peak
            figures.append(f"{peak / 2**30:.2f} GB")
        rows.append([stage, *figures])
        print(*rows[-1], sep="  ", flush=True)
    m.report(f"memory_{args.dtype}", rows, {"peak_bytes": record}, m.start(args).device)


if __name__ == "__main__":
    arguments: Any = parse_args()
    (measure_one if arguments.one else main)(arguments)
