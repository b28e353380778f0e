"""Ids to padded tensors, in an order that is a pure function of seed and epoch."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.tokens import Sample

TOKENS_PER_FORWARD = 8192  # padding included; what `--micro_batch_size=0` aims at
LEAST_TOKENS = 128  # a room with fewer holds no two real sequences
SORTING_WINDOW = 32  # batches that are sorted by length together


class Room(NamedTuple):
    """How much one forward may take: so many sequences, or, if that is 0, so many tokens."""

    sequences: int
    tokens: int = TOKENS_PER_FORWARD

    def halved(self) -> "Room | None":
        """Give the next smaller room; None if it would be too small for anything.

        >>> Room(2).halved(), Room(1).halved()
        (Room(sequences=1, tokens=8192), None)
        """
        if self.sequences:
            return Room(self.sequences // 2, self.tokens) if self.sequences > 1 else None
        return Room(0, self.tokens // 2) if self.tokens > LEAST_TOKENS else None

    def __str__(self) -> str:
        return f"{self.sequences} sequences" if self.sequences else f"{self.tokens} tokens"


class Batch(NamedTuple):
    """Prompts padded on the left, responses padded on the right."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, R)
    response_mask: Tensor  # (B, R) bool

    @property
    def input_ids(self) -> Tensor:
        """Prompts and responses as one: (B, T)."""
        return torch.cat((self.prompt_ids, self.response_ids), dim=1)

    @property
    def mask(self) -> Tensor:
        """What of `input_ids` is real: (B, T) bool."""
        return torch.cat((self.prompt_mask, self.response_mask), dim=1)

    def without_gaps(self) -> tuple[Tensor, Tensor]:
        """Each row's tokens side by side: ids (B, longest row), and where each went (B, T).

        What is behind a row's last token is no part of it; to causal attention it does not exist.
        """
        places = position_ids(self.mask)  # (B, T)
        length = int(self.mask.sum(dim=1).max())
        ids = self.input_ids.new_zeros(len(places), length + 1)
        ids.scatter_(1, places.masked_fill(~self.mask, length), self.input_ids)
        return ids[:, :length], places

    def select(self, rows: Tensor | slice) -> "Batch":
        """Keep some rows, and only the columns in which one of them has a token."""
        prompt_mask, response_mask = self.prompt_mask[rows], self.response_mask[rows]
        start = int(prompt_mask.any(dim=0).int().argmax())
        end = int(response_mask.any(dim=0).sum())
        return Batch(
            self.prompt_ids[rows, start:],
            prompt_mask[:, start:],
            self.response_ids[rows, :end],
            response_mask[:, :end],
        )

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors to a device."""
        return Batch(*(tensor.to(device) for tensor in self))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the left to the longest: ids (B, P) and mask (B, P)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) >= (width - lengths)[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the right to the longest: ids (B, R) and mask (B, R)."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]


def build_batch(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad samples to a batch."""
    return Batch(
        *pad_left([sample.prompt_ids for sample in samples], pad_id),
        *pad_right([sample.response_ids for sample in samples], pad_id),
    )


def position_ids(mask: Tensor) -> Tensor:
    """Positions of the real tokens, counted from each row's first: (B, T).

    GPT-2's positions are absolute: without these a row padded on the left is another text.

    >>> position_ids(torch.tensor([[False, True, True, False]]))
    tensor([[0, 0, 1, 1]])
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def sample_length(sample: Sample) -> int:
    """Count the tokens of prompt and response."""
    return len(sample.prompt_ids) + len(sample.response_ids)


def epoch_order(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Deal all rows into batches of similar length, in shuffled order; the last may be smaller.

    Rows are shuffled, cut into windows of some batches, sorted by length within a window, and the
    batches are shuffled again. So a batch has little padding, yet other mates in every epoch.
    The order depends on nothing but the arguments: a resumed epoch continues in it.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_size * SORTING_WINDOW
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: (lengths[row], row))
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


class PlannedBatch(NamedTuple):
    """The rows of one optimisation batch, and where in the run it stands."""

    rows: list[int]
    epoch: float  # epochs that are done after it


def plan_epochs(
    lengths: Sequence[int], batch_size: int, *, num_epochs: int, max_steps: int, seed: int
) -> list[list[PlannedBatch]]:
    """Lay out a whole run: the order of every epoch, cut off after `max_steps` batches.

    0 steps means no cap. An epoch of which nothing is left is left out.
    """
    plan, room = [], max_steps or num_epochs * len(lengths)
    for epoch in range(num_epochs):
        order = epoch_order(lengths, batch_size, seed=seed, epoch=epoch + 1)
        batches = [PlannedBatch(rows, epoch + i / len(order)) for i, rows in enumerate(order, 1)]
        if room > 0:
            plan.append(batches[:room])
        room -= len(batches)
    return plan


def micro_batches(lengths: Sequence[int], room: Room, *, sequences_per_row: int = 1) -> list[slice]:
    """Cut rows of these lengths into slices of what one forward takes; a pair is two sequences.

    Tokens count with their padding: a choice by shape alone, so that it is the same in every run.
    A slice has at least one row.

    >>> micro_batches([100] * 5, Room(2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    >>> micro_batches([100, 4000, 4096, 1], Room(0))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    slices, start, longest = [], 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        sequences = (row + 1 - start) * sequences_per_row
        most = room.sequences or room.tokens // max(longest, 1)
        if sequences > most and row > start:
            slices.append(slice(start, row))
            start, longest = row, length
    return [*slices, slice(start, len(lengths))] if lengths else []


def of_similar_length(lengths: Sequence[int]) -> list[slice]:
    """Cut falling lengths into slices for one forward each, of which little is padding.

    >>> of_similar_length([100, 90, 80, 79, 10])
    [slice(0, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    starts = [0]
    for i, length in enumerate(lengths):
        longest = lengths[starts[-1]]
        full = (i + 1 - starts[-1]) * longest > TOKENS_PER_FORWARD
        if i > starts[-1] and (full or length < 0.8 * longest):
            starts.append(i)
    ends = [*starts[1:], len(lengths)]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def micro_batches_by_length(
    batch: Batch, rows: Sequence[int], room: Room
) -> list[tuple[Tensor, Batch]]:
    """Cut rows of a batch into micro-batches of similar length, each without needless columns."""
    lengths = batch.mask.sum(dim=1).tolist()
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    parts = [
        torch.tensor(ordered[part], device=batch.mask.device)
        for part in micro_batches([lengths[row] for row in ordered], room)
    ]
    return [(part, batch.select(part)) for part in parts]
