"""The objectives: one pure function for each equation. Losses come back unreduced."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

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


def margin_reward_loss(
    chosen_scores: Tensor,  # (B,)  logits
    rejected_scores: Tensor,  # (B,)
    margins: Tensor,  # (B,)  how much better the chosen one is, at least 0
) -> Tensor:  # (B,)
    """Pairwise loss that asks for more than the right order, where the difference is large.

        -log sigmoid(r(x, y_chosen) - r(x, y_rejected) - margin)

    Source: Llama 2, 2307.09288, equation 2. A margin of 0 is the plain pairwise loss.

    >>> margin_reward_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0]))
    tensor([0.6931])
    """
    require_same_shape(chosen_scores=chosen_scores, margins=margins)
    return pairwise_reward_loss(chosen_scores - margins, rejected_scores)


def centering_loss(
    chosen_scores: Tensor,  # (B,)  logits
    rejected_scores: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """Hold the mean of the scores at 0, which differences alone leave free.

        (r(x, y_chosen) + r(x, y_rejected))^2

    Source: Eisenstein et al., 2312.09244, equation 2. Usual weight: 0.01.

    >>> centering_loss(torch.tensor([3.0, 2.0]), torch.tensor([1.0, -2.0]))
    tensor([16.,  0.])
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    return (chosen_scores + rejected_scores).square()


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
    margins = log_ratio_margins(
        policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    )
    return -logsigmoid(beta * margins)


def log_ratio_margins(
    policy_chosen_logprobs: Tensor,  # (B,)
    policy_rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """How much more the policy has moved towards the chosen than towards the rejected response.

        (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))

    >>> log_ratio_margins(*torch.tensor([[-1.0], [-4.0], [-2.0], [-2.5]]))
    tensor([2.5000])
    """
    require_same_shape(
        policy_chosen=policy_chosen_logprobs,
        policy_rejected=policy_rejected_logprobs,
        ref_chosen=ref_chosen_logprobs,
        ref_rejected=ref_rejected_logprobs,
    )
    chosen_log_ratios = policy_chosen_logprobs - ref_chosen_logprobs
    return chosen_log_ratios - (policy_rejected_logprobs - ref_rejected_logprobs)


def cdpo_loss(
    policy_chosen_logprobs: Tensor,  # (B,)  sums over the response tokens
    policy_rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:  # (B,)
    """DPO for labels of which a share is wrong (conservative DPO).

        (1 - label_smoothing) * dpo(chosen, rejected) + label_smoothing * dpo(rejected, chosen)

    Its minimum lies at the finite margin where sigmoid(beta * margin) = 1 - label_smoothing.

    Source: Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (cDPO).
    `label_smoothing` lies in [0, 0.5).

    >>> cdpo_loss(*torch.tensor([[-1.0], [-2.0], [0.0], [0.0]]), beta=1.0, label_smoothing=0.25)
    tensor([0.5633])
    """
    chosen = policy_chosen_logprobs, ref_chosen_logprobs
    rejected = policy_rejected_logprobs, ref_rejected_logprobs
    right = dpo_loss(chosen[0], rejected[0], chosen[1], rejected[1], beta=beta)
    wrong = dpo_loss(rejected[0], chosen[0], rejected[1], chosen[1], beta=beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(
    policy_chosen_logprobs: Tensor,  # (B,)  means over the response tokens
    policy_rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> Tensor:  # (B,)
    """Identity preference optimisation: a margin to reach and not to exceed.

        (margin - 1 / (2 * beta))^2,  margin as in DPO, of means instead of sums

    Source: 2310.12036, equation 17, whose tau is `beta`. It is 1 / (4 beta^2) while policy and
    reference are the same.

    >>> ipo_loss(*torch.tensor([[-1.0], [-1.5], [-1.0], [-1.0]]), beta=0.5)
    tensor([0.2500])
    """
    margins = log_ratio_margins(
        policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    )
    return (margins - 1 / (2 * beta)).square()


def hinge_loss(
    policy_chosen_logprobs: Tensor,  # (B,)  sums over the response tokens
    policy_rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> Tensor:  # (B,)
    """DPO's margin under a hinge: a pair that is won by 1 / beta teaches nothing more.

        max(0, 1 - beta * margin),  margin as in DPO

    Source: RSO, 2309.06657 (its hinge-norm; SLiC, 2305.10425, without a reference). It is 1 while
    policy and reference are the same.

    >>> same = torch.tensor([-1.0, -1.0])
    >>> hinge_loss(same, torch.tensor([-2.0, -9.0]), same, same, beta=0.2)
    tensor([0.8000, 0.0000])
    """
    margins = log_ratio_margins(
        policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    )
    return relu(1 - beta * margins)


def simpo_loss(
    policy_chosen_logprobs: Tensor,  # (B,)  means over the response tokens
    policy_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    simpo_gamma: float,
) -> Tensor:  # (B,)
    """Simple preference optimisation: the mean logprob is the reward, and there is no reference.

        -log sigmoid(beta * (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - gamma)

    Source: 2405.14734, equation 6. Usual `beta`: 2 to 2.5; gamma: about half of it.

    >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, simpo_gamma=1.0)
    tensor([0.6931])
    """
    require_same_shape(chosen=policy_chosen_logprobs, rejected=policy_rejected_logprobs)
    return -logsigmoid(beta * (policy_chosen_logprobs - policy_rejected_logprobs) - simpo_gamma)


def rrhf_loss(
    better_logprobs: Tensor,  # (N,)  means over the response tokens, of N pairs of responses
    worse_logprobs: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """Ranking part of RRHF: a better response should be likelier, by a token, than a worse one.

        max(0, p(worse) - p(better)),  p(y) = log pi(y) / |y|

    Source: 2304.05302, equation 2: summed over the pairs of a prompt's responses, to which it adds
    the cross-entropy of the best one.

    >>> rrhf_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5]))
    tensor([0.0000, 0.5000])
    """
    require_same_shape(better_logprobs=better_logprobs, worse_logprobs=worse_logprobs)
    return relu(worse_logprobs - better_logprobs)
