"""One step of each stage, ours and the plain way: what the benchmarks let take turns.

A step is forward and backward over one batch, the reference's forward included in DPO; clipping and
the optimiser, the same for all, are left out. Ours calls the functions of the scripts themselves.
The plain way is what small repositories do: a batch padded to its longest row, an attention mask,
log-softmax over the vocabulary at every position, four forwards for DPO, rollouts one by one.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel, PreTrainedModel

import run_dpo
import run_rm
import run_sft
from benchmarks.measuring import EOS, Pair
from rlhf.batches import Room, sample_length
from rlhf.comparisons import Comparison, all_logprobs
from rlhf.generation import generate
from rlhf.rankings import Ranking
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.tokens import Sample

BETA = 0.2
ROOM = Room(0)
Prompts = list[list[int]]


def both_sides(pairs: list[Pair]) -> list[Sample]:
    return [pair[side] for side in (0, 1) for pair in pairs]


def row_length(row: Sample | Pair) -> int:
    """Tokens of a response with its prompt, or of the longer of two."""
    return sample_length(row) if isinstance(row, Sample) else max(map(sample_length, row))


def num_targets(batch: list[Any]) -> int:
    """What the loss of a batch is a mean over: response tokens, or pairs."""
    is_sft = isinstance(batch[0], Sample)
    return sum(len(sample.response_ids) for sample in batch) if is_sft else len(batch)


# Ours


def our_sft(model: PreTrainedModel, samples: list[Sample], runtime: Runtime) -> float:
    samples = sorted(samples, key=sample_length)  # as `epoch_order` deals them
    return float(run_sft.add_gradient(model, samples, EOS, runtime, ROOM))


def our_dpo(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair], runtime: Runtime
) -> float:
    compared = [Comparison(list(pair), [(0, 1)]) for pair in sorted(pairs, key=row_length)]
    ref_logprobs = all_logprobs(reference, EOS, runtime, compared, ROOM)
    settings = argparse.Namespace(loss="dpo", beta=BETA, label_smoothing=0.0, sft_coeff=0.0)
    means = run_dpo.add_gradient(settings, model, EOS, runtime, compared, ref_logprobs, ROOM)
    return float(means["loss"])


def our_rm(model: PreTrainedModel, pairs: list[Pair], runtime: Runtime) -> float:
    pairs = sorted(pairs, key=row_length)
    responses = argparse.Namespace(samples=both_sides(pairs))
    responses.lengths = [sample_length(sample) for sample in responses.samples]
    responses.targets = torch.zeros(len(responses.samples))  # a pair needs none
    items = [Ranking([row, row + len(pairs)], [(0, 1)]) for row in range(len(pairs))]
    settings = argparse.Namespace(loss="pairwise", margin=False, center_coeff=0.0)
    return float(run_rm.add_gradient(settings, model, responses, EOS, runtime, items, ROOM))


def our_rollout(
    model: PreTrainedModel, prompts: Prompts, new_tokens: int, runtime: Runtime, step: int = 1
) -> None:
    """Write as many tokens for each prompt, from the whole vocabulary: EOS is forbidden."""
    sampling = Sampling(
        do_sampling=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_gen_len=new_tokens,
        max_new_tokens=new_tokens,
        max_len=model.config.max_position_embeddings,
        pad_id=EOS,
        stop_ids=[EOS],
        early_end_ids=[EOS],
    )
    with runtime.autocast():
        rollout = generate(
            model,
            prompts,
            sampling=sampling,
            noise_key=(0, step),
            rows=range(len(prompts)),
            room=ROOM,
        )
    assert rollout.batch.response_mask.sum() == len(prompts) * new_tokens


# The plain way


def plain_batch(samples: list[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right to the longest: ids, attention mask, response mask, (B, T) each."""
    rows = [torch.tensor([*sample.prompt_ids, *sample.response_ids]) for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=EOS)
    places = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(sample.prompt_ids) for sample in samples])[:, None]
    masks = (places < ends).long(), (starts <= places) & (places < ends)
    return ids.to(device), masks[0].to(device), masks[1].to(device)


def plain_logprobs(model: PreTrainedModel, samples: list[Sample]) -> Tensor:  # (B,)
    ids, mask, response = plain_batch(samples, model.device)
    logprobs = model(ids, attention_mask=mask).logits.float().log_softmax(dim=2)[:, :-1]
    chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return (chosen * response[:, 1:]).sum(dim=1)


def plain_sft(model: PreTrainedModel, samples: list[Sample], runtime: Runtime) -> float:
    ids, mask, response = plain_batch(samples, runtime.device)
    with runtime.autocast():
        logits = model(ids, attention_mask=mask).logits.float()
    labels = ids.masked_fill(~response, -100)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def plain_dpo(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair], runtime: Runtime
) -> float:
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    with runtime.autocast():
        with torch.no_grad():
            ref_gap = plain_logprobs(reference, chosen) - plain_logprobs(reference, rejected)
        gap = plain_logprobs(model, chosen) - plain_logprobs(model, rejected)
    loss = -logsigmoid(BETA * (gap - ref_gap)).mean()
    loss.backward()
    return float(loss.detach())


def plain_rm(model: PreTrainedModel, pairs: list[Pair], runtime: Runtime) -> float:
    ids, mask, _ = plain_batch(both_sides(pairs), runtime.device)
    with runtime.autocast():
        chosen, rejected = model(ids, attention_mask=mask).logits[:, 0].float().chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def transformers_rollout(
    model: GPT2LMHeadModel, prompts: Prompts, new_tokens: int, runtime: Runtime, *, together: bool
) -> None:
    """Write by transformers' `generate`: all prompts together, or one by one."""
    for group in [prompts] if together else [[prompt] for prompt in prompts]:
        rows = [torch.tensor(prompt) for prompt in group]
        ids = pad_sequence(rows, batch_first=True, padding_value=EOS, padding_side="left")
        ones = [torch.ones_like(row) for row in rows]
        with runtime.autocast():
            model.generate(
                input_ids=ids.to(runtime.device),
                attention_mask=pad_sequence(ones, batch_first=True, padding_side="left").to(
                    runtime.device
                ),
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=EOS,
                eos_token_id=EOS,
            )
