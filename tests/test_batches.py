"""Order as a function of seed and epoch, little padding, micro-batches by shape."""

import random
from itertools import pairwise

import pytest
import torch

from rlhf.batches import (
    TOKENS_PER_FORWARD,
    Room,
    build_batch,
    epoch_order,
    micro_batches,
    micro_batches_by_length,
    of_similar_length,
    plan_epochs,
)
from rlhf.tokens import Sample

LENGTHS = random.Random(0).choices(range(5, 400), k=1000)


def test_every_row_comes_once_an_epoch_in_another_order():
    first, second = (epoch_order(LENGTHS, 16, seed=1, epoch=epoch) for epoch in (1, 2))
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(1000))
        assert sorted(map(len, batches))[1:] == [16] * 62
    assert first != second
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(b) for b in second)


@pytest.mark.claim(11)
def test_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(LENGTHS, 16, seed=1, epoch=3) == epoch_order(LENGTHS, 16, seed=1, epoch=3)
    assert epoch_order(LENGTHS, 16, seed=1, epoch=3) != epoch_order(LENGTHS, 16, seed=2, epoch=3)


def test_batches_of_similar_length_have_little_padding():
    batches = epoch_order(LENGTHS, 16, seed=1, epoch=1)
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert sum(LENGTHS) / padded > 0.9


def test_batches_are_not_in_the_order_of_length():
    longest = [max(LENGTHS[r] for r in b) for b in epoch_order(LENGTHS, 16, seed=1, epoch=1)]
    rises = sum(a < b for a, b in pairwise(longest))
    assert 0.35 < rises / len(longest) < 0.65


def test_max_steps_caps_a_plan():
    options = {"num_epochs": 3, "seed": 1}
    whole = plan_epochs(LENGTHS, 16, max_steps=0, **options)
    assert [len(epoch) for epoch in whole] == [63, 63, 63]
    for cap in (1, 63, 64, 126, 500):
        capped = plan_epochs(LENGTHS, 16, max_steps=cap, **options)
        flat = [batch for epoch in capped for batch in epoch]
        assert flat == [batch for epoch in whole for batch in epoch][:cap]
        assert all(capped)


def test_micro_batch_size_zero_is_chosen_from_shapes():
    assert micro_batches([1024] * 8, Room(0)) == [slice(0, 8)]
    assert micro_batches([1024] * 9, Room(0)) == [slice(0, 8), slice(8, 9)]
    assert micro_batches([100_000] * 3, Room(0)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    # A pair is two sequences; one pair is the least.
    assert micro_batches([10] * 4, Room(4), sequences_per_row=2) == [slice(0, 2), slice(2, 4)]
    assert micro_batches([10] * 2, Room(1), sequences_per_row=2) == [slice(0, 1), slice(1, 2)]


def test_micro_batches_by_length_hold_the_rows_they_name(batch, samples):
    parts = micro_batches_by_length(batch, [2, 0, 1], Room(2))
    assert [rows.tolist() for rows, _ in parts] == [[1, 0], [2]]
    for rows, part in parts:
        again = build_batch([samples[row] for row in rows], 0)
        assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


def test_micro_batches_hold_as_many_short_rows_as_fit():
    lengths = [10, 20, 30, 100, 100, 1]
    assert micro_batches(lengths, Room(0, 200)) == [slice(0, 3), slice(3, 5), slice(5, 6)]
    assert micro_batches(lengths, Room(0, 1)) == [slice(i, i + 1) for i in range(6)]
    assert micro_batches(lengths, Room(0, 200), sequences_per_row=2) == [
        slice(0, 3),
        slice(3, 4),
        slice(4, 5),
        slice(5, 6),
    ]


def test_without_gaps_a_row_has_its_tokens_side_by_side():
    batch = build_batch([Sample([1, 2, 3], [4]), Sample([5], [6, 7, 8])], pad_id=0)
    ids, places = batch.without_gaps()
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]  # not six columns: nothing is padded
    assert places[batch.mask].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    found = ids[torch.arange(2)[:, None], places]
    assert torch.equal(found[batch.mask], batch.input_ids[batch.mask])


def test_padding_is_left_of_prompts_and_right_of_responses():
    batch = build_batch([Sample([1, 2], [3]), Sample([4], [5, 6])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [0, 4, 5, 6]]
    assert batch.mask.tolist() == [[True, True, True, False], [False, True, True, True]]


def test_prompts_of_similar_length_are_read_together():
    lengths = sorted((random.Random(0).randint(1, 3000) for _ in range(200)), reverse=True)
    slices = of_similar_length(lengths)
    assert [row for part in slices for row in range(200)[part]] == list(range(200))
    for part in slices:
        here = lengths[part]
        assert here and (here[-1] >= 0.8 * here[0] and len(here) * here[0] <= TOKENS_PER_FORWARD)
    assert of_similar_length([TOKENS_PER_FORWARD + 1, 5]) == [slice(0, 1), slice(1, 2)]
