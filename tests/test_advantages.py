"""Rewards of tokens and advantages, against loops in float64 and values worked by hand."""

import itertools

import pytest
import torch

from rlhf.advantages import adaptive_beta, dr_grpo, gae, grpo, rloo, token_rewards


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


GROUP = torch.tensor([[1.0, 2.0, 6.0, 3.0]])  # mean 3, deviations -2, -1, 3, 0
BY_HAND = {
    rloo: [1 - 11 / 3, 2 - 10 / 3, 6 - 6 / 3, 3 - 9 / 3],
    dr_grpo: [-2.0, -1.0, 3.0, 0.0],
    # The sum of squares is 14, over N - 1 = 3: std 2.1602469.
    grpo: [-2 / 2.1603469, -1 / 2.1603469, 3 / 2.1603469, 0.0],
}


@pytest.mark.parametrize("relative", BY_HAND, ids=lambda f: f.__name__)
def test_relative_advantages_worked_by_hand(relative):
    assert relative(GROUP)[0].tolist() == pytest.approx(BY_HAND[relative], abs=1e-6)


@pytest.mark.parametrize("relative", BY_HAND, ids=lambda f: f.__name__)
def test_relative_advantages_of_a_prompt_sum_to_0(relative):
    totals = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) + 3
    assert relative(totals).sum(dim=1).abs().max() < 1e-5


@pytest.mark.claim(15)
@pytest.mark.parametrize("relative", BY_HAND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("num_responses", [2, 3, 7, 16])
def test_equal_responses_have_no_advantage_and_no_noise(relative, num_responses):
    for value in (0.1, -3.3, 1906.2):
        assert not relative(torch.full((2, num_responses), value)).any()


@pytest.mark.claim(14)
@pytest.mark.parametrize("relative", BY_HAND, ids=lambda f: f.__name__)
def test_other_prompts_never_change_a_relative_advantage(relative):
    totals = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    together = relative(totals)
    assert all(torch.equal(together[[b]], relative(totals[[b]])) for b in range(6))


@pytest.mark.claim(14)
@pytest.mark.parametrize("relative", BY_HAND, ids=lambda f: f.__name__)
def test_padding_never_changes_a_relative_advantage(relative):
    def of(width):
        rng = torch.Generator().manual_seed(2)
        mask = torch.arange(9) < torch.randint(1, 10, (8, 1), generator=rng)
        kl = torch.randn(8, 9, generator=rng).masked_fill(~mask, torch.nan)
        kl = torch.cat((kl, torch.full((8, width), torch.nan)), dim=1)
        mask = torch.cat((mask, torch.zeros(8, width, dtype=torch.bool)), dim=1)
        scores = torch.randn(8, generator=rng)
        rewards = token_rewards(scores, kl, mask, beta=0.2, max_kl_div=10.0)
        return relative(rewards.sum(dim=1).view(2, 4))

    torch.testing.assert_close(of(5), of(0), atol=1e-5, rtol=0)


LOGITS = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)


def expected_gradient(relative, num_responses):
    """The gradient's mean over every group of answers that a policy of three answers may give."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    total = torch.zeros(3, dtype=torch.float64)
    for group in itertools.product(range(3), repeat=num_responses):
        answers = torch.tensor(group)
        surrogate = (relative(REWARDS[answers][None])[0] * logprobs[answers]).mean()
        (gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        total += logprobs[answers].sum().exp().detach() * gradient
    return total


@pytest.mark.parametrize("num_responses", [2, 3, 4])
def test_the_gradient_without_a_critic_is_unbiased(num_responses):
    logits = LOGITS.clone().requires_grad_()
    (logits.softmax(dim=0) * REWARDS).sum().backward()  # the mean reward itself
    torch.testing.assert_close(expected_gradient(rloo, num_responses), logits.grad)
    shorter = logits.grad * (num_responses - 1) / num_responses
    torch.testing.assert_close(expected_gradient(dr_grpo, num_responses), shorter)
    # Divided by the spread it points elsewhere.
    theirs = expected_gradient(grpo, num_responses)
    assert torch.cosine_similarity(theirs, logits.grad, dim=0) < 0.999


def test_adaptive_beta_worked_by_hand():
    kl = torch.tensor([3.0, 5.4, 6.0, 6.6, 60.0])
    expected = [0.98, 0.99, 1.0, 1.01, 1.02]  # the ends are clipped
    beta = adaptive_beta(torch.tensor(0.5), kl, target_kl=6.0)
    assert beta.tolist() == pytest.approx([0.5 * x for x in expected], abs=1e-6)


def test_adaptive_beta_rests_where_the_kl_is_the_target():
    """A world in which the KL is 3 / beta: beta comes to rest at 3 / 6 from both sides."""
    for start in (0.1, 2.0):
        beta = torch.tensor(start, dtype=torch.float64)
        for _ in range(400):
            beta = adaptive_beta(beta, 3 / beta, target_kl=6.0)
        assert float(beta) == pytest.approx(0.5, abs=1e-6)
