"""Best of n, computed: what no policy has to be trained for."""

import torch
from torch import Tensor


def best_of_n(
    logprobs: Tensor,  # (N,)
    rewards: Tensor,  # (N,)
    *,
    n: int,
) -> Tensor:  # (N,)
    """Log-probabilities of the best of `n` independent responses; equals are drawn by lot.

        q(y) = p(y) * (F(r)^n - F(r-)^n) / (F(r) - F(r-)),  r = r(y)

    F(r) is the chance of a reward of at most r, F(r-) of one below r. The fraction is computed as
    the sum of F(r)^k * F(r-)^(n-1-k) over k < n, which needs no difference of near equals. The KL
    divergence from p is at most log n - (n - 1) / n.

    Source: order statistics; the bound: Beirami et al., 2401.01879.

    >>> p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    >>> q = best_of_n(p, torch.tensor([0.0, 1.0, 1.0]), n=2)  # 0 if both draws are 0: 1/4
    >>> [round(float(mass), 4) for mass in q.exp()]
    [0.25, 0.375, 0.375]
    """
    levels, level_of = rewards.unique(return_inverse=True)  # (L,) rising, (N,)
    mass = logprobs.new_zeros(len(levels)).index_add(0, level_of, logprobs.exp())
    at_most = mass.cumsum(dim=0)  # (L,)
    below = torch.cat((mass.new_zeros(1), at_most[:-1]))
    weights = sum(at_most**k * below ** (n - 1 - k) for k in range(n))
    assert isinstance(weights, Tensor)
    return logprobs + weights.log()[level_of]
