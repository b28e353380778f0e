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


def rloo(
    totals: Tensor,  # (B, N)  rewards of N responses to each of B prompts, KL penalty included
) -> Tensor:  # (B, N)
    """How much better a response is than the others to its prompt: leave one out.

        A_i = x_i - (sum of x_j over j != i) / (N - 1)

    What it is compared with does not depend on the response itself, so that the policy gradient
    stays unbiased without a critic. The advantage of a response holds for each of its tokens.

    Source: 2402.14740. N is at least 2.

    >>> rloo(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    tensor([[-3.0000, -1.5000,  4.5000],
            [ 0.0000,  0.0000,  0.0000]])
    """
    # In float64, where sums of equal float32 values are exact: equal rewards give 0 and not noise.
    x = totals.double()
    others = (x.sum(dim=1, keepdim=True) - x) / (x.shape[1] - 1)  # (B, N)
    return (x - others).to(totals.dtype)


def dr_grpo(
    totals: Tensor,  # (B, N)  as in `rloo`
) -> Tensor:  # (B, N)
    """How much better a response is than the mean of all N to its prompt, itself included.

        A_i = x_i - mean(x)

    It is `rloo` times (N - 1) / N: the same direction, in somewhat shorter steps.

    Source: 2503.20783, section 3.2.

    >>> dr_grpo(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-2., -1.,  3.]])
    """
    x = totals.double()
    return (x - x.mean(dim=1, keepdim=True)).to(totals.dtype)


def grpo(
    totals: Tensor,  # (B, N)  as in `rloo`
) -> Tensor:  # (B, N)
    """`dr_grpo` in units of the spread of a prompt's responses.

        A_i = (x_i - mean(x)) / (std(x) + 1e-4),  std unbiased

    Every prompt on which responses differ at all weighs alike, however little they differ.

    Source: 2402.03300, section 4.1.2, which leaves open how std is taken; unbiased as in TRL.

    >>> grpo(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]])
    """
    x = totals.double()
    centred = x - x.mean(dim=1, keepdim=True)  # (B, N)
    return (centred / (x.std(dim=1, keepdim=True) + 1e-4)).to(totals.dtype)


def adaptive_beta(
    beta: Tensor,  # ()
    kl: Tensor,  # ()  of a rollout: nats per response
    *,
    target_kl: float,
) -> Tensor:  # ()
    """The next rollout's weight of the KL penalty: more if the policy has gone too far, else less.

        beta * (1 + 0.1 * clip(kl / target_kl - 1, -0.2, 0.2))

    A step is 2% at most. beta rests where kl is `target_kl`.

    Source: Ziegler et al., 1909.08593, section 2.2.

    >>> adaptive_beta(torch.tensor(0.5), torch.tensor(6.6), target_kl=6.0)
    tensor(0.5050)
    """
    return beta * (1 + 0.1 * (kl / target_kl - 1).clamp(-0.2, 0.2))
