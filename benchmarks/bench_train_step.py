"""What each optimisation of a training step brings, and how a step's cost grows.

    python benchmarks/bench_train_step.py [--growth]

One SFT step (forward and backward) of GPT-2's shape with random weights, on random ids with lengths
like those of real pairs. Without `--growth`: the step as it is, and as it would be without one
optimisation at a time, or with one more flag; all take turns. With it: tokens a second against
length, batch and size of the model.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks import contenders as c
from benchmarks import measuring as m
from rlhf.batches import SORTING_WINDOW, Batch, epoch_order, position_ids, sample_length
from rlhf.models import fuse_activations, prepare_training
from rlhf.runtime import Runtime
from rlhf.tokens import Sample


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    m.add_arguments(parser)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--growth", action="store_true", help="how the cost of a step grows")
    parser.add_argument("--compile", action="store_true", help="measure --compile as well")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = min(args.rows, 8), min(args.rounds, 3)
    return args


def build_model(shape: str, device: torch.device) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(m.gpt2_config(shape)).to(device).eval()


# What is left out, one thing at a time


def masked_states(model: Any, batch: Batch) -> Tensor:
    """Run the padded layout with a mask and position ids, as before `hidden_states`."""
    mask = batch.mask
    options = {"attention_mask": mask.long(), "position_ids": position_ids(mask)}
    return model.base_model(batch.input_ids, **options, use_cache=False).last_hidden_state


def whole_logprobs(hidden: Tensor, ids: Tensor, mask: Tensor, head: Any, **_: Any) -> Tensor:
    """Log-softmax at the response columns as autograd does it."""
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs = head(hidden.float()).log_softmax(dim=2)
    return logprobs.gather(2, ids[..., None])[..., 0].masked_fill(~mask, 0.0)


def variants(
    args: argparse.Namespace, samples: list[Sample], runtime: Runtime
) -> dict[str, m.Step]:
    plain = build_model("gpt2", runtime.device)
    model = copy.deepcopy(plain)
    fuse_activations(model)
    checkpointed = copy.deepcopy(model).train()
    prepare_training(checkpointed, gradient_checkpointing=True, compile=False)

    def step(model: GPT2LMHeadModel = model) -> float:
        return c.our_sft(model, samples, runtime)

    def patched(name: str, function: Callable[..., Any]) -> float:
        with mock.patch(name, function):
            return step()

    steps: dict[str, m.Step] = {
        "as it is": step,
        "GELU in eight operations": lambda: step(plain),
        "attention mask and gaps": lambda: patched("rlhf.models.hidden_states", masked_states),
        "autograd's log-softmax": lambda: patched("run_sft.token_logprobs", whole_logprobs),
        "--gradient_checkpointing": lambda: step(checkpointed),
    }
    if runtime.device.type == "cpu":
        steps["memory returned to the system"] = m.returning_memory(step)
    if args.compile:
        compiled = copy.deepcopy(model)
        prepare_training(compiled, gradient_checkpointing=False, compile=True)
        steps["--compile"] = lambda: step(compiled)
    return steps


def padding(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of the columns of all batches that hold no token."""
    columns = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    return 1 - sum(lengths) / columns


def measure_parts(args: argparse.Namespace, runtime: Runtime) -> None:
    samples = [sample for pair in m.draw_pairs(args.rows // 2, args.max_len) for sample in pair]
    steps = variants(args, samples, runtime)
    seconds, losses = m.take_turns(steps, args.rounds, runtime.device)
    base = statistics.median(seconds["as it is"])
    rows = [["SFT step", "seconds", "against as it is", "loss"]]
    for name, times in seconds.items():
        share = f"{statistics.median(times) / base:.2f} x"
        rows.append([name, m.spread(times), share, f"{losses[name]:.5f}"])
    many = [sample_length(s) for pair in m.draw_pairs(4000, 1024) for s in pair]
    grouped = padding(many, epoch_order(many, 16, seed=0, epoch=1))
    with mock.patch("rlhf.batches.SORTING_WINDOW", 1):
        shuffled = padding(many, epoch_order(many, 16, seed=0, epoch=1))
    note = f"padding: {grouped:.1%} of all columns; {shuffled:.1%} without grouping by length"
    print(f"{note} (windows of {SORTING_WINDOW} batches of 16, 8,000 rows of at most 1024 tokens)")
    record = {"seconds": seconds, "padding": {"grouped": grouped, "shuffled": shuffled}}
    m.report(f"train_step_{args.dtype}", rows, record, runtime.device)


def measure_growth(args: argparse.Namespace, runtime: Runtime) -> None:
    """Time rows of equal length: one thing grows, the others stay at GPT-2, 8 rows, 256 tokens."""
    quick = args.quick
    cases = [("gpt2", 8, length) for length in ((128, 256) if quick else (128, 256, 512, 1024))]
    cases += [("gpt2", rows, 256) for rows in ((1, 4) if quick else (1, 2, 4, 16, 32))]
    cases += [] if quick else [(shape, 4, 256) for shape in list(m.SHAPES)[1:]]
    rate = m.matrix_rate(args.dtype, runtime.device)
    table = [["model", "rows", "length", "seconds", "tokens/s", "of the floor"]]
    record: dict[str, Any] = {"matrix_gflops": round(rate / 1e9, 1), "seconds": {}}
    models: dict[str, GPT2LMHeadModel] = {}
    for shape, num_rows, length in cases:
        if shape not in models:
            models = {shape: build_model(shape, runtime.device)}  # one at a time in memory
            fuse_activations(models[shape])
        # Two fifths of it are prompt, as in the median pair.
        ids = torch.randint(1000, 50000, (num_rows, length)).tolist()
        samples = [Sample(row[: 2 * length // 5], row[2 * length // 5 :]) for row in ids]
        model = models[shape]
        steps = {"step": lambda model=model, samples=samples: c.our_sft(model, samples, runtime)}
        times = m.take_turns(steps, min(args.rounds, 3), runtime.device)[0]["step"]
        median = statistics.median(times)
        floor = m.needed_flops("sft", samples, model.config) / rate
        figures = [f"{num_rows * length / median:.0f}", f"{floor / median:.0%}"]
        table.append([shape, str(num_rows), str(length), m.spread(times), *figures])
        print(*table[-1], sep="  ", flush=True)
        record["seconds"][f"{shape}/{num_rows}x{length}"] = times
        model.zero_grad()
    m.report(f"train_growth_{args.dtype}", table, record, runtime.device)


if __name__ == "__main__":
    arguments = parse_args()
    (measure_growth if arguments.growth else measure_parts)(arguments, m.start(arguments))
