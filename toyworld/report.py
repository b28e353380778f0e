"""Compare checkpoints on held-out prompts of the toy world, and write `report.md`.

    python -m toyworld.report --data_dir .data/toyworld/pref --rm_model_path .model/toyworld/rm/best
        --model SFT=.model/toyworld/sft/best --model PPO=.model/toyworld/ppo/best

The first model is the reference of the others: gains are over it, KL is from it. The last columns
are not sampled but computed, by `toyworld.optimum`, on the first `--num_exact` prompts.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.arguments import Parser, count, non_negative, positive, positive_count
from rlhf.errors import InputError, run_script
from toyworld.measure import Result, load_policy, load_reward, load_tokenizer, measure
from toyworld.optimum import Exact, exact_results, share_of_gain
from toyworld.world import best_response, requests

NUM_SHOWN = 3  # prompts whose answers are shown


def named_path(text: str) -> tuple[str, str]:
    """Split NAME=PATH: an argparse type."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, not {text!r}")
    return name, path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = Parser("Compare checkpoints on held-out prompts of the toy world.")
    parser.prog = "toyworld.report"
    add = parser.add_argument
    add("--data_dir", default=".data/toyworld/pref", help="its eval.jsonl holds the prompts")
    add(
        "--model",
        type=named_path,
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a checkpoint and its name; the first is the reference (repeatable)",
    )
    add("--rm_model_path", help="reward model, for the learned reward")
    add("--out_dir", default=".model/toyworld", help="folder for report.md")
    add("--temperature", type=positive, default=1.0, help="of all models")
    add("--num_samples", type=positive_count, default=4, help="responses to each prompt")
    add("--max_prompts", type=count, default=0, help="held-out prompts to use (0 = all)")
    add("--num_exact", type=positive_count, default=16, help="prompts to enumerate")
    add("--beta", type=positive, default=0.2, help="weight of the KL in the optimum")
    add("--min_gen_len", type=count, default=1, help="as in the rollouts, for the optimum")
    add("--missing_eos_penalty", type=non_negative, default=1.0, help="likewise")
    add("--seed", type=count, default=42, help="of the samples")
    args = parser.parse_args(argv)
    names = [name for name, _ in args.model]
    if len(set(names)) < len(names):
        parser.error(f"--model: each needs a name of its own, not {', '.join(names)}")
    return args


def main(args: argparse.Namespace) -> None:
    """Measure every model, print the report and write it."""
    disable_progress_bar()
    set_verbosity_error()  # generate() warns that responses which have ended go on in EOS
    prompts = read_prompts(Path(args.data_dir))[: args.max_prompts or None]
    flags = {name: f"--model={name}={path}" for name, path in args.model}
    policies = {name: load_policy(flag) for name, flag in flags.items()}
    first = next(iter(policies))
    tokenizer = load_tokenizer(flags[first])
    reward = load_reward(f"--rm_model_path={args.rm_model_path}") if args.rm_model_path else None
    results = {}
    for name, policy in policies.items():
        torch.manual_seed(args.seed)
        results[name] = measure(
            policy,
            policies[first],
            reward,
            tokenizer,
            prompts,
            num_samples=args.num_samples,
            temperature=args.temperature,
        )
    exact = exact_results(
        policies,
        tokenizer,
        prompts[: args.num_exact],
        temperature=args.temperature,
        beta=args.beta,
        min_gen_len=args.min_gen_len,
        missing_eos_penalty=args.missing_eos_penalty,
    )
    note = (
        f"{len(prompts)} held-out prompts, {args.num_samples} responses each, temperature "
        f"{args.temperature:g}. ± is one standard error over prompts. Exact KL, and the share "
        f"of the possible gain in reward - {args.beta:g} KL, are computed from every response to "
        f"{len(exact[first])} of the prompts."
    )
    report = f"{results_table(results, exact)}\n\n{note}\n\n{samples_table(prompts, results)}"
    path = Path(args.out_dir) / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".report.md.partial")
    partial.write_text(report + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(f"{report}\n\nreport: {path}")
    print("next: sh exec_load_dataset.sh, the same stages on UltraFeedback and GPT-2")


def read_prompts(data_dir: Path) -> list[str]:
    """Read the held-out prompts; raise InputError if they are missing or not of this world."""
    path = data_dir / "eval.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            prompts = [json.loads(line)["prompt"] for line in file]
    except FileNotFoundError as error:
        raise InputError(f"--data_dir={data_dir}: there is no {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--data_dir={data_dir}: {path} holds a line without a prompt") from error
    strangers = [repr(prompt) for prompt in prompts if prompt not in requests()]
    if strangers or not prompts:
        found = strangers[0] if strangers else "nothing"
        raise InputError(f"--data_dir={data_dir}: {path} holds {found}, no prompt of the toy world")
    return prompts


def mean_and_error(values: Tensor) -> tuple[float, float]:  # (N,)
    """Return the mean over prompts, and its standard error.

    >>> mean_and_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def markdown_table(rows: list[list[str]]) -> str:
    """Lay out a table, its header first, so that it reads well as plain text too.

    >>> print(markdown_table([["model", "KL"], ["SFT", "0"]]))
    | model | KL |
    |-------|----|
    | SFT   | 0  |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def results_table(results: dict[str, Result], exact: dict[str, list[Exact]]) -> str:
    """Lay out a line for each model, with its gain over the first, paired by prompt."""
    first, reference = next(iter(results.items()))
    header = ["model", "gold reward", f"gain over {first}", "learned reward", f"KL from {first}"]
    rows = [[*header, "tokens", "exact KL", "share of possible gain"]]
    for name, result in results.items():
        mean, error = mean_and_error(result.gold)
        gain, gain_error = mean_and_error(result.gold - reference.gold)
        errors = f" ({gain / gain_error:.0f} standard errors)" if gain_error > 0 else ""
        rows.append(
            [
                name,
                f"{mean:.2f} ± {error:.2f}",
                "" if name == first else f"{gain:+.2f}{errors}",
                "" if result.learned is None else f"{result.learned.mean():.2f}",
                f"{result.kl.mean():.2f}",
                f"{result.length.mean():.2f}",
                f"{sum(figures.kl for figures in exact[name]) / len(exact[name]):.2f}",
                "" if name == first else f"{share_of_gain(exact[name]):.1%}",
            ]
        )
    return markdown_table(rows)


def samples_table(prompts: list[str], results: dict[str, Result]) -> str:
    """Lay out every model's first answer to a few prompts, spread evenly over the file."""
    rows = [["prompt", "best answer", *results]]
    for i in range(0, len(prompts), max(len(prompts) // NUM_SHOWN, 1)):
        answers = [result.texts[i] for result in results.values()]
        rows.append([prompts[i], best_response(requests()[prompts[i]]), *answers])
    return markdown_table(rows[: NUM_SHOWN + 1])


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
