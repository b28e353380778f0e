"""Sampling: seeded noise, truncation, and draws with the frequencies asked for."""

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from rlhf.sampling import BLOCK, draw, kept_logits, uniform_noise
from tests.conftest import build_gpt2
from tests.test_generation import PLAIN, roll_out


@pytest.mark.claim(11)
def test_noise_is_a_function_of_seed_step_row_and_position():
    noise = uniform_noise(1, 2, [3, 4], 50)
    assert torch.equal(uniform_noise(1, 2, [4], 10)[0], noise[1, :10])
    others = [uniform_noise(*key, rows, 50)[0] for key, rows in (((1, 3), [3]), ((0, 2), [3]))]
    assert len({float(row[0]) for row in (noise[0], noise[1], *others)}) == 4
    many = uniform_noise(0, 0, range(200), 100)
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


@pytest.mark.claim(10, 11)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_gen_len": 1}]
)
def test_sampled_frequencies_follow_transformers_distribution(tokenizer, settings):
    """Chi-square of 4,000 first tokens against the distribution that transformers samples from."""
    model = build_gpt2(tokenizer, seed=3)
    with torch.no_grad():
        model.lm_head.weight[24:] *= 0.01  # a small effective vocabulary, without ties
        model.lm_head.weight[:24] *= 0.5
    sampling = PLAIN._replace(max_new_tokens=1, early_end_ids=[0, 7], **settings)
    responses, _ = roll_out(model, [[11, 12]] * 4000, sampling)
    counts = Counter(response[0] for response in responses)
    config = GenerationConfig(
        max_new_tokens=1,
        do_sample=True,
        eos_token_id=0,
        pad_token_id=0,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        begin_suppress_tokens=[0, 7] if sampling.min_gen_len else None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = torch.tensor([[11, 12]])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    probabilities = theirs.scores[0][0].softmax(dim=0).tolist()
    assert all(probabilities[token] > 0 for token in counts)
    # Rare tokens go into one cell, so that every cell expects at least 5.
    common = [t for t, p in enumerate(probabilities) if p * 4000 >= 5]
    cells = [(counts[t], probabilities[t] * 4000) for t in common]
    rest = 4000 - sum(count for count, _ in cells), 4000 - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((count - e) ** 2 / e for count, e in cells)
    freedom = len(cells) - 1
    # The mean of chi-square is its degrees of freedom, its variance twice that: 5 sigma.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 1


@pytest.mark.claim(11)
@pytest.mark.parametrize("num_columns", [3, BLOCK, BLOCK + 1, 5 * BLOCK - 7])
def test_draw_is_the_inverse_of_the_whole_cdf(num_columns):
    rng = torch.Generator().manual_seed(num_columns)
    logits = 3 * torch.randn(400, num_columns, generator=rng)
    logits[:, ::3] = -torch.inf
    uniform = torch.rand(400, dtype=torch.float64, generator=rng)
    columns, logprobs = draw(logits, uniform)
    cdf = logits.double().softmax(dim=1).cumsum(dim=1)
    expected = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    assert torch.equal(columns, expected)
    exact = logits.double().log_softmax(dim=1).gather(1, columns[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact.float(), atol=1e-5, rtol=0)


def test_draw_never_takes_what_has_no_mass():
    logits = torch.full((2, 3 * BLOCK), -torch.inf)
    logits[:, [5, BLOCK + 7]] = 0.0
    for uniform, expected in ((0.0, 5), (0.5, BLOCK + 7), (1 - 2**-53, BLOCK + 7)):
        columns, _ = draw(logits, torch.full((2,), uniform, dtype=torch.float64))
        assert columns.tolist() == [expected] * 2


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    for top_p, expected in ((0.49, [1]), (0.51, [1, 2]), (0.89, [1, 2]), (0.91, [1, 2, 0])):
        values, ids = kept_logits(logits, top_k=0, top_p=top_p)
        assert ids[values.isfinite()].tolist() == expected


def test_generation_config_tells_transformers_the_same(gpt2):
    settings = PLAIN._replace(top_k=5, min_gen_len=1).generation_config()
    GenerationConfig(**settings).validate()
    assert settings["begin_suppress_tokens"] == [0, 30] and settings["max_new_tokens"] == 12
    greedy = PLAIN._replace(do_sampling=False, max_new_tokens=0).generation_config()
    assert greedy == {"do_sample": False, "max_length": 64}
