"""Tell what PPO has brought: a table, samples, and a picture of the rewards on the way.

Both policies continue the held-out queries behind every control token, by plain transformers, which
samples from the whole vocabulary.
"""

import argparse
import json
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from examples.sentiment_control.queries import RESPONSE_TOKENS
from examples.sentiment_control.reward import FOLDER, REWARDS, positive_logits, split_prompt
from rlhf.arguments import Parser, nonempty, seed
from rlhf.errors import InputError, run_script
from rlhf.records import PROMPT, read_split

COLORS = dict(zip(REWARDS, ("#d55e00", "0.45", "#0072b2"), strict=True))
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
LENGTH = {"min_new_tokens": RESPONSE_TOKENS, "max_new_tokens": RESPONSE_TOKENS}
BATCH = 64  # prompts that are continued together: memory only


@torch.no_grad()
def write_texts(path: str, prompts: list[str]) -> list[str]:
    """Let a policy continue prompts; returns queries with responses, without control tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path).eval().to(device)
    texts = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        inputs = tokenizer(some, padding=True, return_tensors="pt").to(device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        written = model.generate(input_ids=ids, attention_mask=mask, **SAMPLING, **LENGTH)
        responses = tokenizer.batch_decode(written[:, ids.shape[1] :])
        queries = [split_prompt(prompt)[1] for prompt in some]
        texts += [(q + r).strip() for q, r in zip(queries, responses, strict=True)]
    return texts


def rollouts(ckpt_dir: Path) -> list[dict[str, Any]]:
    """Give the log lines of a run's rollouts, with their steps.

    The log holds every call: evaluations too, and those of earlier runs. A rollout's mean stands in
    the run's own metrics.jsonl.
    """
    calls = [json.loads(line) for line in (FOLDER / "rewards.jsonl").open(encoding="utf-8")]
    found = []
    for row in map(json.loads, (ckpt_dir / "metrics.jsonl").open(encoding="utf-8")):
        distances = [abs(call["all"] - row.get("objective/scores", inf)) for call in calls]
        if min(distances) < 1e-4:
            found.append({**calls[distances.index(min(distances))], "step": row["step"]})
    if not found:
        raise InputError(f"{ckpt_dir}: none of its rollouts is in {FOLDER / 'rewards.jsonl'}")
    return found


def draw(path: Path, calls: list[dict[str, Any]], logits: dict[str, list[list[float]]]) -> None:
    """Draw the mean reward of each control token, and how the logits lie before and after."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    axis = figure.add_subplot(grid[:, 0])
    low, high = (edge(edge(xs) for pair in logits.values() for xs in pair) for edge in (min, max))
    histograms = [figure.add_subplot(grid[row, 1]) for row in range(2)]
    for control, color in COLORS.items():
        points = [(call["step"], call[control]) for call in calls if control in call]
        axis.plot(*zip(*points, strict=True), color=color, label=control)
        for histogram, xs in zip(histograms, logits[control], strict=True):
            histogram.hist(xs, bins=50, range=(low, high), color=color, alpha=0.55)
    for histogram, when in zip(histograms, ("before", "after"), strict=True):
        histogram.set(title=f"x {when}", ylabel="texts")
    histograms[1].set_xlabel("x, the classifier's positive logit")
    axis.set(title="reward by control token", xlabel="rollout", ylabel="mean of its responses")
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def main(args: argparse.Namespace) -> None:
    disable_progress_bar()
    torch.manual_seed(args.seed)
    prompts = [str(record["prompt"]) for record in read_split(args.data_dir, "eval", PROMPT)]
    logits: dict[str, list[list[float]]] = {}
    samples = []
    print("\n| control token | reward before | reward after | gain |\n|---|---|---|---|")
    for control, reward in REWARDS.items():
        own = [prompt for prompt in prompts if prompt.startswith(control)]
        texts = [write_texts(path, own) for path in (args.before, f"{args.ckpt_dir}/best")]
        logits[control] = [positive_logits(some) for some in texts]
        before, after = ([reward(x) for x in some] for some in logits[control])
        told = (f"{fmean(some):.2f} ± {stdev(some):.2f}" for some in (before, after))
        gain = (fmean(after) - fmean(before)) / stdev(before)
        print(f"| `{control}` | {' | '.join(told)} | {gain:+.1f} sd |")
        samples += [control, f"    before: {texts[0][0]}", f"    after:  {texts[1][0]}"]
    print(f"\n{len(own)} texts a token; ± and sd: standard deviation over texts.\n")
    print("\n".join(samples))
    draw(FOLDER / "rewards.png", rollouts(Path(args.ckpt_dir)), logits)
    print(f"\nthe rewards on the way: {FOLDER / 'rewards.png'}")


if __name__ == "__main__":
    parser = Parser(description="Tell what PPO has brought.")
    add = parser.add_argument
    add("--seed", type=seed, default=42, help="seed of the sampling")
    add("--before", type=nonempty, required=True, help="the policy before training")
    add("--ckpt_dir", type=nonempty, required=True, help="PPO's folder")
    add("--data_dir", type=nonempty, required=True, help="holds eval.jsonl")
    run_script(lambda: main(parser.parse_args()))
