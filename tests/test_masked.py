"""Means over real tokens, against values worked by hand."""

import pytest
import torch

from rlhf.masked import masked_mean, masked_sum, masked_whiten, require_same_shape

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, float("nan")]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_masked_mean_leaves_out_padding():
    assert masked_sum(X, MASK) == 10.0
    assert masked_mean(X, MASK) == 2.5
    assert masked_mean(X, torch.zeros_like(MASK)) == 0.0


@pytest.mark.claim(15)
def test_whitening_is_over_the_mask_with_unbiased_variance():
    # 1, 2, 3, 4: mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3
    white = masked_whiten(X, MASK)
    expected = (torch.tensor([1.0, 2.0, 3.0, 4.0]) - 2.5) / (5 / 3) ** 0.5
    torch.testing.assert_close(white[MASK], expected)
    assert white[~MASK].tolist() == [0.0, 0.0]


@pytest.mark.claim(15)
def test_padding_never_changes_a_whitened_advantage():
    more = torch.cat((X, torch.full((2, 3), 1e6)), dim=1)
    more_mask = torch.cat((MASK, torch.zeros(2, 3, dtype=torch.bool)), dim=1)
    assert torch.equal(masked_whiten(more, more_mask)[:, :3], masked_whiten(X, MASK))


@pytest.mark.claim(15)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
def test_equal_advantages_whiten_to_zero(value):
    x = torch.full((4, 7), value)
    assert masked_whiten(x, torch.ones(4, 7, dtype=torch.bool)).abs().max() <= 1e-6


def test_one_real_token_whitens_to_zero():
    assert masked_whiten(X, MASK & (X == 4.0))[1, 0] == 0.0


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"scores \(2,\), kl \(2, 3\)"):
        require_same_shape(scores=torch.zeros(2), kl=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="differ"):
        masked_mean(torch.zeros(3), MASK)
