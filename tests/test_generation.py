"""Rollouts: the same ids as one at a time, the distribution asked for, nothing overwritten."""

import random
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

import rlhf.generation
from rlhf.batches import Room
from rlhf.errors import RunError
from rlhf.generation import Slots, generate
from rlhf.sampling import Sampling
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
    pad_id=0,
    stop_ids=[0],
    early_end_ids=[0, 30],
)


def roll_out(model, prompts, sampling=PLAIN, step=1, rows=None, micro_batch_size=0):
    rollout = generate(
        model,
        prompts,
        sampling=sampling,
        noise_key=(7, step),
        rows=range(len(prompts)) if rows is None else rows,
        room=Room(micro_batch_size),
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


def uneven_prompts(count):
    rng = random.Random(1)
    return [[rng.randrange(1, 60) for _ in range(rng.randint(1, 9))] for _ in range(count)]


@pytest.fixture
def sometimes_ends(tokenizer):
    """A model whose responses end at very different places."""
    model = build_gpt2(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


class Watched(Slots):
    """Slots that count what is done with them."""

    seen: ClassVar[Counter] = Counter()

    def fill(self, free, rows, prompts):
        self.seen["fill"] += 1
        super().fill(free, rows, prompts)

    def drop(self, free):
        self.seen["drop"] += 1
        super().drop(free)

    def make_room(self, columns):
        end = self.end
        super().make_room(columns)
        self.seen["shift"] += self.end < end


@pytest.mark.slow
@pytest.mark.claim(11)
@pytest.mark.parametrize("pace", [1, 5])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}, {"do_sampling": False}])
def test_slots_are_refilled_and_no_response_changes(sometimes_ends, settings, pace, monkeypatch):
    sampling = PLAIN._replace(max_new_tokens=20, max_len=24, **settings)
    prompts = uneven_prompts(40)
    alone = [roll_out(sometimes_ends, [p], sampling, rows=[i])[1] for i, p in enumerate(prompts)]
    assert len({len(rollout.responses()[0]) for rollout in alone}) > 5
    monkeypatch.setattr(rlhf.generation, "ROLLOUTS_PER_SEQUENCE", 1)
    monkeypatch.setattr(rlhf.generation, "SPARE_COLUMNS", pace)
    monkeypatch.setitem(rlhf.generation.STEPS_BETWEEN_LOOKS, "cpu", pace)
    monkeypatch.setattr(rlhf.generation, "Slots", Watched)
    Watched.seen.clear()
    _, rollout = roll_out(sometimes_ends, prompts, sampling, micro_batch_size=6)
    assert rollout.responses() == [one.responses()[0] for one in alone]
    assert Watched.seen["fill"] > 2 and Watched.seen["drop"] and Watched.seen["shift"]
    for row, one in enumerate(alone):
        width = one.logprobs.shape[1]
        torch.testing.assert_close(
            rollout.logprobs[row, :width], one.logprobs[0], atol=1e-5, rtol=0
        )
        if "top_k" in settings:
            kept = rollout.support.kept_ids[row, :width]
            assert torch.equal(kept, one.support.kept_ids[0])


@pytest.mark.claim(11)
def test_a_slot_that_is_done_waits_within_the_models_positions(tokenizer):
    model = with_biased_end(build_gpt2(tokenizer), -80)
    most = model.config.max_position_embeddings
    sampling = PLAIN._replace(max_new_tokens=0, max_len=most)
    responses, _ = roll_out(model, [[5] * (most - 3), [6], [7]], sampling)
    assert [len(response) for response in responses] == [3, most - 1, most - 1]


@pytest.mark.claim(11)
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"min_gen_len": 3}, {"do_sampling": False}])
def test_the_way_through_transformers_writes_the_same(sometimes_ends, settings, monkeypatch):
    sampling, prompts = PLAIN._replace(max_new_tokens=20, max_len=24, **settings), uneven_prompts(9)
    _, ours = roll_out(sometimes_ends, prompts, sampling)
    monkeypatch.setattr(rlhf.generation, "has_plain_cache", lambda model: False)
    _, theirs = roll_out(sometimes_ends, prompts, sampling, micro_batch_size=1)
    assert ours.responses() == theirs.responses()
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(ours.ended, theirs.ended)


class NoWaiting(TorchDispatchMode):
    """Fails at whatever would make a GPU's host wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"}, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_k": 5, "top_p": 0.9}])
def test_no_token_waits_for_the_device(gpt2, settings, monkeypatch):
    class Quick(Slots):
        def step(self):
            with NoWaiting():
                super().step()

    monkeypatch.setattr(rlhf.generation, "Slots", Quick)
    sampling = PLAIN._replace(min_gen_len=1, **settings)
    assert len(roll_out(gpt2, PROMPTS, sampling)[0]) == 4


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
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"do_sampling": False}])
def test_a_policy_that_is_not_finite_samples_nothing(gpt2, settings):
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite for 4 of 4 prompts"):
        roll_out(gpt2, PROMPTS, PLAIN._replace(**settings))
