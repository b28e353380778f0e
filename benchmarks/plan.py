"""Plan a run on more than this machine: memory and time of each stage, from 124M to 7B.

    python benchmarks/plan.py

Nothing is measured here. Memory of weights follows from what is kept of each: 16 bytes for a
trained one (float32 weight, gradient, AdamW's two moments), 4 for a frozen one. Memory of
activations, and the FLOPs, follow from shapes and from constants that the other benchmarks measured
(`ACTIVATIONS`). Time assumes rates, which are written above the table; states and time
are divided among GPUs evenly.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.batches import TOKENS_PER_FORWARD
from toyworld.tables import markdown_table

# Numbers kept for the backward pass, a token, layer and unit of width: the 11 to 14 that
# bench_memory.py sees go with --gradient_checkpointing, and the layer's input, which stays.
ACTIVATIONS = 15.0
STATES = {"SFT": (1, 0), "RM": (1, 0), "DPO": (1, 0), "PPO": (2, 2)}  # models trained, frozen
# Millions of tokens that UltraFeedback with the default arguments takes through each stage, and
# FLOPs a weight and token: 2 forwards, 4 backwards. DPO's reference is computed once. PPO, 41,000
# prompts with 256 new tokens each: old logprobs and values 4, reference and reward 4, and three
# inner epochs of 6 for policy and critic. Its sampling is bound by memory, and counted apart.
WORK = {"SFT": (44, 6), "RM": (26, 6), "DPO": (35, 8), "PPO": (16, 44)}
# As with run_ppo.py --max_new_tokens=256 --batch_size=128, which README recommends. The defaults,
# 16 responses of up to 1,024 tokens, read the weights up to 32 times as often.
PROMPTS, NEW_TOKENS, BATCH = 41_000, 256, 128


class Shape(NamedTuple):
    """A model: its weights, and what its activations depend on."""

    weights: float
    layers: int
    width: int


SHAPES = {
    "124M": Shape(124e6, 12, 768),
    "355M": Shape(355e6, 24, 1024),
    "774M": Shape(774e6, 36, 1280),
    "1.5B": Shape(1558e6, 48, 1600),
    "7B": Shape(6740e6, 32, 4096),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[1, 8, 64])
    add("--peak", type=float, default=989, help="TFLOP/s of a GPU in bfloat16 (H100: 989)")
    add("--bandwidth", type=float, default=3.35, help="TB/s of a GPU's memory (H100: 3.35)")
    add("--share", type=float, default=0.4, help="of the peak that training reaches: assumed")
    return parser.parse_args()


def states_gb(shape: Shape, stage: str) -> float:
    """Weights, gradients and moments of all models of a stage."""
    trained, frozen = STATES[stage]
    return shape.weights * (16 * trained + 4 * frozen) / 1e9


def activations_gb(shape: Shape, *, checkpointed: bool) -> float:
    """Activations of one forward in bfloat16; checkpointed: all inputs, and one layer's rest."""
    numbers = 1 + (ACTIVATIONS - 1) / shape.layers if checkpointed else ACTIVATIONS
    return TOKENS_PER_FORWARD * shape.layers * shape.width * numbers * 2 / 1e9


def train_hours(shape: Shape, stage: str, args: argparse.Namespace) -> float:
    tokens, passes = WORK[stage]
    flops = tokens * 1e6 * passes * shape.weights
    return flops / (args.peak * 1e12 * args.share) / 3600


def sampling_hours(shape: Shape, args: argparse.Namespace) -> float:
    """The least that sampling takes: a token of all slots reads the weights once, in bfloat16."""
    reads = PROMPTS / BATCH * NEW_TOKENS
    return reads * shape.weights * 2 / (args.bandwidth * 1e12) / 3600


def main(args: argparse.Namespace) -> None:
    print(f"Assumed: {args.share:.0%} of {args.peak:g} TFLOP/s, and {args.bandwidth:g} TB/s.\n")
    shares = [f"GB each on {n} GPUs" for n in args.gpus]
    rows = [["model", "stage", *shares, "activations, GB", "checkpointed, GB", "GPU hours"]]
    for name, shape in SHAPES.items():
        activations = [activations_gb(shape, checkpointed=flag) for flag in (False, True)]
        for stage in STATES:
            states = [states_gb(shape, stage) / n for n in args.gpus]
            figures = [f"{gb:.2g}" if gb < 10 else f"{gb:.0f}" for gb in (*states, *activations)]
            work = f"{train_hours(shape, stage, args):.2g}"
            if stage == "PPO":
                work += f" + {sampling_hours(shape, args):.2g} or more"
            rows.append([name, stage, *figures, work])
    print(markdown_table(rows))


if __name__ == "__main__":
    main(parse_args())
