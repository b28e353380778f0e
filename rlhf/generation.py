"""Prompts to responses: a batched decode loop over slots, which are refilled as responses end."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel

from rlhf.batches import Room, micro_batches, of_similar_length, pad_left, position_ids
from rlhf.heads import gives_logits, head_of, own_logits
from rlhf.kv_cache import SlotCache, has_plain_cache, takes_any_mask
from rlhf.logprobs import full_logits, weights_of
from rlhf.responses import Rollout, Written
from rlhf.sampling import Sampling, uniform_noise

# Decoding keeps only keys and values of a token, so more fit than in a training forward.
ROLLOUTS_PER_SEQUENCE = 8
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}  # at what has ended: on CUDA, that means waiting
SPARE_COLUMNS = 128  # of the cache: how seldom it has to be moved
REFILL_AT = 4  # prompts are read when one in so many slots is free


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
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
            **({"position_ids": positions} if self.takes_positions else {}),
        }
        # Not a compiled call: its shapes keep changing.
        if gives_logits(self.model):
            with torch.compiler.set_stance("force_eager"):
                last = own_logits(self.model, 1, **inputs)[:, -1]
        else:
            last = self.model.base_model.forward(**inputs).last_hidden_state[:, -1]
        return full_logits(last, *weights_of(head_of(self.model)), self.written.s.temperature)

    def fill(self, free: list[int], rows: list[int], prompts: list[Sequence[int]]) -> None:
        """Let these slots read new prompts, none longer than those before, and choose a token."""
        device = self.rows.device
        lengths = [len(prompt) for prompt in prompts]
        self.end = max(self.end, lengths[0])
        for part in of_similar_length(lengths):
            slots, here = (torch.tensor(x[part], device=device) for x in (free, rows))
            ids, mask = (x.to(device) for x in pad_left(prompts[part], self.written.s.pad_id))
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
    ids, mask = (x.to(device) for x in pad_left(prompts[part], s.pad_id))
    ours = DrawOurs(written, torch.arange(len(prompts), device=device)[part])
    write: Any = model.generate
    write(
        ids,
        attention_mask=mask.long(),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=written.ids.shape[1],
            eos_token_id=s.stop_ids,
            pad_token_id=s.pad_id,
        ),
        logits_processor=[ours],
        stopping_criteria=[ours.ended],
    )


def decoder_name(model: PreTrainedModel) -> str:
    """Say which of the two ways a model's rollouts go, and whose logits they take."""
    name = "rollouts: slots on one key-value cache"
    if not has_plain_cache(model):
        name = "rollouts: transformers' generate, since this model's cache is of its own kind"
        name += " (slower)"
    if gives_logits(model):
        name += "; logits are scaled or capped, so the model's own forward gives them (more memory)"
    return name


def begin(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    noise_key: tuple[int, int],
    rows: Sequence[int],
) -> tuple[Written, int]:
    """Prepare what responses are written into, and count the columns of a prompt and response."""
    limits = [sampling.max_len - len(prompt) for prompt in prompts]
    if sampling.max_new_tokens:
        limits = [min(limit, sampling.max_new_tokens) for limit in limits]
    noise = None
    if sampling.do_sampling:
        noise = uniform_noise(*noise_key, rows, max(limits)).to(model.device)
    written = Written(torch.tensor(limits, device=model.device), noise, sampling)
    return written, max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))


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
    named: Any = {"sampling": sampling, "noise_key": noise_key, "rows": rows}
    written, longest = begin(model, prompts, **named)
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
