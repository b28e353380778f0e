"""Optimiser steps of SFT by several processes against one, each with so many threads of its own.

    python benchmarks/bench_processes.py

Contenders take turns, each started anew. A step is forward and backward over the batch, the sum of
the gradients over the processes, and AdamW. On CUDA each process has a GPU of its own; `--fsdp`
cuts the model up between them as configs/fsdp2.yaml does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoModelForCausalLM

import run_sft
from benchmarks import measuring as m
from rlhf.batches import Room
from rlhf.optim import build_schedule, optimizer_step
from rlhf.processes import is_main_process, num_processes
from rlhf.sharding import shard

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    m.add_arguments(parser)
    parser.set_defaults(rounds=2)
    parser.add_argument("--shape", choices=m.SHAPES, default="gpt2")
    parser.add_argument(
        "--rows", type=int, default=16, help="sequences in a step, of all processes"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps in a turn, after one")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--fsdp", action="store_true", help="cut the model up")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """Take the steps of one turn, and print their seconds."""
    runtime = m.start(args)
    model = AutoModelForCausalLM.from_config(m.gpt2_config(args.shape)).to(runtime.device)
    shard(model, zero_stage=runtime.zero_stage)
    schedule = build_schedule(
        model.parameters(), learning_rate=1e-5, num_steps=10**6, warmup_ratio=0.0
    )
    samples = [sample for pair in m.draw_pairs(args.rows // 2, args.max_len) for sample in pair]

    def step() -> float:
        loss = run_sft.add_gradient(model, samples, m.EOS, runtime, Room(0))
        optimizer_step([schedule], loss, max_gradient_norm=1.0, where="")
        return float(loss)

    first = step()
    seconds = [m.timed(step, runtime.device)[0] for _ in range(args.steps)]
    if is_main_process():
        print(json.dumps({"processes": num_processes(), "loss": first, "seconds": seconds}))


def turn(args: argparse.Namespace, processes: int) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher[: 4 * (processes > 1)], *sys.argv, "--work"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    environment |= FSDP if args.fsdp else {}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    told = json.loads(answer.stdout.splitlines()[-1])
    if told["processes"] != processes:
        raise SystemExit(f"{told['processes']} processes ran, not {processes}")
    return told


def main(args: argparse.Namespace) -> None:
    seconds: dict[int, list[float]] = {n: [] for n in args.processes}
    losses: dict[int, float] = {}
    for _ in range(1 if args.quick else args.rounds):
        for n in args.processes:
            told = turn(args, n)
            seconds[n] += told["seconds"]
            losses[n] = told["loss"]
    first = statistics.median(seconds[args.processes[0]])
    rows = [["processes", "seconds", "faster by", "loss of the first step"]]
    for n, values in seconds.items():
        faster = "" if n == args.processes[0] else f"{first / statistics.median(values):.2f} x"
        rows.append([str(n), m.spread(values), faster, f"{losses[n]:.6f}"])
    record = {"threads_each": args.threads, "seconds": seconds, "loss": losses}
    name = f"processes_{args.dtype}{'_fsdp' if args.fsdp else ''}"
    m.report(name, rows, record, m.start(args).device)


if __name__ == "__main__":
    arguments = parse_args()
    work(arguments) if arguments.work else main(arguments)
