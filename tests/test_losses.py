"""The objectives, against values worked by hand and their own definitions in float64."""

import math

import pytest
import torch

from rlhf.losses import (
    cdpo_loss,
    centering_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    margin_reward_loss,
    pairwise_reward_loss,
    ppo_policy_loss,
    regression_reward_loss,
    rrhf_loss,
    simpo_loss,
    value_loss,
)
from rlhf.masked import masked_sum


@pytest.mark.claim(16)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # at the start: the plain policy gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # gone far enough up: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # gone the wrong way: not clipped
        (0.5, -2.0, 1.6, 0.0),  # gone far enough down
        (1.5, -2.0, 3.0, 3.0),  # the wrong way
    ],
)
def test_clipped_surrogate_and_its_gradient(ratio, advantage, loss, gradient):
    old = torch.tensor([-0.7])
    logprobs = (old + math.log(ratio)).requires_grad_()
    losses = ppo_policy_loss(logprobs, old, torch.tensor([advantage]), epsilon=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-5)
    assert logprobs.grad.item() == pytest.approx(
        gradient, abs=1e-5
    )  # d/dlogprob = ratio * d/dratio


@pytest.mark.claim(16)
def test_value_loss_is_pessimistic_when_clipped():
    values, old, returns = torch.tensor([[2.0], [0.2]]), torch.zeros(2, 1), torch.ones(2, 1)
    plain = value_loss(values, old, returns, value_clip=0.0)
    assert plain.flatten().tolist() == pytest.approx([0.5, 0.32])
    # The first is clipped to 0.5, no farther off: max(1, 0.25) / 2; the second is inside.
    clipped = value_loss(values, old, returns, value_clip=0.5)
    assert clipped.flatten().tolist() == pytest.approx([0.5, 0.32])
    overshot = value_loss(torch.tensor([1.0]), torch.zeros(1), torch.ones(1), value_clip=0.5)
    assert overshot.item() == pytest.approx(0.125)


@pytest.mark.claim(14)
def test_padding_never_changes_a_ppo_loss():
    rng = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 2, 4, generator=rng)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    junk = torch.where(mask, 0.0, torch.tensor(float("inf")))
    clean = masked_sum(ppo_policy_loss(new, old, advantages, epsilon=0.2), mask)
    dirty = masked_sum(ppo_policy_loss(new + junk, old, advantages, epsilon=0.2), mask)
    assert torch.equal(clean, dirty)


@pytest.mark.claim(21)
def test_dpo_loss_worked_by_hand():
    losses = dpo_loss(
        torch.tensor([-10.0, -3.0]),
        torch.tensor([-12.0, -3.0]),
        torch.tensor([-11.0, -3.0]),
        torch.tensor([-11.0, -3.0]),
        beta=0.5,
    )
    # 0.5 * ((-10 + 11) - (-12 + 11)) = 1, and 0
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)], abs=1e-6)


@pytest.mark.claim(21)
def test_dpo_pulls_chosen_up_and_rejected_down():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.3).sum().backward()
    # d/dx -log sigmoid(beta x) = -beta / 2 at x = 0
    assert chosen.grad.item() == pytest.approx(-0.15)
    assert rejected.grad.item() == pytest.approx(0.15)


@pytest.mark.claim(21)
@pytest.mark.parametrize("gap", [-400.0, 400.0])
def test_preference_losses_stay_finite_far_out(gap):
    x = torch.tensor([gap], requires_grad=True)
    zero = torch.zeros(1)
    losses = dpo_loss(x, zero, zero, zero, beta=1.0)
    losses.sum().backward()
    assert losses.item() == pytest.approx(max(-gap, 0.0))
    assert x.grad.item() == pytest.approx(-1.0 if gap < 0 else 0.0)
    assert pairwise_reward_loss(x, zero).item() == pytest.approx(max(-gap, 0.0))


def slope_at(loss, margin, **options):
    """d loss / d margin of a loss that looks at the difference of four logprobs."""
    margin = torch.tensor([margin], requires_grad=True)
    zero = torch.zeros(1)
    loss(margin, zero, zero, zero, **options).sum().backward()
    return margin.grad.item()


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, hinge_loss])
def test_four_logprobs_make_one_margin(loss):
    # (-10 + 11) - (-12 + 12.5) = 0.5, however it comes about
    four = torch.tensor([[-10.0], [-12.0], [-11.0], [-12.5]])
    same = torch.tensor([[0.5], [0.0], [0.0], [0.0]])
    assert loss(*four, beta=0.4).item() == pytest.approx(loss(*same, beta=0.4).item(), abs=1e-6)


def test_cdpo_is_least_where_the_odds_are_those_of_the_noise():
    options = {"beta": 0.5, "label_smoothing": 0.2}
    # A margin of 2 ln 4: sigmoid(ln 4) = 0.8 = 1 - 0.2.
    assert slope_at(cdpo_loss, 2 * math.log(4), **options) == pytest.approx(0.0, abs=1e-6)
    assert slope_at(cdpo_loss, 2.0, **options) < 0 < slope_at(cdpo_loss, 4.0, **options)
    zero, two = torch.zeros(1), torch.full((1,), 2.0)
    # 0.8 * ln(1 + e^-1) + 0.2 * ln(1 + e) = 0.8 * 0.313262 + 0.2 * 1.313262
    assert cdpo_loss(two, zero, zero, zero, **options).item() == pytest.approx(0.513262, abs=1e-5)
    certain = cdpo_loss(two, zero, zero, zero, beta=0.5, label_smoothing=0.0)
    assert torch.equal(certain, dpo_loss(two, zero, zero, zero, beta=0.5))


def test_ipo_wants_its_margin_and_no_more():
    # The margin that beta 0.25 asks for is 2: 2 * (x - 2) is the slope at x.
    assert slope_at(ipo_loss, 2.0, beta=0.25) == 0.0
    assert slope_at(ipo_loss, 1.5, beta=0.25) == pytest.approx(-1.0)
    assert slope_at(ipo_loss, 5.0, beta=0.25) == pytest.approx(6.0)
    zero = torch.zeros(1)
    assert ipo_loss(zero, zero, zero, zero, beta=0.25).item() == pytest.approx(4.0)


def test_hinge_leaves_pairs_alone_that_are_won():
    assert slope_at(hinge_loss, 4.9, beta=0.2) == pytest.approx(-0.2)
    assert slope_at(hinge_loss, 5.1, beta=0.2) == 0.0
    assert slope_at(hinge_loss, -30.0, beta=0.2) == pytest.approx(-0.2)
    zero = torch.zeros(1)
    assert hinge_loss(zero - 1, zero, zero, zero, beta=0.2).item() == pytest.approx(1.2)


def test_simpo_worked_by_hand():
    chosen, rejected = torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -0.5])
    losses = simpo_loss(chosen, rejected, beta=2.0, simpo_gamma=1.0)
    # -log sigmoid(2 * 1 - 1) and -log sigmoid(2 * -0.5 - 1) = ln(1 + e^2)
    assert losses.tolist() == pytest.approx([0.313262, 2.126928], abs=1e-5)


def test_rrhf_asks_for_the_right_order_alone():
    better, worse = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.2, -1.5])
    losses = rrhf_loss(better, worse)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.5]
    assert better.grad.tolist() == [0.0, -1.0]


def test_margin_and_centre_of_reward_models_worked_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5])
    losses = margin_reward_loss(chosen, rejected, torch.tensor([2.0, 0.0]))
    # -log sigmoid(1 - 2) = ln(1 + e), and ln 2
    assert losses.tolist() == pytest.approx([1.313262, 0.693147], abs=1e-5)
    assert centering_loss(chosen, rejected).tolist() == [9.0, 1.0]


@pytest.mark.claim(6)
def test_reward_losses_worked_by_hand():
    assert pairwise_reward_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(
        math.log(1 + math.exp(-1)), abs=1e-6
    )
    errors = regression_reward_loss(torch.tensor([3.0, 1.0]), torch.tensor([5.0, 1.5]))
    assert errors.tolist() == [4.0, 0.25]


def test_losses_refuse_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="differ"):
        ppo_policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), epsilon=0.2)
    with pytest.raises(ValueError, match="differ"):
        value_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), value_clip=0.0)
    with pytest.raises(ValueError, match="differ"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2), beta=0.1)
    with pytest.raises(ValueError, match="differ"):
        margin_reward_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="differ"):
        simpo_loss(torch.zeros(2), torch.zeros(1), beta=1.0, simpo_gamma=0.0)
    with pytest.raises(ValueError, match="differ"):
        rrhf_loss(torch.zeros(2), torch.zeros(1))
