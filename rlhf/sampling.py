"""Logits to tokens: seeded noise, truncation, and the draw.

What a prompt gets depends on the prompt, the model and its own noise, and on nothing else: not on
its batch mates, nor on the slot or the moment in which it is written.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 512  # columns that `draw` takes together


class Sampling(NamedTuple):
    """How responses are drawn; the names are the flags'."""

    do_sampling: bool
    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    min_gen_len: int
    max_new_tokens: int  # 0 = up to max_len
    max_len: int  # prompt and response together
    pad_id: int
    stop_ids: list[int]  # a response ends at any of them
    early_end_ids: list[int]  # may not come at the first min_gen_len positions

    def generation_config(self) -> dict[str, Any]:
        """The same settings under the names of transformers' GenerationConfig."""
        settings: dict[str, Any] = {"do_sample": self.do_sampling}
        if self.do_sampling:
            settings |= {
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
            }
        if self.max_new_tokens:
            settings["max_new_tokens"] = self.max_new_tokens
        else:
            settings["max_length"] = self.max_len
        if self.min_gen_len:
            settings |= {
                "min_new_tokens": self.min_gen_len,
                "begin_suppress_tokens": self.early_end_ids,
            }
        return settings

    def warning(self) -> str:
        """Say what the settings do to a policy that is to learn from its samples, if much."""
        told = ""
        if not self.do_sampling:
            told = "do_sampling=false: greedy responses explore nothing; PPO can learn little"
        elif self.top_k == 1:
            told = "top_k=1 leaves nothing to choose: every ratio is 1, and PPO learns nothing"
        elif self.top_p < 1 and self.top_k == 0:
            told = "top_p without --top_k may keep thousands of ids of a token in memory"
        elif self.temperature < 0.5:
            told = f"temperature={self.temperature:g} explores little: the policy can hardly find"
            told += " better responses than those it prefers already; 1.0 finds more"
        return told and f"note: --{told}"


def uniform_noise(seed: int, step: int, rows: Sequence[int], num_positions: int) -> Tensor:
    """Uniform numbers in [0, 1) as a function of (seed, step, row, position): (B, positions).

    Each row reads its own stream of a counter-based generator, Philox.

    >>> torch.equal(uniform_noise(0, 1, [5, 7], 3)[1], uniform_noise(0, 1, [7], 9)[0, :3])
    True
    """
    streams = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, row]))
        for row in rows
    ]
    return torch.from_numpy(np.stack([stream.random(num_positions) for stream in streams]))


def kept_logits(
    logits: Tensor,  # (B, V)
    *,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:  # logits (B, K), falling, -inf where dropped; their ids (B, K)
    """Keep the `top_k` largest, of these the fewest that hold `top_p` of the mass.

    Of equal ones at the border as many are kept as asked for; transformers keeps them all.
    """
    values, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
    if top_p == 1.0:
        return values, ids
    probabilities = values.softmax(dim=1)
    mass_before = probabilities.cumsum(dim=1) - probabilities
    values = values.masked_fill(mass_before >= top_p, -torch.inf)
    if top_k:
        return values, ids
    width = int((~values.isneginf()).sum(dim=1).max())  # waits for the device at every token
    return values[:, :width], ids[:, :width]


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:  # (B, K), (B,) -> (B,), (B,)
    """Draw columns from a categorical distribution by its inverse CDF; returns them, and log p.

    One uniform number a row. It falls into a block of columns first and then on one in the block,
    so that only sums of blocks, and one block, are cumulated in float64.

    >>> draw(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0.7], dtype=torch.float64))[0]
    tensor([1])
    """
    num_rows, num_columns = logits.shape
    num_blocks = -(-num_columns // BLOCK)
    peak = logits.amax(dim=1, keepdim=True)
    weights = logits.new_zeros(num_rows, num_blocks * BLOCK)
    torch.sub(logits, peak, out=weights[:, :num_columns]).exp_()
    blocks = weights.view(num_rows, num_blocks, BLOCK)
    cdf = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # (B, blocks)
    target = uniform[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp(max=num_blocks - 1)  # (B, 1)
    rows = torch.arange(num_rows, device=logits.device)
    within = blocks[rows, block[:, 0]].double().cumsum(dim=1)  # (B, BLOCK)
    mass = within[:, -1:].contiguous()
    target = (target - (cdf.gather(1, block) - mass)).clamp(min=0)
    # Rounding may push a target past the block's mass: then the last column that has any is meant.
    last = torch.searchsorted(within, mass)
    columns = block * BLOCK + torch.searchsorted(within, target, right=True).minimum(last)
    columns = columns.clamp(max=num_columns - 1)  # logits that are not finite lead anywhere
    logprobs = logits.gather(1, columns) - peak - cdf[:, -1:].log().float()
    return columns[:, 0], logprobs[:, 0]


class Choice(NamedTuple):
    """The next token of each row."""

    tokens: Tensor  # (B,)
    logprobs: Tensor  # (B,)
    kept_ids: Tensor | None  # (B, K) int32


def choose(logits: Tensor, uniform: Tensor | None, sampling: Sampling) -> Choice:
    """Choose the next tokens from logits (B, V) that are already divided by the temperature."""
    if uniform is None:
        tokens = logits.argmax(dim=1)
        return Choice(tokens, torch.zeros_like(logits[:, 0]), None)
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return Choice(*draw(logits, uniform), None)
    values, ids = kept_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    columns, logprobs = draw(values, uniform)
    tokens = ids.gather(1, columns[:, None])[:, 0]
    return Choice(tokens, logprobs, ids.masked_fill(values.isneginf(), -1).int())
