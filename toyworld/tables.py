"""The rows of the report's tables."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from rlhf.markdown import Rows
from toyworld.measure import Result
from toyworld.optimum import Exact, share_of_gain
from toyworld.world import best_response, requests

NUM_SHOWN = 3  # prompts whose answers are shown


class Verdict(NamedTuple):
    """What is known of one checkpoint: from samples, and from every response to some prompts."""

    result: Result
    exact: list[Exact]

    def mean(self, field: str) -> float:
        """Mean of an exact figure over the prompts."""
        return sum(getattr(figures, field) for figures in self.exact) / len(self.exact)


def mean_and_error(values: Tensor) -> tuple[float, float]:  # (N,)
    """Return the mean over prompts, and its standard error.

    >>> import torch
    >>> mean_and_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def results_rows(verdicts: Mapping[str, Verdict], reward_model: str | None) -> Rows:
    """Give each model a row; gains are over the first model, and paired by prompt."""
    first, reference = next(iter(verdicts.items()))
    learned = ["learned reward"] if reward_model else []
    header = ["model", "gold reward", f"gain over {first}", *learned, "tokens"]
    rows = [[*header, f"exact KL from {first}", "share of the possible gain"]]
    for name, verdict in verdicts.items():
        result = verdict.result
        mean, error = mean_and_error(result.gold)
        gain, gain_error = mean_and_error(result.gold - reference.result.gold)
        errors = f" ({gain / gain_error:.0f} standard errors)" if gain_error > 0 else ""
        rows.append(
            [
                name,
                f"{mean:.2f} ± {error:.2f}",
                "" if name == first else f"{gain:+.2f}{errors}",
                *([f"{result.learned[reward_model].mean():.2f}"] if reward_model else []),
                f"{result.length.mean():.2f}",
                f"{verdict.mean('kl'):.2f}",
                "" if name == first else f"{share_of_gain(verdict.exact):.1%}",
            ]
        )
    return rows


def sample_rows(prompts: Sequence[str], verdicts: Mapping[str, Verdict]) -> Rows:
    """Show every model's first answer to a few prompts, spread evenly over the file."""
    rows = [["prompt", "best answer", *verdicts]]
    for i in range(0, len(prompts), max(len(prompts) // NUM_SHOWN, 1)):
        answers = [verdict.result.texts[i] for verdict in verdicts.values()]
        rows.append([prompts[i], best_response(requests()[prompts[i]]), *answers])
    return rows[: NUM_SHOWN + 1]
