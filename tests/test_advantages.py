"""Rewards of tokens and advantages, against loops in float64 and values worked by hand."""

import pytest
import torch

from rlhf.advantages import gae, token_rewards


def random_rollout(rows=5, width=9, seed=0):
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=rng)
    lengths = torch.randint(1, width + 1, (rows,), generator=rng)
    mask = torch.arange(width) < lengths[:, None]
    return rewards, values, mask


def slow_gae(rewards, values, mask, gamma, gae_lambda):
    """The definition: a sum of discounted one-step errors, row by row in float64."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(len(rewards)):
        n = int(mask[b].sum())
        r, v = rewards[b, :n].double(), [*values[b, :n].double(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[b, t] = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n))
    return advantages


@pytest.mark.claim(14)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_gae_equals_its_definition(gamma, gae_lambda):
    rewards, values, mask = random_rollout()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    expected = slow_gae(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=0)
    expected_returns = torch.where(mask, expected + values, 0.0)
    torch.testing.assert_close(returns.double(), expected_returns, atol=1e-5, rtol=0)


@pytest.mark.claim(14)
@pytest.mark.parametrize("junk", [0.0, 1e6, float("nan")])
def test_padding_never_changes_an_advantage(junk):
    rewards, values, mask = random_rollout()
    settings = {"gamma": 1.0, "gae_lambda": 0.9}
    clean = gae(rewards, values, mask, **settings)
    padding = torch.full((5, 4), junk)
    wide_rewards = torch.cat((rewards.masked_fill(~mask, junk), padding), dim=1)
    wide_values = torch.cat((values.masked_fill(~mask, junk), padding), dim=1)
    wide_mask = torch.cat((mask, torch.zeros(5, 4, dtype=torch.bool)), dim=1)
    for wide, narrow in zip(
        gae(wide_rewards, wide_values, wide_mask, **settings), clean, strict=True
    ):
        torch.testing.assert_close(wide[:, :9], narrow, atol=1e-6, rtol=0)
        assert wide[:, 9:].abs().max() == 0 and wide[:, :9][~mask].abs().sum() == 0


@pytest.mark.claim(14)
def test_batch_mates_never_change_an_advantage():
    rewards, values, mask = random_rollout()
    together = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.9)
    for b in range(5):
        row = slice(b, b + 1)
        alone = gae(rewards[row], values[row], mask[row], gamma=1.0, gae_lambda=0.9)
        assert torch.equal(together[0][row], alone[0]) and torch.equal(together[1][row], alone[1])


@pytest.mark.claim(13)
def test_score_enters_at_the_last_real_token_only():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(
        torch.tensor([2.0, -1.0]), torch.zeros(2, 3), mask, beta=0.2, max_kl_div=10.0
    )
    assert rewards.tolist() == [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]


@pytest.mark.claim(13)
def test_kl_is_signed_on_every_token_and_guarded_on_both_sides():
    kl = torch.tensor([[0.5, -0.5, 12.0, -12.0, 7.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    rewards = token_rewards(torch.zeros(1), kl, mask, beta=2.0, max_kl_div=10.0)
    assert rewards.tolist() == [[-1.0, 1.0, -20.0, 20.0, 0.0]]


@pytest.mark.claim(13)
def test_mean_signed_kl_estimates_the_divergence():
    old, ref = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    tokens = torch.multinomial(old, 100_000, True, generator=torch.Generator().manual_seed(0))
    kl = (old.log() - ref.log())[tokens]
    rewards = token_rewards(
        torch.zeros(1), kl[None], torch.ones(1, len(kl)).bool(), beta=1.0, max_kl_div=10.0
    )
    exact = (old * (old.log() - ref.log())).sum()
    # The standard error is below 0.002; clamping single terms at 0 would be off by 0.2.
    assert abs(-rewards.mean() - exact) < 0.01


def test_scores_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="differ"):
        token_rewards(
            torch.zeros(1), torch.zeros(2, 3), torch.ones(2, 3).bool(), beta=1.0, max_kl_div=1.0
        )
