"""Prompts to responses: a batched decode loop with a KV cache, and seeded noise.

What a prompt gets depends on the prompt, the model and its own noise, and on nothing else: not on
its batch mates, nor on the slot or the micro-batch it sits in.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf.batches import TOKENS_PER_FORWARD, Batch, micro_batches, pad_left, position_ids
from rlhf.errors import RunError
from rlhf.logprobs import Support, forbid_early_end, full_logits

# Decoding keeps only keys and values of a token, so more fit than in a training forward.
ROLLOUTS_PER_SEQUENCE = 8
TOKENS_PER_ROLLOUT = ROLLOUTS_PER_SEQUENCE * TOKENS_PER_FORWARD


class Sampling(NamedTuple):
    """How responses are drawn; the names are the flags'."""

    do_sampling: bool
    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    min_gen_len: int
    max_new_tokens: int  # 0 = up to max_len
    max_len: int  # prompt and response together
    eos_id: int
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


class Rollout(NamedTuple):
    """Responses, and what could have been sampled instead."""

    batch: Batch
    support: Support | None  # None after greedy decoding, which samples from nothing
    logprobs: Tensor  # (B, R)  the sampler's own; 0 after greedy decoding
    ended: Tensor  # (B,) bool: EOS was written, the response was not cut

    def responses(self) -> list[list[int]]:
        """The ids of each response, EOS included, without padding."""
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
    """Keep the `top_k` largest, of these the fewest that hold `top_p` of the mass."""
    values, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
    probabilities = values.softmax(dim=1)
    mass_before = probabilities.cumsum(dim=1) - probabilities
    values = values.masked_fill(mass_before >= top_p, -torch.inf)
    width = int(values.isfinite().sum(dim=1).max())
    return values[:, :width], ids[:, :width]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:  # (B, K), (B,) -> (B,) column indices
    """Draw from a categorical distribution by its inverse CDF: one uniform number a row.

    >>> draw(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0.7], dtype=torch.float64))
    tensor([1])
    """
    cdf = logits.double().softmax(dim=1).cumsum(dim=1)  # (B, K)
    # The last entry is 1 up to rounding; scaled by it, no number can fall behind the last token.
    target = (uniform * cdf[:, -1])[:, None]
    return torch.searchsorted(cdf, target, right=True).squeeze(1)


class Step(NamedTuple):
    """One decoded token of each row."""

    tokens: Tensor  # (B,)
    logprobs: Tensor  # (B,)
    kept_ids: Tensor | None  # (B, K) int32


def sample_step(logits: Tensor, uniform: Tensor | None, sampling: Sampling) -> Step:
    """Choose the next tokens from logits (B, V) that are already divided by the temperature."""
    if uniform is None:
        tokens = logits.argmax(dim=1)
        return Step(tokens, torch.zeros_like(logits[:, 0]), None)
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        tokens = draw(logits, uniform)
        return Step(tokens, logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0], None)
    values, ids = kept_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    columns = draw(values, uniform)[:, None]
    return Step(
        ids.gather(1, columns)[:, 0],
        values.log_softmax(dim=1).gather(1, columns)[:, 0],
        ids.masked_fill(values.isneginf(), -1).int(),
    )


def decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], noise: Tensor | None, s: Sampling
) -> Rollout:
    """Write the responses of one micro-batch, a token of every row at a time.

    Raises: RunError if the policy has diverged.
    """
    device = model.device
    prompt_ids, prompt_mask = (x.to(device) for x in pad_left(prompts, s.eos_id))  # (B, P)
    early_end_ids = torch.tensor(s.early_end_ids, device=device)
    head = model.get_output_embeddings()
    limits = s.max_len - prompt_mask.sum(dim=1)  # (B,)
    if s.max_new_tokens:
        limits = limits.clamp(max=s.max_new_tokens)
    tokens, mask, positions, cache = prompt_ids, prompt_mask, position_ids(prompt_mask), None
    running = healthy = torch.ones_like(limits, dtype=torch.bool)  # (B,)
    steps: list[Step] = []
    for t in range(int(limits.max())):
        output = model.base_model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = full_logits(output.last_hidden_state[:, -1], head, s.temperature)  # (B, V)
        healthy = healthy & logits.isfinite().all(dim=1)
        logits = logits.nan_to_num()  # so that sampling stays in range until the run is stopped
        if t < s.min_gen_len:
            here = torch.full_like(limits, t)
            logits = forbid_early_end(logits, here, early_end_ids, min_gen_len=s.min_gen_len)
        step = sample_step(logits, None if noise is None else noise[:, t], s)
        steps.append(step._replace(tokens=step.tokens.where(running, s.eos_id)))
        mask = torch.cat((mask, running[:, None]), dim=1)
        running = running & (steps[-1].tokens != s.eos_id) & (t + 1 < limits)
        if not running.any():
            break
        tokens, positions = steps[-1].tokens[:, None], position_ids(mask)[:, -1:]
    if not healthy.all():
        raise RunError(
            f"sampling: the policy's logits are not finite for {int((~healthy).sum())} of"
            f" {len(healthy)} prompts. A lower --learning_rate or --dtype=float32 may help"
        )
    return build_rollout(prompt_ids, prompt_mask, mask, steps, noise is not None, s)


def build_rollout(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    mask: Tensor,
    steps: list[Step],
    sampled: bool,
    s: Sampling,
) -> Rollout:
    """Stack the steps of a decode loop; `mask` (B, T) runs over prompts and responses."""
    response_mask = mask[:, prompt_ids.shape[1] :]  # (B, R)
    response_ids = torch.stack([step.tokens for step in steps], dim=1)
    logprobs = torch.stack([step.logprobs for step in steps], dim=1)
    kept_ids = None
    if steps[0].kept_ids is not None:
        rows = [step.kept_ids for step in steps if step.kept_ids is not None]
        width = max(ids.shape[1] for ids in rows)
        kept_ids = torch.stack([pad(ids, (0, width - ids.shape[1]), value=-1) for ids in rows], 1)
    support = Support(kept_ids, torch.tensor(s.early_end_ids, device=mask.device), s.min_gen_len)
    return Rollout(
        Batch(prompt_ids, prompt_mask, response_ids, response_mask),
        support if sampled else None,
        logprobs.masked_fill(~response_mask, 0.0),
        (response_mask & (response_ids == s.eos_id)).any(dim=1),
    )


def join(parts: list[Rollout], eos_id: int) -> Rollout:
    """Put micro-batches together again, padded to common widths."""
    prompt_width = max(part.batch.prompt_ids.shape[1] for part in parts)
    width = max(part.logprobs.shape[1] for part in parts)
    columns: list[list[Tensor]] = [[], [], [], [], []]
    for batch, _, logprobs, _ in parts:
        left = (prompt_width - batch.prompt_ids.shape[1], 0)
        right = (0, width - logprobs.shape[1])
        columns[0].append(pad(batch.prompt_ids, left, value=eos_id))
        columns[1].append(pad(batch.prompt_mask, left, value=False))
        columns[2].append(pad(batch.response_ids, right, value=eos_id))
        columns[3].append(pad(batch.response_mask, right, value=False))
        columns[4].append(pad(logprobs, right))
    joined = [torch.cat(column) for column in columns]
    supports = [part.support for part in parts]
    kept = [support.kept_ids for support in supports if support and support.kept_ids is not None]
    support = supports[0]
    if support and kept:
        depth = max(ids.shape[2] for ids in kept)
        kept = [
            pad(ids, (0, depth - ids.shape[2], 0, width - ids.shape[1]), value=-1) for ids in kept
        ]
        support = support._replace(kept_ids=torch.cat(kept))
    ended = torch.cat([part.ended for part in parts])
    return Rollout(Batch(*joined[:4]), support, joined[4], ended)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    noise_key: tuple[int, int],
    rows: Sequence[int],
    micro_batch_size: int,
) -> Rollout:
    """Write a response to each prompt.

    `noise_key` is (seed, step) and `rows` names the prompts: with the position they are all that
    the sampling noise of a token depends on. `micro_batch_size` counts sequences of a training
    forward, as the flag does; of rollouts, eight times as many fit.
    """
    longest = max(map(len, prompts))
    num_positions = min(sampling.max_new_tokens or sampling.max_len, sampling.max_len)
    parts = []
    width = min(longest + num_positions, sampling.max_len)
    for part in micro_batches(
        [width] * len(prompts), ROLLOUTS_PER_SEQUENCE * micro_batch_size, tokens=TOKENS_PER_ROLLOUT
    ):
        noise = None
        if sampling.do_sampling:
            noise = uniform_noise(*noise_key, rows[part], num_positions).to(model.device)
        parts.append(decode(model, prompts[part], noise, sampling))
    return join(parts, sampling.eos_id)
