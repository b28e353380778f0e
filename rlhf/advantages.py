"""From scores and KL to rewards of tokens, and from these to advantages."""

import torch
from torch import Tensor

from rlhf.masked import require_same_shape


def token_rewards(
    scores: Tensor,  # (B,)
    kl: Tensor,  # (B, R)  old_logprobs - ref_logprobs, in nats
    mask: Tensor,  # (B, R) bool, True on real response tokens, EOS included
    *,
    beta: float,
    max_kl_div: float,
) -> Tensor:  # (B, R)
    """Reward of each response token: the KL penalty on every one, the score on the last.

        r_t = -beta * clip(kl_t, -max_kl_div, max_kl_div) + [t is the last token] * score

    The signed difference of logprobs is an unbiased estimate of the KL divergence (k1). Single
    terms are often negative; to clamp them at 0 would punish the policy where it is *less* sure
    than the reference. `max_kl_div` only guards against single absurd terms, on both sides alike.

    Source: InstructGPT, 2203.02155, equation 2; Ziegler et al., 1909.08593, equation 2.
    Raises: ValueError if the shapes do not fit.

    >>> token_rewards(torch.tensor([2.0]), torch.tensor([[1.0, -3.0, 9.0]]),
    ...               torch.tensor([[True, True, False]]), beta=0.5, max_kl_div=2.0)
    tensor([[-0.5000,  3.0000,  0.0000]])
    """
    require_same_shape(kl=kl, mask=mask)
    require_same_shape(scores=scores, first_column=kl[:, 0])
    rewards = torch.where(mask, -beta * kl.clamp(-max_kl_div, max_kl_div), 0.0)  # (B, R)
    last = mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(
    rewards: Tensor,  # (B, R)
    values: Tensor,  # (B, R)  V(s_t), before the t-th response token is chosen
    mask: Tensor,  # (B, R) bool, True on real response tokens, EOS included
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # advantages (B, R), returns (B, R)
    """Generalised advantage estimation over the real tokens of each response.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * A_{t+1}
        R_t     = A_t + V_t

    The state after a response's last token is worth 0, and so is everything in the padding: it
    changes no advantage. `gae_lambda` 1 is the Monte-Carlo return minus V, 0 the one-step error.

    Source: 1506.02438, equations 11 and 16.
    Raises: ValueError if the shapes differ.

    >>> advantages, returns = gae(
    ...     torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 7.0]]),
    ...     torch.tensor([[True, True, False]]), gamma=1.0, gae_lambda=0.5)
    >>> advantages
    tensor([[0.1250, 0.7500, 0.0000]])
    >>> returns
    tensor([[0.6250, 1.0000, 0.0000]])
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values
