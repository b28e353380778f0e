"""Plan a run on more than this machine: memory and time of each stage, from 124M to 7B.

    python benchmarks/plan.py

Nothing is measured here. Memory of weights follows from what is kept of each: 16 bytes for a
trained one (float32 weight, gradient, AdamW's two moments), 4 for a frozen one. Memory of
activations, and the FLOPs, follow from shapes and from constants that the other benchmarks measured
(`ACTIVATIONS`). Time assumes rates, which are written above the table; states and time
are divided among GPUs evenly. Two more tables have what the files of configs/ leave on each GPU,
and the peak of PPO, with adapters and without.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.batches import TOKENS_PER_FORWARD
from rlhf.logprobs import NUMBERS_KEPT
from rlhf.markdown import markdown_table

# Numbers kept for the backward pass, a token, layer and unit of width: the 11 to 14 that
# bench_memory.py sees go with --gradient_checkpointing, and the layer's input, which stays.
ACTIVATIONS = 15.0
STATES = {"SFT": (1, 0), "RM": (1, 0), "DPO": (1, 0), "PPO": (2, 2)}  # models trained, frozen
# PPO's models on one GPU: weights kept, and those that are trained, as multiples of a whole model's
# and of an adapter's. With adapters the reference is the policy without its own.
PPO_MODELS = {  # (whole models kept, trained), (adapters kept, trained)
    "full fine-tuning": ((4, 2), (0, 0)),
    "`--use_peft`": ((3, 0), (2, 2)),
    "`--use_peft --share_trunk`": ((1, 0), (3, 2)),
}
# Bytes of a weight, gradient and moments included, in every process, and shared by all of them.
WAYS = {
    "multi_gpu": (16, 0),
    "zero2": (4, 16),  # the weights are whole in a step
    "fsdp2": (0, 16),
    "multi_gpu `--use_peft`": (4, 0),  # the adapter itself is small
}
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
    add("--lora_r", type=int, default=16, help="rank of the adapters")
    gpt2 = [name for name in SHAPES if name != "7B"]  # adapters are counted in GPT-2's blocks
    add("--ppo", nargs="*", default=gpt2, choices=gpt2, help="models of PPO's table")
    return parser.parse_args()


def states_gb(shape: Shape, stage: str) -> float:
    """Weights, gradients and moments of all models of a stage."""
    trained, frozen = STATES[stage]
    return shape.weights * (16 * trained + 4 * frozen) / 1e9


def activations_gb(shape: Shape, *, checkpointed: bool) -> float:
    """Activations of one forward in bfloat16; checkpointed: all inputs, and one layer's rest."""
    numbers = 1 + (ACTIVATIONS - 1) / shape.layers if checkpointed else ACTIVATIONS
    return TOKENS_PER_FORWARD * shape.layers * shape.width * numbers * 2 / 1e9


def adapter_weights(shape: Shape, r: int) -> int:
    """A and B of all linear layers of a GPT-2 block: D to 3 D, D to D, D to 4 D and back."""
    return r * 16 * shape.width * shape.layers


def ppo_gb(shape: Shape, way: str, r: int) -> tuple[float, float, float]:
    """Weights with gradients and moments; the peak of an update; the same with checkpointing.

    An update holds the activations of policy and critic at once, the log-probabilities that wait
    for the backward pass, and, until it has come, the bfloat16 copies of the weights that the
    products took; with gradient checkpointing those of a layer only.
    """
    states = 0.0
    for size, (kept, trained) in zip(
        (shape.weights, adapter_weights(shape, r)), PPO_MODELS[way], strict=True
    ):
        states += size * (4 * kept + 12 * trained) / 1e9
    logprobs, copies = NUMBERS_KEPT * 4 / 1e9, 2 * 2 * shape.weights / 1e9
    whole, checkpointed = (activations_gb(shape, checkpointed=flag) for flag in (False, True))
    most = states + logprobs + copies + 2 * whole
    return states, most, states + logprobs + copies / shape.layers + 2 * checkpointed


def train_hours(shape: Shape, stage: str, args: argparse.Namespace) -> float:
    tokens, passes = WORK[stage]
    flops = tokens * 1e6 * passes * shape.weights
    return flops / (args.peak * 1e12 * args.share) / 3600


def sampling_hours(shape: Shape, args: argparse.Namespace) -> float:
    """The least that sampling takes: a token of all slots reads the weights once, in bfloat16."""
    reads = PROMPTS / BATCH * NEW_TOKENS
    return reads * shape.weights * 2 / (args.bandwidth * 1e12) / 3600


def print_ways(gpus: list[int]) -> None:
    """Print what each GPU holds of one model that is trained, by each file of configs/."""
    rows = [["configs/", "GPUs", *SHAPES]]
    for way, (whole, shared) in WAYS.items():
        for n in gpus if shared else ["any"]:
            share = whole + (shared / int(n) if shared else 0)
            figures = [shape.weights * share / 1e9 for shape in SHAPES.values()]
            rows.append([way, str(n), *(f"{gb:.2g}" if gb < 10 else f"{gb:.0f}" for gb in figures)])
    print(f"\nGB of one model on each GPU, without activations:\n\n{markdown_table(rows)}")


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
    rows = [["model", "PPO by", "weights and AdamW, GB", "peak, GB", "checkpointed, GB"]]
    for name in args.ppo:
        for way in PPO_MODELS:
            figures = [f"{gb:.1f}" for gb in ppo_gb(SHAPES[name], way, args.lora_r)]
            rows.append([name, way, *figures])
    print_ways([n for n in args.gpus if n > 1])
    print(f"\nPPO, computed, with adapters of rank {args.lora_r}:\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main(parse_args())
