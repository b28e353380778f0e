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
import run_sft
from benchmarks.measuring import EOS, Pair
from rlhf.batches import build_batch, micro_batches, sample_length
from rlhf.generation import generate
from rlhf.losses import pairwise_reward_loss
from rlhf.models import reward_logits
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.tokens import Sample

BETA = 0.2
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
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    total = torch.zeros((), device=runtime.device)
    for part in micro_batches([sample_length(sample) for sample in samples], 0):
        batch = build_batch(samples[part], EOS).to(runtime.device)
        loss = run_sft.summed_loss(model, batch, runtime) / num_tokens
        loss.backward()
        total += loss.detach()
    return float(total)


def our_dpo(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair], runtime: Runtime
) -> float:
    pairs = sorted(pairs, key=row_length)
    settings = argparse.Namespace(micro_batch_size=0)
    ref_logprobs = run_dpo.all_logprobs(reference, pairs, EOS, settings, runtime)
    lengths = [row_length(pair) for pair in pairs]
    total = torch.zeros((), device=runtime.device)
    for part in micro_batches(lengths, 0, sequences_per_row=2):
        logprobs = run_dpo.pair_logprobs(model, pairs[part], EOS, runtime)
        terms = run_dpo.preference_terms(logprobs, ref_logprobs[part], BETA)
        loss = terms["loss"].sum() / len(pairs)
        loss.backward()
        total += loss.detach()
    return float(total)


def our_rm(model: PreTrainedModel, pairs: list[Pair], runtime: Runtime) -> float:
    pairs = sorted(pairs, key=row_length)
    lengths = [row_length(pair) for pair in pairs]
    total = torch.zeros((), device=runtime.device)
    for part in micro_batches(lengths, 0, sequences_per_row=2):
        batch = build_batch(both_sides(pairs[part]), EOS).to(runtime.device)
        with runtime.autocast():
            logits = reward_logits(model, batch, eos_id=EOS)
        loss = pairwise_reward_loss(*logits.chunk(2)).sum() / len(pairs)
        loss.backward()
        total += loss.detach()
    return float(total)


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
        eos_id=EOS,
        early_end_ids=[EOS],
    )
    with runtime.autocast():
        rollout = generate(
            model,
            prompts,
            sampling=sampling,
            noise_key=(0, step),
            rows=range(len(prompts)),
            micro_batch_size=0,
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
