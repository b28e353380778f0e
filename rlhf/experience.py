"""EXPERIENCE: a rollout as the models see it, token by token.

Old logprobs come from the forward that is trained, never from the sampler's cached one, which
rounds differently; and they are taken over the tokens that could have been sampled.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from rlhf.actors import Actors
from rlhf.batches import Batch, Room, micro_batches_by_length
from rlhf.errors import RunError
from rlhf.generation import generate
from rlhf.heads import head_of
from rlhf.logprobs import Support, sequence_logprobs, token_logprobs, token_stats
from rlhf.masked import masked_mean
from rlhf.models import response_states
from rlhf.processes import join_rows, most_of_processes, num_processes
from rlhf.responses import Rollout
from rlhf.tokens import decode_response


class Numbers(NamedTuple):
    """What is known of each response token before an update, (B, R) each."""

    logprobs: Tensor  # of the policy, over the support it sampled from
    entropy: Tensor
    kept_mass: Tensor
    ref_logprobs: Tensor  # of the reference, over the whole vocabulary
    values: Tensor  # 0 without a critic

    @property
    def kl(self) -> Tensor:
        """Signed log-ratio of policy to reference, an estimate (k1) of their KL: (B, R) nats."""
        return self.logprobs - self.ref_logprobs


class Penalty(nn.Module):
    """The weight of the KL penalty, which is part of a run's state where it follows the KL."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))


class Experience(NamedTuple):
    """A rollout and what an update learns from it; (B, R) each, where nothing else is said."""

    rollout: Rollout
    numbers: Numbers
    scores: Tensor  # (B,)
    normalized: Tensor  # (B,)  the scores in the units of the rewards
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None  # None without a critic
    learning_rate: Tensor  # ()  of the first optimiser step

    @property
    def mask(self) -> Tensor:
        """Which response tokens are real: (B, R) bool."""
        return self.rollout.batch.response_mask

    def tensors(self) -> dict[str, Tensor]:
        """Give everything as named tensors, which `of` takes."""
        parts: dict[str, Any] = {
            "batch": self.rollout.batch,
            "rollout": self.rollout,
            "numbers": self.numbers,
            "experience": self,
        }
        if self.rollout.support is not None:
            parts["support"] = self.rollout.support
        return {
            f"{name}.{field}": torch.as_tensor(value)
            for name, part in parts.items()
            for field, value in part._asdict().items()
            if isinstance(value, Tensor | int)
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Experience | None":
        """Put together what `tensors` gave; None of nothing."""
        if not tensors:
            return None

        def part(kind: Any, name: str, **others: Any) -> Any:
            fields = {field: tensors.get(f"{name}.{field}") for field in kind._fields}
            return kind(**{**fields, **others})

        support = None  # after greedy decoding
        if (least := tensors.get("support.min_gen_len")) is not None:
            support = part(Support, "support", min_gen_len=int(least))
        rollout = part(Rollout, "rollout", batch=part(Batch, "batch"), support=support)
        return part(cls, "experience", rollout=rollout, numbers=part(Numbers, "numbers"))


def roll_out(
    actors: Actors,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    noise_key: tuple[int, int],
    room: Room,
) -> Rollout:
    """Write a response to each of some prompts, which `rows` names for the sampling noise."""
    with actors.runtime.autocast():
        return generate(
            actors.policy,
            prompts,
            sampling=actors.sampling,
            noise_key=noise_key,
            rows=rows,
            room=room,
        )


def decode_responses(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """Give the responses as people and reward functions see them."""
    return [
        decode_response(tokenizer, ids[:-1] if ended else ids)
        for ids, ended in zip(rollout.responses(), rollout.ended.tolist(), strict=True)
    ]


def policy_forward(
    actors: Actors, rollout: Rollout, rows: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:  # logprobs (B, R), values (B, R)
    """Run the forward that is trained on a micro-batch, which holds these rows of the rollout."""
    with actors.runtime.autocast():
        states = response_states(actors.policy, batch)  # (B, R, D)
        values = actors.critic(states, batch) if actors.critic else torch.zeros(())
    logprobs = token_logprobs(
        states,
        batch.response_ids,
        batch.response_mask,
        head_of(actors.policy),
        temperature=actors.sampling.temperature,
        support=rollout.support_of(rows, batch),
    )
    return logprobs, values


@torch.no_grad()
def token_numbers(actors: Actors, rollout: Rollout, room: Room) -> Numbers:
    """Compute, once, what the update needs to know of every response token."""
    everything = range(len(rollout.ended))
    shape = (len(Numbers._fields), *rollout.batch.response_mask.shape)
    numbers = torch.zeros(shape, device=actors.runtime.device)
    temperature = actors.sampling.temperature
    head = head_of(actors.policy)
    ref_head = head_of(actors.ref_policy or actors.policy)
    for rows, batch in micro_batches_by_length(rollout.batch, everything, room):
        ids, mask = batch.response_ids, batch.response_mask
        with actors.runtime.autocast():
            states = response_states(actors.policy, batch)  # (B, R, D)
            with actors.reference() as ref_policy:
                ref_states = response_states(ref_policy, batch)  # (B, R, D)
            values = actors.critic(states, batch) if actors.critic else torch.zeros(ids.shape)
        support = rollout.support_of(rows, batch)
        stats = token_stats(states, ids, mask, head, temperature=temperature, support=support)
        ref_logprobs = token_logprobs(ref_states, ids, mask, ref_head, temperature=temperature)
        numbers[:, rows, : ids.shape[1]] = torch.stack(
            (*stats, ref_logprobs, values.to(ids.device))
        )
    return Numbers(*numbers)


def join_processes(
    rollout: Rollout,
    numbers: Numbers,
    scores: Tensor,  # (B of this process,)
    *,
    size: int,
) -> tuple[Rollout, Numbers, Tensor]:
    """Put together a rollout of which each process has written its share: B is `size` in all."""
    if num_processes() == 1:
        return rollout, numbers, scores
    batch, support, device = rollout.batch, rollout.support, scores.device
    kept_ids = support.kept_ids if support else None
    sizes = [batch.prompt_ids.shape[1], batch.response_ids.shape[1]]
    sizes += [0 if kept_ids is None else kept_ids.shape[2]]
    prompt_width, width, num_kept = most_of_processes(sizes, device)

    def join(x: Tensor, *missing: int, fill: int = 0) -> Tensor:  # `missing` as in `pad`
        return join_rows(pad(x, missing, value=fill), size)

    left, right = prompt_width - sizes[0], width - sizes[1]
    if support is not None and kept_ids is not None:
        joined = join(kept_ids, 0, num_kept - sizes[2], 0, right, fill=-1)
        support = support._replace(kept_ids=joined)
    whole = Batch(
        join(batch.prompt_ids, left, 0),
        join(batch.prompt_mask, left, 0),
        join(batch.response_ids, 0, right),
        join(batch.response_mask, 0, right),
    )
    logprobs = join(rollout.logprobs, 0, right)
    rollout = Rollout(whole, support, logprobs, join(rollout.ended))
    return rollout, Numbers(*(join(x, 0, right) for x in numbers)), join(scores)


@torch.no_grad()
def check_ratio_is_one(actors: Actors, rollout: Rollout, numbers: Numbers, room: Room) -> None:
    """Stop unless sampler, old and new logprobs agree before the first update.

    Dropout, another temperature or another set of tokens in one of them would let the run go on
    with a ratio that means nothing.

    Raises: RunError, naming the two that differ.
    """
    mask, tolerance = rollout.batch.response_mask, actors.runtime.tolerance
    actors = actors._replace(critic=None)
    new = torch.zeros_like(numbers.logprobs)
    everything = range(len(mask))
    for rows, batch in micro_batches_by_length(rollout.batch, everything, room):
        new[rows, : batch.response_ids.shape[1]] = policy_forward(actors, rollout, rows, batch)[0]
    compared = {"new policy to old policy": (new, numbers.logprobs)}
    if rollout.support is not None:
        compared["old policy to sampler"] = (numbers.logprobs, rollout.logprobs)
    for name, (numerator, denominator) in compared.items():
        log_ratios = (numerator - denominator)[mask]
        if actors.runtime.precision == "float32":
            error = float(torch.expm1(log_ratios).abs().max())
        else:
            # Single ratios differ by rounding. Their mean is 1 whatever is wrong, since they are
            # ratios of two distributions; the mean of their logs is not, beyond its own error.
            noise = log_ratios.std(correction=0) / len(log_ratios) ** 0.5
            error = float(log_ratios.mean().abs() - 3 * noise)
        if not error <= tolerance:
            raise RunError(
                f"before the first update the ratio of {name} is off 1 by {error:.2g} (allowed:"
                f" {tolerance:g}): the model does not give the same numbers twice"
            )


def rollout_metrics(experience: Experience, *, max_kl_div: float) -> dict[str, Tensor]:
    """What a rollout tells of policy and critic, under TRL's names where it has one.

    `objective/*` are sums over a response, averaged over responses.
    """
    rollout, numbers, scores, normalized, rewards, _, returns, _ = experience
    mask, ended = rollout.batch.response_mask, rollout.ended
    kl = sequence_logprobs(numbers.kl, mask)  # (B,)
    # k3 estimates the same KL, as long as no token is cut off, and is never negative; but as a
    # reward it would have another optimum.
    k3 = sequence_logprobs(torch.expm1(-numbers.kl) + numbers.kl, mask)  # (B,)
    seen = {
        "objective/kl": kl.mean(),
        "objective/kl_k3": k3.mean(),
        "objective/entropy": -sequence_logprobs(numbers.logprobs, mask).mean(),
        "objective/scores": scores.mean(),
        "objective/non_score_reward": (rewards.sum(dim=1) - normalized).mean(),
        "objective/rlhf_reward": rewards.sum(dim=1).mean(),
        "policy/entropy_avg": masked_mean(numbers.entropy, mask),
        "kept_mass": masked_mean(numbers.kept_mass, mask),
        "guarded_kl": masked_mean((numbers.kl.abs() > max_kl_div).float(), mask),
        "val/num_eos_tokens": ended.sum(),
        "eos_rate": ended.float().mean(),
        "response_length": mask.sum(dim=1).float().mean(),
    }
    if returns is not None:
        seen["explained_variance"] = explained_variance(numbers.values, returns, mask)
    return seen


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the returns (B, R) that the critic foresaw.

    1 is perfect, 0 no better than a constant, less than 0 worse; nan if all returns are equal.
    """
    variance = returns[mask].var(correction=0)
    share = 1 - (returns - values)[mask].var(correction=0) / variance
    return torch.where(variance > 0, share, torch.nan)
