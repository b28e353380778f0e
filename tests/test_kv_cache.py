"""The cache of slots, with models of many families: what it writes, and which it leaves alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.batches import build_batch
from rlhf.kv_cache import has_plain_cache, takes_any_mask
from rlhf.models import response_states
from rlhf.tokens import Sample
from tests.test_generation import PLAIN, roll_out, uneven_prompts

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
FAMILIES = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi: no position ids
    "falcon": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "mistral": GROUPED | {"sliding_window": 4},
    "mamba": {"state_size": 4},  # no keys and values at all
}


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.claim(11)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_transformers_writes_one_at_a_time(family, monkeypatch):
    monkeypatch.setattr("rlhf.generation.ROLLOUTS_PER_SEQUENCE", 1)
    model, prompts = build(family), uneven_prompts(7)
    sampling = PLAIN._replace(do_sampling=False, max_new_tokens=10)
    responses, _ = roll_out(model, prompts, sampling, micro_batch_size=3)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        assert response == theirs[0, len(prompt) :].tolist()


@pytest.mark.claim(4)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mamba"}))
def test_states_in_a_batch_are_those_of_a_text_alone(family):
    model = build(family)
    samples = [Sample(prompt, prompt[::-1] + [9] * 8) for prompt in uneven_prompts(4)]
    states = response_states(model, build_batch(samples, 0))
    for row, (prompt, response) in enumerate(samples):
        alone = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
        ours = states[row, : len(response)]
        torch.testing.assert_close(ours, alone[len(prompt) - 1 : -1], atol=1e-5, rtol=0)


def test_which_models_are_known():
    known = {family for family in FAMILIES if has_plain_cache(build(family))}
    assert known == set(FAMILIES) - {"mamba"}
    any_mask = {family for family in known if takes_any_mask(build(family))}
    assert any_mask == known - {"bloom", "falcon", "mistral"}


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2"])
def test_a_response_may_fill_every_position_that_a_model_has(family):
    """GPT-Neo's masks are a buffer with a column for each position."""
    torch.manual_seed(0)
    layers = {"attention_types": [[["global"], 2]]} if family == "gpt_neo" else {}
    small = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2} | layers
    if family == "gpt2":
        small = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(family, max_position_embeddings=24, **small)
    model = AutoModelForCausalLM.from_config(config).eval()
    sampling = PLAIN._replace(
        do_sampling=False, max_new_tokens=0, max_len=24, pad_id=63, stop_ids=[63]
    )
    prompts = uneven_prompts(5)
    responses, _ = roll_out(model, prompts, sampling, micro_batch_size=0)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_length": 24, "do_sample": False, "eos_token_id": 63, "pad_token_id": 63}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert response == theirs[0, len(prompt) :].tolist()
