"""Our steps beside TRL's and beside the plain way, on the same model, batch, precision and machine.

    pip install -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt
    python benchmarks/bench_peers.py --quick

GPT-2's shape (124M), random weights, and random ids with lengths like those of real pairs: no
network. What a step holds is told in contenders.py, TRL's settings in peers_trl.py, and a whole PPO
iteration in peers_ppo.py; TRL's last PPO trainer needs an environment of its own and joins in with

    python -m venv .ppo && .ppo/bin/pip install -r benchmarks/requirements-ppo.txt
    python benchmarks/bench_peers.py --quick --ppo_python .ppo/bin/python

The same rows for everybody, in two batches: ours deals them by length, as its scripts do, the
others take them as they come. All take turns, after a turn to warm up; medians over the rounds.
The floor is the time of the matrix products that are really needed (no padding, vocabulary at
response positions only) at the rate of a large product, measured in the same run. The setting of
the C library's memory that `start_runtime` makes helps all contenders, unless `--own_memory`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from benchmarks import contenders as c
from benchmarks import measuring as m
from benchmarks.peers_ppo import Task, ppo_steps
from rlhf.batches import epoch_order
from rlhf.models import fuse_activations, prepare_training
from rlhf.runtime import Runtime

STAGES = ("sft", "dpo", "rm", "rollout", "ppo")
NUM_PROMPTS, NEW_TOKENS = 16, 48  # of rollouts; PPO takes `--rows` / 3
PASSES = {"sft": 6, "dpo": 8, "rm": 6}  # 2 forwards, 4 backwards; the reference's forward


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    m.add_arguments(parser)
    add = parser.add_argument
    add("--rows", type=int, default=32, help="sequences in both batches; half as many pairs")
    add("--only", nargs="+", default=STAGES, choices=STAGES, help="what to measure")
    add("--own_memory", action="store_true", help="plain and TRL as alone: malloc's own way")
    add("--ppo_python", help="Python of the environment of requirements-ppo.txt, for TRL's PPO")
    add("--ppo_micro_batch", type=int, default=2, help="PPO: sequences in a forward (0 = free)")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = min(args.rows, 12), min(args.rounds, 2)
    return args


def trl_or_none() -> Any:
    try:
        from benchmarks import peers_trl
    except ImportError:
        print("TRL is not installed (benchmarks/requirements.txt): measured without it")
        return None
    return peers_trl


def build_models(kind: Any, runtime: Runtime, seed: int = 0) -> tuple[Any, Any]:
    """Build the same weights twice: as our scripts load them, and as they are."""
    torch.manual_seed(seed)
    config = m.gpt2_config()
    config.num_labels = 1
    plain = kind(config).to(runtime.device).eval()
    ours = kind(config).to(runtime.device).eval()
    ours.load_state_dict(plain.state_dict())
    fuse_activations(ours)
    return ours, plain


def build_steps(
    stage: str,
    args: argparse.Namespace,
    pairs: list[m.Pair],
    runtime: Runtime,
    *,
    checkpointing: bool = False,
) -> dict[str, m.Step]:
    """Build what takes turns in a stage."""
    prompts = [list(pair[0].prompt_ids) for pair in m.draw_pairs(NUM_PROMPTS, args.max_len)]
    if stage == "ppo":
        if runtime.device.type == "cuda":
            sys.exit("ppo is compared on CPUs only; --only sft dpo rm rollout")
        task = Task(
            prompts[: args.rows // 3], m.gpt2_config(), args.ppo_micro_batch, args.dtype, runtime
        )
        return ppo_steps(task, args.ppo_python)
    kind = GPT2ForSequenceClassification if stage == "rm" else GPT2LMHeadModel
    ours, plain = build_models(kind, runtime)
    if stage == "rollout":
        write = partial(c.transformers_rollout, plain, prompts, NEW_TOKENS, runtime)
        return {
            "ours": lambda: c.our_rollout(ours, prompts, NEW_TOKENS, runtime),
            "plain": lambda: write(together=False),
            "generate": lambda: write(together=True),
        }
    prepare_training(ours.train(), gradient_checkpointing=checkpointing, compile=False)
    our_ref, reference = build_models(kind, runtime, seed=1) if stage == "dpo" else (None, None)
    peers = trl_or_none()
    batches = {name: deal(pairs, stage, by_length=name == "ours") for name in ("ours", "others")}
    steps: dict[str, m.Step] = {}
    if stage == "sft":
        steps["ours"] = in_turn(lambda x: c.our_sft(ours, x, runtime), batches["ours"])
        steps["plain"] = in_turn(lambda x: c.plain_sft(plain, x, runtime), batches["others"])
    elif stage == "dpo":
        steps["ours"] = in_turn(lambda x: c.our_dpo(ours, our_ref, x, runtime), batches["ours"])
        steps["plain"] = in_turn(
            lambda x: c.plain_dpo(plain, reference, x, runtime), batches["others"]
        )
    else:
        steps["ours"] = in_turn(lambda x: c.our_rm(ours, x, runtime), batches["ours"])
        steps["plain"] = in_turn(lambda x: c.plain_rm(plain, x, runtime), batches["others"])
    if peers:
        trl_step = peers.trl_step(stage, plain, reference, args.dtype, checkpointing=checkpointing)
        steps["TRL"] = in_turn(trl_step, batches["others"])
    return steps


def deal(pairs: list[m.Pair], stage: str, *, by_length: bool) -> list[Any]:
    """Cut the rows of a stage, responses or pairs of them, into two batches."""
    rows: list[Any] = c.both_sides(pairs) if stage == "sft" else pairs
    lengths = [c.row_length(row) for row in rows]
    order = [list(range(len(rows)))[i::2] for i in range(2)]
    if by_length:
        order = epoch_order(lengths, len(rows) // 2, seed=0, epoch=1)
    return [[rows[i] for i in batch] for batch in order]


def in_turn(step: Callable[[Any], float], batches: list[Any]) -> m.Step:
    """Take a step on each batch; returns the mean loss, of a response token or of a pair."""
    weights = [c.num_targets(batch) for batch in batches]

    def both() -> float:
        losses = [step(batch) for batch in batches]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    return both


def main(args: argparse.Namespace) -> None:
    runtime = m.start(args)
    device = runtime.device
    pairs = m.draw_pairs(args.rows // 2, args.max_len)
    samples = [sample for pair in pairs for sample in pair]
    rate = m.matrix_rate(args.dtype, device)
    header = ["stage", "contender", "seconds", "ours is faster by", "of the floor", "loss"]
    rows: list[list[str]] = []
    record: dict[str, Any] = {"matrix_gflops": round(rate / 1e9, 1)}
    try:
        for stage in args.only:
            m.release_memory()
            steps = build_steps(stage, args, pairs, runtime)
            if args.own_memory and device.type == "cpu":
                steps |= {name: m.returning_memory(steps[name]) for name in steps if name != "ours"}
            seconds, losses = m.take_turns(
                steps,
                args.rounds,
                device,
                releasing=stage == "ppo",  # of 4 GB each
            )
            ours = statistics.median(seconds["ours"])
            for name, times in seconds.items():
                median, share, loss = statistics.median(times), "", ""
                if stage in PASSES:
                    needed = m.needed_flops(stage, samples, m.gpt2_config(), passes=PASSES[stage])
                    share, loss = f"{needed / rate / median:.0%}", f"{losses[name]:.5f}"
                gain = "" if name == "ours" else f"{median / ours:.2f} x"
                rows.append([stage, name, m.spread(times), gain, share, loss])
                record[f"{stage}/{name}"] = [round(t, 3) for t in times]
                print(*rows[-1], sep="  ", flush=True)
            del steps, times
    finally:  # what was measured before an error or Ctrl-C
        some = [] if tuple(args.only) == STAGES else args.only
        name = "_".join(["peers", args.dtype, *some]) + "_own_memory" * args.own_memory
        m.report(name, [header, *rows], record, device)


if __name__ == "__main__":
    main(parse_args())
