"""Samples: the same prompts and the same noise every time, and no trace in the run."""

import random

import numpy as np
import pytest
import torch

from rlhf.batches import Room
from rlhf.experience import decode_responses
from rlhf.generation import generate
from rlhf.runtime import Runtime
from rlhf.samples import judged_samples, texts_of, write_samples
from rlhf.sampling import Sampling
from rlhf.tokens import Sample, encode_samples
from tests.conftest import build_gpt2

ROOM = Room(0)
CPU = Runtime(torch.device("cpu"), "float32", "")
PROMPTS = ["Name a sea", "Name a sea", "Draw", "Tell me of the cat", "What is time"]
RESPONSES = ["Blue, please.", "No.", "A cat.", "It sat.", "Time."]


@pytest.fixture
def heldout(tokenizer) -> list[Sample]:
    found = encode_samples(tokenizer, PROMPTS, RESPONSES, max_len=128, min_len=1)
    return [sample for sample in found if sample]


@pytest.fixture
def write(tokenizer, heldout):
    def write(model, runtime=CPU, *, seed=3):
        return write_samples(model, tokenizer, heldout, runtime, ROOM, max_len=100, seed=seed)

    return write


def test_the_first_three_prompts_are_answered_each_once(write, gpt2):
    shown = write(gpt2)
    assert [list(row) for row in shown] == [["prompt", "response", "in the data"]] * 3
    assert [row["prompt"] for row in shown] == [
        f"<instruction>{prompt}</instruction><response>"
        for prompt in ("Name a sea", "Draw", "Tell me of the cat")
    ]
    assert [row["in the data"] for row in shown] == ["Blue, please.", "A cat.", "It sat."]


def test_answers_are_sampled_from_the_model_as_it_is(write, gpt2, tokenizer, heldout):
    """One prompt alone, of the noise that is its row's, up to the 64 tokens that are shown."""
    options = {"do_sampling": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_gen_len": 0}
    ends = {"pad_id": tokenizer.pad_token_id, "stop_ids": [tokenizer.eos_token_id]}
    sampling = Sampling(**options, **ends, early_end_ids=[], max_new_tokens=64, max_len=100)
    prompts, noise = [heldout[2].prompt_ids], (3, 0)
    alone = generate(gpt2, prompts, sampling=sampling, noise_key=noise, rows=[1], room=ROOM)
    assert write(gpt2)[1]["response"] == decode_responses(tokenizer, alone)[0]
    assert len(alone.responses()[0]) == 64 or alone.ended[0]


def test_answers_repeat_and_change_with_the_seed_and_the_model(write, gpt2, tokenizer):
    first = write(gpt2)
    assert write(gpt2) == first
    assert write(gpt2, seed=4) != first
    assert write(build_gpt2(tokenizer, seed=1)) != first


def test_answering_leaves_no_trace_in_the_run(write, gpt2):
    for mode in (True, False):
        gpt2.train(mode)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        write(gpt2)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])
        assert gpt2.training == mode


def test_dropout_is_off_while_it_answers(write, gpt2):
    expected = write(gpt2)
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert write(gpt2.train()) == expected


def test_a_model_that_is_cut_up_answers_nothing(write, gpt2):
    assert write(gpt2, runtime=CPU._replace(zero_stage=2)) == []


def test_judged_samples_are_the_first_with_their_numbers(tokenizer, heldout):
    rows = judged_samples(
        *texts_of(tokenizer, heldout), reward=torch.arange(5.0), target=torch.tensor([9.0] * 5)
    )
    assert [row["response"] for row in rows] == RESPONSES[:3]
    assert [(row["reward"], row["target"]) for row in rows] == [(0.0, 9.0), (1.0, 9.0), (2.0, 9.0)]
