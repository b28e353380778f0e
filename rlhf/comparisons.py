"""COMPARISONS: responses to one prompt as a preference loss sees them, and their logprobs."""

import hashlib
from array import array
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf.batches import Room, build_batch, micro_batches, sample_length
from rlhf.checkpoints import load_tensors, weights_fingerprint
from rlhf.heads import head_of
from rlhf.logprobs import sequence_logprobs, token_logprobs
from rlhf.models import response_states
from rlhf.processes import most_of_processes, share_of, sum_over_processes
from rlhf.runtime import Runtime
from rlhf.sharding import in_step, run_whole
from rlhf.tokens import Sample


class Comparison(NamedTuple):
    """Responses to one prompt, the best one first, and the pairs (better, worse) among them."""

    samples: list[Sample]
    pairs: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(sample_length, self.samples))


def most_responses(comparisons: list[Comparison]) -> int:
    """Count the responses to the prompt that has most of them, K."""
    return max(len(comparison.samples) for comparison in comparisons)


def response_logprobs(
    model: PreTrainedModel, comparisons: list[Comparison], pad_id: int, runtime: Runtime
) -> Tensor:  # (B, K), 0 where a prompt has fewer responses
    """Log-probabilities of all responses of some comparisons, in one forward."""
    samples = list(chain.from_iterable(comparison.samples for comparison in comparisons))
    batch = build_batch(samples, pad_id).to(runtime.device)
    with runtime.autocast():
        states = response_states(model, batch)  # (S, R, D)
    head = head_of(model)
    logprobs = token_logprobs(
        states, batch.response_ids, batch.response_mask, head, temperature=1.0
    )  # (S, R)
    sums = sequence_logprobs(logprobs, batch.response_mask)  # (S,)
    sizes = [len(comparison.samples) for comparison in comparisons]
    return pad_sequence(list(sums.split(sizes)), batch_first=True)


@torch.no_grad()
def all_logprobs(
    model: PreTrainedModel, pad_id: int, runtime: Runtime, comparisons: list[Comparison], room: Room
) -> Tensor:  # (number of comparisons, K)
    """Log-probabilities of all responses, in the order of the comparisons."""
    lengths = [comparison.length for comparison in comparisons]
    order = share_of(sorted(range(len(comparisons)), key=lengths.__getitem__))
    width = most_responses(comparisons)
    logprobs = torch.zeros(len(comparisons), width, device=runtime.device)
    ordered = [lengths[row] for row in order]
    parts = micro_batches(ordered, room, sequences_per_row=width)
    for rows, weight in in_step(model, order, parts, spare=0):
        some = [comparisons[row] for row in rows]
        found = run_whole(model, response_logprobs, some, pad_id, runtime)
        logprobs[rows] += weight * pad(found, (0, width - found.shape[1]))
    return sum_over_processes(logprobs)


def reference_fingerprint(
    policy: PreTrainedModel, sides: Iterable[list[Comparison]], precision: str
) -> str:
    """Name what the reference's logprobs depend on: its weights, every id, the precision."""
    digest = hashlib.sha256(f"{weights_fingerprint(policy)} {precision}".encode())
    for side in sides:
        for ids in chain.from_iterable(sample for some in side for sample in some.samples):
            digest.update(len(ids).to_bytes(8, "big"))
            digest.update(array("q", ids))
        digest.update(b"next side")
    return digest.hexdigest()


def kept_logprobs(
    folder: Path, fingerprint: dict[str, str], device: torch.device
) -> dict[str, Tensor] | None:
    """Read what was kept under this fingerprint; None if any process has not got it."""
    kept = load_tensors(folder, device=device)
    found = kept[0] if kept is not None and kept[1] == fingerprint else None
    [missing] = most_of_processes([found is None], device)
    return None if missing else found
