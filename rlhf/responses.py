"""Responses as they are written, a token of each at a time, and the rollout that they become."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.batches import Batch, pad_left
from rlhf.errors import DIVERGED, RunError
from rlhf.logprobs import Support, forbid_early_end_
from rlhf.sampling import Sampling, choose


class Rollout(NamedTuple):
    """Responses, and what could have been sampled instead."""

    batch: Batch
    support: Support | None  # None after greedy decoding, which samples from nothing
    logprobs: Tensor  # (B, R)  the sampler's own; 0 after greedy decoding
    ended: Tensor  # (B,) bool: a stop token was written, the response was not cut

    def responses(self) -> list[list[int]]:
        """The ids of each response, stop token included, without padding."""
        lengths = self.batch.response_mask.sum(dim=1).tolist()
        return [
            ids[:length]
            for ids, length in zip(self.batch.response_ids.tolist(), lengths, strict=True)
        ]

    def support_of(self, rows: Tensor, batch: Batch) -> Support | None:
        """Narrow the support to a micro-batch that holds these rows."""
        if self.support is None:
            return None
        return self.support.select(rows, batch.response_ids.shape[1])


class Written:
    """What has been written to each prompt so far. One row more takes what nobody asked for."""

    def __init__(self, limits: Tensor, noise: Tensor | None, s: Sampling) -> None:
        num_rows, width = len(limits), int(limits.max())
        self.limits, self.noise, self.s = limits, noise, s
        self.nobody = num_rows
        self.ids = limits.new_full((num_rows + 1, width), s.pad_id)
        self.logprobs = torch.zeros(num_rows + 1, width, device=limits.device)
        self.kept_ids: Tensor | None = None  # (N + 1, R, K)
        self.lengths = limits.new_zeros(num_rows + 1)
        self.healthy = torch.ones(num_rows + 1, dtype=torch.bool, device=limits.device)
        self.early_end_ids = torch.tensor(s.early_end_ids, device=limits.device)
        self.stop_ids = torch.tensor(s.stop_ids, device=limits.device)

    def append(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a token for each of these prompts, from logits (B, V), which may be overwritten.

        Returns the tokens, and for whom to go on: the rows again, or `nobody`.
        """
        positions = self.lengths[rows]
        self.healthy[rows] &= logits.amax(dim=1).isfinite()
        if self.s.min_gen_len:
            least = self.s.min_gen_len
            forbid_early_end_(logits, positions, self.early_end_ids, min_gen_len=least)
        asked = rows.clamp(max=self.nobody - 1)
        uniform = None if self.noise is None else self.noise[asked, positions]
        choice = choose(logits, uniform, self.s)
        self.ids[rows, positions] = choice.tokens
        self.logprobs[rows, positions] = choice.logprobs
        if choice.kept_ids is not None:
            self.keep(rows, positions, choice.kept_ids)
        self.lengths[rows] = torch.where(rows < self.nobody, positions + 1, 0)
        more = ~self.stops(choice.tokens) & (positions + 1 < self.limits[asked])
        return choice.tokens, rows.where(more, self.nobody)

    def stops(self, ids: Tensor) -> Tensor:
        """Tell which ids end a response."""
        return (ids[..., None] == self.stop_ids).any(dim=-1)

    def keep(self, rows: Tensor, positions: Tensor, kept_ids: Tensor) -> None:
        """Store which ids could have been chosen."""
        if self.kept_ids is None:
            self.kept_ids = kept_ids.new_full((*self.ids.shape, kept_ids.shape[1]), -1)
        more = kept_ids.shape[1] - self.kept_ids.shape[2]
        self.kept_ids = pad(self.kept_ids, (0, max(more, 0)), value=-1)
        self.kept_ids[rows, positions, : kept_ids.shape[1]] = kept_ids

    def rollout(self, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Give everything as one batch.

        Raises: RunError if the policy has diverged.
        """
        lengths, healthy = self.lengths[:-1], self.healthy[:-1]
        if not healthy.all():
            raise RunError(
                f"sampling: the policy's logits are not finite for {int((~healthy).sum())} of"
                f" {len(healthy)} prompts. {DIVERGED}"
            )
        width = int(lengths.max())
        prompt_ids, prompt_mask = (x.to(lengths.device) for x in pad_left(prompts, self.s.pad_id))
        response_mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        response_ids = self.ids[:-1, :width].where(response_mask, self.s.pad_id)
        kept_ids = None if self.kept_ids is None else self.kept_ids[:-1, :width]
        support = Support(kept_ids, self.early_end_ids, self.s.min_gen_len)
        return Rollout(
            Batch(prompt_ids, prompt_mask, response_ids, response_mask),
            None if self.noise is None else support,
            self.logprobs[:-1, :width].masked_fill(~response_mask, 0.0),
            (response_mask & self.stops(response_ids)).any(dim=1),
        )
