"""Rollouts: the same ids as one at a time, the distribution asked for, nothing overwritten."""

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

import rlhf.generation
from rlhf.errors import RunError
from rlhf.generation import Sampling, generate, kept_logits, uniform_noise
from tests.conftest import build_gpt2

PROMPTS = [[11, 12, 13], [14, 15], [16, 17, 18, 19, 20, 21, 22], [23]]
PLAIN = Sampling(
    do_sampling=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_gen_len=0,
    max_new_tokens=12,
    max_len=64,
    eos_id=0,
    early_end_ids=[0, 30],
)


def roll_out(model, prompts, sampling=PLAIN, step=1, rows=None, micro_batch_size=0):
    rollout = generate(
        model,
        prompts,
        sampling=sampling,
        noise_key=(7, step),
        rows=range(len(prompts)) if rows is None else rows,
        micro_batch_size=micro_batch_size,
    )
    return rollout.responses(), rollout


def with_biased_end(model, logit):
    """Make a model that always (+80) or never (-80) ends: its last state is fixed."""
    end = model.lm_head.weight[0].detach()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(logit * end / end.square().sum())
    return model


@pytest.mark.claim(11)
@pytest.mark.parametrize("min_gen_len", [0, 3])
def test_greedy_ids_equal_transformers_one_at_a_time(gpt2, min_gen_len):
    sampling = PLAIN._replace(
        do_sampling=False, min_gen_len=min_gen_len, early_end_ids=[0], max_new_tokens=20
    )
    responses, _ = roll_out(gpt2, PROMPTS, sampling)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        config = GenerationConfig(
            max_new_tokens=20, min_new_tokens=min_gen_len, eos_token_id=0, pad_token_id=0
        )
        ids = torch.tensor([prompt])
        theirs = gpt2.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert response == theirs[0, len(prompt) :].tolist()


@pytest.mark.claim(11)
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"do_sampling": False}])
def test_a_response_does_not_depend_on_batch_mates_or_slot(gpt2, settings, monkeypatch):
    sampling = PLAIN._replace(**settings)
    together, _ = roll_out(gpt2, PROMPTS, sampling)
    monkeypatch.setattr(rlhf.generation, "ROLLOUTS_PER_SEQUENCE", 1)
    pieces, _ = roll_out(gpt2, PROMPTS, sampling, micro_batch_size=1)
    turned, _ = roll_out(gpt2, PROMPTS[::-1], sampling, rows=[3, 2, 1, 0])
    alone = [roll_out(gpt2, [p], sampling, rows=[i])[0][0] for i, p in enumerate(PROMPTS)]
    assert together == pieces == turned[::-1] == alone


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


@pytest.mark.claim(12)
def test_response_that_did_not_end_stays_as_it_was_sampled(tokenizer):
    model = with_biased_end(build_gpt2(tokenizer), -80)
    responses, rollout = roll_out(model, PROMPTS, PLAIN._replace(max_len=10))
    assert [len(response) for response in responses] == [7, 8, 3, 9]
    assert not any(0 in response for response in responses)
    assert rollout.ended.tolist() == [False] * 4
    longer, _ = roll_out(model, PROMPTS, PLAIN._replace(max_len=64))
    assert all(a == b[: len(a)] for a, b in zip(responses, longer, strict=True))


@pytest.mark.claim(4)
def test_a_finished_row_never_runs_out_of_positions(tokenizer):
    """A long prompt ends at the model's last position while a short one goes on."""
    model = with_biased_end(build_gpt2(tokenizer), -80)  # 128 positions
    responses, _ = roll_out(
        model, [[11] * 120, [12, 13]], PLAIN._replace(max_len=128, max_new_tokens=0)
    )
    assert [len(response) for response in responses] == [8, 126]


@pytest.mark.claim(12)
def test_response_ends_at_its_eos(tokenizer):
    model = with_biased_end(build_gpt2(tokenizer), 80)
    responses, rollout = roll_out(model, PROMPTS)
    assert responses == [[0]] * 4 and rollout.ended.all()
    responses, _ = roll_out(model, PROMPTS, PLAIN._replace(min_gen_len=3))
    assert [response[3:] for response in responses] == [[0]] * 4
    assert not any(token in PLAIN.early_end_ids for r in responses for token in r[:3])


@pytest.mark.claim(10)
def test_sampler_logprobs_are_those_of_the_kept_tokens(gpt2):
    sampling = PLAIN._replace(top_k=5, top_p=0.9, temperature=0.7)
    responses, rollout = roll_out(gpt2, PROMPTS, sampling)
    logits = gpt2(torch.tensor([PROMPTS[0] + responses[0]])).logits[0] / 0.7
    for t, token in enumerate(responses[0]):
        kept = [i for i in rollout.support.kept_ids[0, t].tolist() if i >= 0]
        assert token in kept and 1 <= len(kept) <= 5
        here = logits[len(PROMPTS[0]) - 1 + t]
        expected = here[token] - here[kept].logsumexp(dim=0)
        torch.testing.assert_close(rollout.logprobs[0, t], expected, atol=1e-5, rtol=0)


@pytest.mark.claim(25)
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"do_sampling": False}])
def test_a_policy_that_is_not_finite_samples_nothing(gpt2, settings):
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite for 4 of 4 prompts"):
        roll_out(gpt2, PROMPTS, PLAIN._replace(**settings))


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
