"""Prompts to responses: a batched decode loop over slots, which are refilled as responses end."""

from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel

from rlhf.batches import (
    Batch,
    Room,
    micro_batches,
    of_similar_length,
    pad_left,
    position_ids,
)
from rlhf.errors import DIVERGED, RunError
from rlhf.kv_cache import SlotCache, has_plain_cache, takes_any_mask
from rlhf.logprobs import Support, forbid_early_end_, full_logits
from rlhf.sampling import Sampling, choose, uniform_noise

# Decoding keeps only keys and values of a token, so more fit than in a training forward.
ROLLOUTS_PER_SEQUENCE = 8
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}  # at what has ended: on CUDA, that means waiting
SPARE_COLUMNS = 128  # of the cache: how seldom it has to be moved
REFILL_AT = 4  # prompts are read when one in so many slots is free


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


class Written:
    """What has been written to each prompt so far. One row more takes what nobody asked for."""

    def __init__(self, limits: Tensor, noise: Tensor | None, s: Sampling) -> None:
        num_rows, width = len(limits), int(limits.max())
        self.limits, self.noise, self.s = limits, noise, s
        self.nobody = num_rows
        self.ids = limits.new_full((num_rows + 1, width), s.eos_id)
        self.logprobs = torch.zeros(num_rows + 1, width, device=limits.device)
        self.kept_ids: Tensor | None = None  # (N + 1, R, K)
        self.lengths = limits.new_zeros(num_rows + 1)
        self.healthy = torch.ones(num_rows + 1, dtype=torch.bool, device=limits.device)
        self.early_end_ids = torch.tensor(s.early_end_ids, device=limits.device)

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
        more = (choice.tokens != self.s.eos_id) & (positions + 1 < self.limits[asked])
        return choice.tokens, rows.where(more, self.nobody)

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
        prompt_ids, prompt_mask = (x.to(lengths.device) for x in pad_left(prompts, self.s.eos_id))
        response_mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        response_ids = self.ids[:-1, :width].where(response_mask, self.s.eos_id)
        kept_ids = None if self.kept_ids is None else self.kept_ids[:-1, :width]
        support = Support(kept_ids, self.early_end_ids, self.s.min_gen_len)
        return Rollout(
            Batch(prompt_ids, prompt_mask, response_ids, response_mask),
            None if self.noise is None else support,
            self.logprobs[:-1, :width].masked_fill(~response_mask, 0.0),
            (response_mask & (response_ids == self.s.eos_id)).any(dim=1),
        )


class Slots:
    """The rows of the forward that decodes: for which prompt each writes, and their cache."""

    def __init__(self, model: PreTrainedModel, written: Written, size: int, columns: int) -> None:
        device = model.device
        self.model, self.written = model, written
        self.cache = SlotCache(size, columns)
        self.rows = torch.full((size,), written.nobody, device=device)  # (S,)
        self.tokens, self.positions = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.mask = torch.zeros(size, columns, dtype=torch.bool, device=device)
        self.end = 0  # the column that is filled next, in all slots
        self.takes_any_mask = takes_any_mask(model)
        self.takes_positions = "position_ids" in signature(model.base_model.forward).parameters

    def free(self) -> list[int]:
        """Number the slots that write for nobody; waits for the device."""
        return [slot for slot, row in enumerate(self.rows.tolist()) if row == self.written.nobody]

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run new tokens (B, N); returns the logits after the last, (B, V)."""
        output = self.model.base_model.forward(  # not a compiled call: its shapes keep changing
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions} if self.takes_positions else {}),
        )
        head = self.model.get_output_embeddings()
        temperature = self.written.s.temperature
        return full_logits(output.last_hidden_state[:, -1], head.weight, head.bias, temperature)

    def fill(self, free: list[int], rows: list[int], prompts: list[Sequence[int]]) -> None:
        """Let these slots read new prompts, none longer than those before, and choose a token."""
        device = self.rows.device
        lengths = [len(prompt) for prompt in prompts]
        self.end = max(self.end, lengths[0])
        for part in of_similar_length(lengths):
            slots, here = (torch.tensor(x[part], device=device) for x in (free, rows))
            ids, mask = (x.to(device) for x in pad_left(prompts[part], self.written.s.eos_id))
            read = DynamicCache()
            logits = self.logits(ids, mask.long(), position_ids(mask), read)
            self.cache.store(slots, read, self.end)
            self.mask[slots] = pad(mask, (self.end - mask.shape[1], self.mask.shape[1] - self.end))
            self.tokens[slots], self.rows[slots] = self.written.append(here, logits)
            self.positions[slots] = mask.sum(dim=1) - 1

    def step(self) -> None:
        """Run the tokens that were chosen, and choose the next."""
        goes_on = self.rows < self.written.nobody
        self.positions = torch.where(goes_on, self.positions + 1, 0)
        self.mask[:, self.end] = True
        self.end += 1
        mask = self.mask[:, : self.end]
        mask = mask[:, None, None] if self.takes_any_mask else mask.long()
        logits = self.logits(self.tokens[:, None], mask, self.positions[:, None], self.cache)
        self.tokens, self.rows = self.written.append(self.rows, logits)

    def make_room(self, columns: int) -> None:
        """Move everything to the left, if fewer columns than these are left."""
        if self.end + columns <= self.mask.shape[1]:
            return
        shift = int(self.mask[self.rows < self.written.nobody].any(dim=0).int().argmax())
        self.mask = pad(self.mask[:, shift:], (0, shift))
        self.cache.shift(shift)
        self.end -= shift

    def drop(self, free: list[int]) -> None:
        """Give up slots that will not be needed again."""
        kept = torch.tensor(sorted(set(range(len(self.rows))) - set(free)), device=self.rows.device)
        self.rows, self.tokens, self.positions, self.mask = (
            x[kept] for x in (self.rows, self.tokens, self.positions, self.mask)
        )
        self.cache.select(kept)


def decode(slots: Slots, prompts: Sequence[Sequence[int]]) -> None:
    """Write all responses: a token of every slot at a time."""
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # the longest first
    size = len(slots.rows)
    pace = STEPS_BETWEEN_LOOKS[slots.rows.device.type]
    while True:
        free = slots.free()
        if waiting and len(free) >= max(1, size // REFILL_AT):
            rows = [waiting.pop() for _ in free[: len(waiting)]]
            slots.fill(free, rows, [prompts[row] for row in rows])
            continue
        if not waiting:
            if len(free) == len(slots.rows):
                return
            if 2 * len(free) >= len(slots.rows):
                slots.drop(free)
        slots.make_room(pace)
        for _ in range(pace):
            slots.step()


class DrawOurs(LogitsProcessor):
    """Makes transformers' `generate` write what we choose: all other logits become -inf."""

    def __init__(self, written: Written, rows: Tensor) -> None:
        self.written, self.rows = written, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the next token of each row, from its logits (B, V)."""
        logits = scores.float() / self.written.s.temperature
        tokens, self.rows = self.written.append(self.rows, logits)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def ended(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A stopping criterion: which rows write for nobody any more (B,)."""
        return self.rows == self.written.nobody


def decode_by_transformers(
    model: PreTrainedModel, written: Written, prompts: Sequence[Sequence[int]], part: slice
) -> None:
    """Write some responses by `generate`, for models that remember a text in ways of their own."""
    s, device = written.s, model.device
    ids, mask = (x.to(device) for x in pad_left(prompts[part], s.eos_id))
    ours = DrawOurs(written, torch.arange(len(prompts), device=device)[part])
    write: Any = model.generate
    write(
        ids,
        attention_mask=mask.long(),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=written.ids.shape[1],
            eos_token_id=s.eos_id,
            pad_token_id=s.eos_id,
        ),
        logits_processor=[ours],
        stopping_criteria=[ours.ended],
    )


def decoder_name(model: PreTrainedModel) -> str:
    """Say which of the two ways a model's rollouts go."""
    if has_plain_cache(model):
        return "rollouts: slots on one key-value cache"
    return "rollouts: transformers' generate, since this model's cache is of its own kind (slower)"


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    noise_key: tuple[int, int],
    rows: Sequence[int],
    room: Room,
) -> Rollout:
    """Write a response to each prompt.

    `noise_key` is (seed, step) and `rows` names the prompts: with the position they are all that
    the sampling noise of a token depends on. `room` is that of a training
    forward; of rollouts, eight times as many fit.
    """
    limits = [sampling.max_len - len(prompt) for prompt in prompts]
    if sampling.max_new_tokens:
        limits = [min(limit, sampling.max_new_tokens) for limit in limits]
    noise = None
    if sampling.do_sampling:
        noise = uniform_noise(*noise_key, rows, max(limits)).to(model.device)
    written = Written(torch.tensor(limits, device=model.device), noise, sampling)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    # Some models keep something for each column, and for no more columns than they have positions.
    sizes = (getattr(model.config, x, None) for x in ("max_position_embeddings", "max_seq_len"))
    spare = min([SPARE_COLUMNS, *(size - longest for size in sizes if size)])
    columns = longest + max(STEPS_BETWEEN_LOOKS[model.device.type] - 1, spare)
    room = Room(*(ROLLOUTS_PER_SEQUENCE * number for number in room))
    if has_plain_cache(model):
        size = room.sequences or max(room.tokens // columns, 1)
        decode(Slots(model, written, min(size, len(prompts)), columns), prompts)
    else:
        for part in micro_batches([columns] * len(prompts), room):
            decode_by_transformers(model, written, prompts, part)
    return written.rollout(prompts)
