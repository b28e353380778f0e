"""A rollout as the models see it: ratio 1 before the first update, the reference, the figures."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.actors import Actors
from rlhf.batches import Room
from rlhf.errors import RunError
from rlhf.experience import (
    Experience,
    Numbers,
    check_ratio_is_one,
    explained_variance,
    policy_forward,
    rollout_metrics,
    token_numbers,
)
from rlhf.generation import generate
from rlhf.models import Critic
from rlhf.runtime import Runtime
from tests.conftest import build_gpt2
from tests.test_generation import PLAIN, PROMPTS

SETTINGS = [
    {"temperature": 0.2, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "min_gen_len": 2},
]


ROOM = Room(0)
PRECISIONS = ["float32", "bfloat16"]


def build(tokenizer, *, precision="float32", copies=1, **settings):
    sampling = PLAIN._replace(**settings)
    policy = build_gpt2(tokenizer)
    runtime = Runtime(torch.device("cpu"), precision, "")
    prompts = PROMPTS * copies
    critic = Critic(build_gpt2(tokenizer, seed=2).transformer, 32, 1.0)
    actors = Actors(policy, build_gpt2(tokenizer, seed=1), critic, sampling, runtime)
    with runtime.autocast():
        rollout = generate(
            policy,
            prompts,
            sampling=sampling,
            noise_key=(7, 1),
            rows=range(len(prompts)),
            room=ROOM,
        )
    return actors, rollout


@pytest.mark.claim(9, 10)
@pytest.mark.parametrize("settings", SETTINGS)
def test_ratio_is_one_before_the_first_update(tokenizer, settings):
    actors, rollout = build(tokenizer, **settings)
    numbers = token_numbers(actors, rollout, ROOM)
    check_ratio_is_one(actors, rollout, numbers, ROOM)
    rows = torch.arange(len(PROMPTS))
    logprobs, _ = policy_forward(actors, rollout, rows, rollout.batch)
    mask = rollout.batch.response_mask
    torch.testing.assert_close(logprobs[mask], numbers.logprobs[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.logprobs[mask], logprobs[mask], atol=1e-4, rtol=0)


@pytest.mark.claim(9)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("copies", [1, 40])
def test_rounding_to_bfloat16_does_not_stop_a_run(tokenizer, settings, copies):
    actors, rollout = build(tokenizer, precision="bfloat16", copies=copies, **settings)
    check_ratio_is_one(actors, rollout, token_numbers(actors, rollout, ROOM), ROOM)


@pytest.mark.claim(9)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dropout_in_the_policy_stops_the_run(tokenizer, precision):
    actors, rollout = build(tokenizer, precision=precision, copies=40)
    numbers = token_numbers(actors, rollout, ROOM)
    actors.policy.train()  # made with GPT-2's own dropout of 0.1
    with pytest.raises(RunError, match="new policy to old policy"):
        check_ratio_is_one(actors, rollout, numbers, ROOM)


@pytest.mark.claim(10)
@pytest.mark.parametrize("wrong", [{"temperature": 0.5}, {"support": None}])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logprobs_of_another_distribution_stop_the_run(tokenizer, wrong, precision):
    actors, rollout = build(tokenizer, precision=precision, copies=40, temperature=0.7, top_k=5)
    if "temperature" in wrong:
        actors = actors._replace(sampling=actors.sampling._replace(temperature=0.5))
    else:
        rollout = rollout._replace(support=rollout.support._replace(kept_ids=None, min_gen_len=0))
    with pytest.raises(RunError, match="old policy to sampler"):
        check_ratio_is_one(actors, rollout, token_numbers(actors, rollout, ROOM), ROOM)


@pytest.mark.claim(5, 9)
@pytest.mark.parametrize("settings", SETTINGS)
def test_micro_batches_change_no_number(tokenizer, settings):
    actors, rollout = build(tokenizer, **settings)
    whole = token_numbers(actors, rollout, ROOM)
    mask = rollout.batch.response_mask
    for size in (1, 3):
        parts = token_numbers(actors, rollout, Room(size))
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a[mask], b[mask], atol=1e-4, rtol=0)


@pytest.mark.claim(4, 10)
def test_reference_is_taken_at_the_temperature_over_the_whole_vocabulary(tokenizer):
    actors, rollout = build(tokenizer, temperature=0.7, top_k=5)
    numbers = token_numbers(actors, rollout, ROOM)
    for row, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses(), strict=True)):
        logits = actors.ref_policy(torch.tensor([prompt + response])).logits[0] / 0.7
        expected = logits.log_softmax(dim=1)[range(len(prompt) - 1, len(logits) - 1), response]
        torch.testing.assert_close(
            numbers.ref_logprobs[row, : len(response)], expected, atol=1e-5, rtol=0
        )


@pytest.mark.claim(10)
def test_first_kl_is_minus_log_kept_mass(tokenizer):
    actors, rollout = build(tokenizer, temperature=0.7, top_k=5)
    actors = actors._replace(ref_policy=actors.policy)
    numbers = token_numbers(actors, rollout, ROOM)
    mask = rollout.batch.response_mask
    assert numbers.kept_mass[mask].max() < 1
    expected = -numbers.kept_mass[mask].log()
    torch.testing.assert_close(numbers.kl[mask], expected, atol=1e-5, rtol=0)


@pytest.mark.claim(13, 19)
def test_rollout_metrics_worked_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0], [-4.0, 0.0]])
    numbers = Numbers(logprobs, mask.float(), mask.float() * 0.5, ref_logprobs, logprobs)
    experience = Experience(
        SimpleNamespace(
            batch=SimpleNamespace(response_mask=mask), ended=torch.tensor([True, False])
        ),
        numbers,
        torch.tensor([7.0, 11.0]),
        torch.tensor([2.0, 4.0]),  # (score - 3) / 2
        torch.tensor([[-0.05, 2.1], [3.9, 0.0]]),  # beta 0.1
        advantages=torch.zeros(2, 2),
        returns=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),  # values: the logprobs
        learning_rate=torch.tensor(0.1),
    )
    metrics = rollout_metrics(experience, max_kl_div=0.9)
    expected = {
        "objective/kl": 0.25,  # ((0.5 - 1) + 1) / 2
        "objective/kl_k3": ((0.60653 - 1 + 0.5) + (2.71828 - 1 - 1) + (0.36788 - 1 + 1)) / 2,
        "objective/entropy": 3.0,
        "objective/scores": 9.0,
        "objective/non_score_reward": -0.025,
        "objective/rlhf_reward": 2.975,
        "policy/entropy_avg": 1.0,
        "kept_mass": 0.5,
        "guarded_kl": 2 / 3,
        "explained_variance": 1.0,  # each return is 2 above its value
        "val/num_eos_tokens": 1.0,
        "eos_rate": 0.5,
        "response_length": 1.5,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        expected, abs=1e-5
    )


def test_explained_variance_knows_perfect_constant_and_padding():
    returns, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.zeros(1, 3), returns, mask) == 0
