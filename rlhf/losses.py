"""The objectives: one pure function for each equation. Losses come back unreduced."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.masked import require_same_shape


def regression_reward_loss(
    rewards: Tensor,  # (B,)
    targets: Tensor,  # (B,)  annotators' scores on the scale of the rewards
) -> Tensor:  # (B,)
    """Squared error of a reward model that predicts the annotators' score itself.

    >>> regression_reward_loss(torch.tensor([2.0, 5.0]), torch.tensor([3.0, 5.0]))
    tensor([1., 0.])
    """
    require_same_shape(rewards=rewards, targets=targets)
    return (rewards - targets).square()


def pairwise_reward_loss(
    chosen_scores: Tensor,  # (B,)  logits
    rejected_scores: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """Negative log-likelihood of the preferences under Bradley and Terry's model.

        -log sigmoid(r(x, y_chosen) - r(x, y_rejected))

    Source: InstructGPT, 2203.02155, equation 1.

    >>> pairwise_reward_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]))
    tensor([0.6931, 0.1269])
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return -logsigmoid(chosen_scores - rejected_scores)


def ppo_policy_loss(
    logprobs: Tensor,  # (B, R)  of the policy that is being trained
    old_logprobs: Tensor,  # (B, R)  of the policy that wrote the responses
    advantages: Tensor,  # (B, R)
    *,
    epsilon: float,
) -> Tensor:  # (B, R)
    """PPO's clipped surrogate, as a loss.

        ratio = exp(logprob - old_logprob)
        -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)

    Once a ratio has left the clip range in the direction that A rewards, its gradient is 0.

    Source: 1707.06347, equation 7. Usual `epsilon`: 0.2.

    >>> ppo_policy_loss(torch.tensor([1.5, 1.5]).log(), torch.zeros(2),
    ...                 torch.tensor([1.0, -1.0]), epsilon=0.2)
    tensor([-1.2000,  1.5000])
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_loss(
    values: Tensor,  # (B, R)
    old_values: Tensor,  # (B, R)  at rollout time
    returns: Tensor,  # (B, R)
    *,
    value_clip: float,
) -> Tensor:  # (B, R)
    """Half the squared error of the critic, pessimistic about moves beyond `value_clip` (0 = off).

        1/2 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)

    Source: "The N implementation details of RLHF with PPO".

    >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), value_clip=0.0)
    tensor([0.5000])
    >>> value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([3.0]), value_clip=1.0)
    tensor([2.])
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    errors = (values - returns).square()
    if value_clip > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return 0.5 * errors


def dpo_loss(
    policy_chosen_logprobs: Tensor,  # (B,)  sums over the response tokens
    policy_rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> Tensor:  # (B,)
    """Direct preference optimisation: Bradley and Terry on the policy's own implicit reward.

        -log sigmoid(beta * ((log pi(chosen) - log ref(chosen))
                             - (log pi(rejected) - log ref(rejected))))

    Source: 2305.18290, equation 7. It is ln 2 while policy and reference are the same.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero, beta=0.1)
    tensor([0.6931])
    >>> dpo_loss(torch.tensor([-1.0]), torch.tensor([-4.0]), zero - 2, zero - 2, beta=1.0)
    tensor([0.0486])
    """
    require_same_shape(
        policy_chosen=policy_chosen_logprobs,
        policy_rejected=policy_rejected_logprobs,
        ref_chosen=ref_chosen_logprobs,
        ref_rejected=ref_rejected_logprobs,
    )
    chosen_logratio = policy_chosen_logprobs - ref_chosen_logprobs
    rejected_logratio = policy_rejected_logprobs - ref_rejected_logprobs
    return -logsigmoid(beta * (chosen_logratio - rejected_logratio))
