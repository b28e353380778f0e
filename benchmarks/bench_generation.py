"""Rollouts: ours beside transformers' `generate`, and how their cost grows.

    python benchmarks/bench_generation.py

GPT-2's shape with random weights and random prompts of the lengths of real ones; as many new tokens
for everybody. The floor is the time to read what has to be read, all weights and the keys and
values so far once a token, at the bandwidth of a large copy. Last, responses of very different
lengths, with and without refilled slots.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GPT2LMHeadModel

from benchmarks import contenders as c
from benchmarks import measuring as m
from rlhf.batches import Room
from rlhf.generation import generate
from rlhf.models import fuse_activations
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    m.add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[48, 192])
    args = parser.parse_args()
    if args.quick:
        args.batches, args.new_tokens, args.rounds = [4, 16], [48], min(args.rounds, 3)
    return args


def floor_bytes(model: GPT2LMHeadModel, prompts: c.Prompts, new_tokens: int, size: int) -> float:
    """Bytes that must be read: the weights for every token, and the keys and values before it."""
    weights = sum(p.numel() for p in model.transformer.h.parameters())
    head = model.lm_head.weight.numel()
    read = new_tokens * (weights * size + head * 4)  # the head stays in float32
    a_token = 2 * model.config.n_layer * model.config.n_embd * size
    for prompt in prompts:
        read += a_token * sum(len(prompt) + t for t in range(new_tokens))
    return read


def until_full(
    model: GPT2LMHeadModel, prompts: c.Prompts, max_len: int, runtime: Runtime, *, refill: bool
) -> None:
    """Write until each row is full, so that responses are as uneven as the prompts.

    Eight slots: refilled as they become free, or in batches of eight prompts, one after another.
    """
    sampling = Sampling(True, 1.0, 0, 1.0, max_len, 0, max_len, m.EOS, [m.EOS], [m.EOS])
    for start in range(0, len(prompts), len(prompts) if refill else 8):
        part = prompts[start:] if refill else prompts[start : start + 8]
        with runtime.autocast():
            generate(
                model,
                part,
                sampling=sampling,
                noise_key=(0, 1),
                rows=range(start, start + len(part)),
                room=Room(1),  # eight slots: so many fit where one training sequence does
            )


def main(args: argparse.Namespace) -> None:
    runtime = m.start(args)
    device = runtime.device
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(m.gpt2_config()).to(device).eval()
    model = GPT2LMHeadModel(m.gpt2_config()).to(device).eval()
    model.load_state_dict(plain.state_dict())
    fuse_activations(model)
    bandwidth, size = m.copy_bandwidth(device), 4 if args.dtype == "float32" else 2
    rows = [["prompts", "new tokens", "ours, s", "generate, s", "gain", "tokens/s", "of floor"]]
    record: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1), "seconds": {}}
    for batch in args.batches:
        prompts = [list(pair[0].prompt_ids) for pair in m.draw_pairs(batch, args.max_len)]
        for new_tokens in args.new_tokens:
            options = (prompts, new_tokens, runtime)
            steps: dict[str, m.Step] = {
                "ours": partial(c.our_rollout, model, *options),
                "generate": partial(c.transformers_rollout, plain, *options, together=True),
            }
            seconds, _ = m.take_turns(steps, args.rounds, device)
            ours, theirs = (statistics.median(seconds[name]) for name in steps)
            floor = floor_bytes(plain, prompts, new_tokens, size) / bandwidth
            rows.append(
                [
                    str(batch),
                    str(new_tokens),
                    m.spread(seconds["ours"]),
                    m.spread(seconds["generate"]),
                    f"{theirs / ours:.2f} x",
                    f"{batch * new_tokens / ours:.0f}",
                    f"{floor / ours:.0%}",
                ]
            )
            record["seconds"][f"{batch}x{new_tokens}"] = seconds
            print(*rows[-1], sep="  ", flush=True)
    prompts = [list(pair[0].prompt_ids) for pair in m.draw_pairs(32, args.max_len)]
    options = (model, prompts, args.max_len, runtime)
    steps = {
        "refilled": partial(until_full, *options, refill=True),
        "in batches": partial(until_full, *options, refill=False),
    }
    seconds, _ = m.take_turns(steps, args.rounds, device)
    gain = statistics.median(seconds["in batches"]) / statistics.median(seconds["refilled"])
    lengths = sorted(args.max_len - len(prompt) for prompt in prompts)
    print(
        f"32 prompts through 8 slots, responses of {lengths[0]} to {lengths[-1]} tokens: ", end=""
    )
    print(f"refilled {m.spread(seconds['refilled'])} s, {gain:.2f} x faster than batch by batch")
    record["refill"] = seconds
    m.report(f"generation_{args.dtype}", rows, record, device)


if __name__ == "__main__":
    main(parse_args())
