"""Statistics over the tokens that count. A mask is True where a token counts."""

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Stop before a silent broadcast: (B,) against (B, R) would run, and be wrong.

    Raises: ValueError, naming each tensor and its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` over the mask. What lies outside may be anything, NaN included.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    require_same_shape(x=x, mask=mask)
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the mask; 0 where the mask is empty.

    >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale `x` to mean 0 and variance 1 over the mask; 0 outside it.

        (x - mean) * rsqrt(var + 1e-8),  var unbiased

    Source: "The N implementation details of RLHF with PPO". Equal values whiten to 0.

    >>> x = torch.tensor([[1.0, 3.0], [5.0, 77.0]])
    >>> masked_whiten(x, torch.tensor([[True, True], [True, False]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    # In float64, since the mean of equal float32 values is off by a rounding error, and a variance
    # made of nothing but that error would be blown up to a signal.
    x64 = torch.where(mask, x, 0.0).double()
    centred = torch.where(mask, x64 - masked_mean(x64, mask), 0.0)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return (centred * torch.rsqrt(variance + 1e-8)).to(x.dtype)
