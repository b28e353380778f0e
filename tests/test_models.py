"""Models: positions from the mask, the shift by one, the reward's place, no dropout, the critic."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from rlhf.batches import Batch, build_batch, position_ids
from rlhf.errors import InputError
from rlhf.heads import head_of, require_states
from rlhf.models import (
    LANGUAGE_MODEL,
    REWARD_MODEL,
    Critic,
    hidden_states,
    load_policy,
    load_reward_model,
    load_tokenizer,
    read_config,
    response_states,
    reward_logits,
)
from rlhf.rewards import regression_reward
from rlhf.tokens import Sample, encode_samples, require_same_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def reward_model(base_path):
    torch.manual_seed(1)
    return load_reward_model(base_path, flag="--x", device=CPU, pad_id=0)


@pytest.mark.claim(4)
def test_padding_and_batch_mates_never_change_a_state(gpt2, samples):
    together = hidden_states(gpt2, build_batch(samples, 0))
    mask = build_batch(samples, 0).mask
    for row, sample in enumerate(samples):
        alone = gpt2.transformer(
            torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        ).last_hidden_state[0]
        torch.testing.assert_close(together[row][mask[row]], alone, atol=1e-5, rtol=0)


@pytest.mark.claim(4)
def test_positions_count_real_tokens_only(batch):
    ids = position_ids(batch.mask)
    for row, mask in zip(ids, batch.mask, strict=True):
        assert row[mask].tolist() == list(range(int(mask.sum())))


@pytest.mark.claim(4)
def test_state_before_each_response_token_predicts_it(gpt2, batch):
    states = response_states(gpt2, batch)
    assert states.shape[:2] == batch.response_ids.shape
    for row in range(3):
        ids = batch.input_ids[row][batch.mask[row]]
        logits = gpt2(ids[None]).logits[0]
        length = int(batch.response_mask[row].sum())
        predicted = gpt2.lm_head(states[row, :length])
        torch.testing.assert_close(predicted, logits[-length - 1 : -1], atol=1e-5, rtol=0)


@pytest.mark.claim(9)
def test_loaded_policy_has_no_dropout_even_in_training_mode(base_path, batch):
    assert AutoConfig.from_pretrained(base_path).resid_pdrop == 0.1
    policy = load_policy(base_path, flag="--x", device=CPU).train()
    assert torch.equal(hidden_states(policy, batch), hidden_states(policy, batch))
    wild = load_policy(base_path, flag="--x", device=CPU, dropout=0.1).train()
    assert not torch.equal(hidden_states(wild, batch), hidden_states(wild, batch))


@pytest.mark.claim(7)
def test_reward_is_read_at_the_last_token_that_is_not_eos(reward_model, samples):
    ended, cut = samples[0], samples[2]
    for sample, last in ((ended, -2), (cut, -1)):
        logits = reward_logits(reward_model, build_batch([sample], 0), pad_id=0)
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        states = reward_model.transformer(ids).last_hidden_state
        torch.testing.assert_close(logits, reward_model.score(states[:, last])[:, 0])


@pytest.mark.claim(7)
def test_reward_is_the_same_alone_in_a_batch_and_in_transformers(reward_model, samples):
    together = reward_logits(reward_model, build_batch(samples, 0), pad_id=0)
    for row, sample in enumerate(samples):
        alone = reward_logits(reward_model, build_batch([sample], 0), pad_id=0)[0]
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        theirs = reward_model(ids).logits[0, 0]
        padded = reward_model(torch.cat((ids, torch.zeros(1, 4).long()), dim=1)).logits[0, 0]
        for other in (alone, theirs, padded):
            torch.testing.assert_close(together[row], other, atol=1e-5, rtol=0)


def test_response_of_eos_alone_is_read_at_the_prompt(reward_model):
    batch = build_batch([Sample([5, 6], [0])], 0)
    logits = reward_logits(reward_model, batch, pad_id=0)
    theirs = reward_model(torch.tensor([[5, 6, 0]])).logits[0]
    torch.testing.assert_close(logits, theirs)


@pytest.mark.claim(7)
def test_pipeline_gives_our_reward(reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    responses = ["Blue.", "A cat, I think, and a dog."]
    encoded = encode_samples(tokenizer, ["Hi."] * 2, responses, max_len=99, min_len=1)
    logits = reward_logits(reward_model, build_batch(encoded, 0), pad_id=0)
    rewards = regression_reward(logits, max_reward=5.0)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    form = "<instruction>Hi.</instruction><response>{}</response><|endoftext|>"
    scores = [answer["score"] for answer in classify([form.format(r) for r in responses])]
    theirs = 1 + 4 * torch.tensor(scores)
    torch.testing.assert_close(rewards, theirs, atol=1e-5, rtol=0)


@pytest.mark.claim(6)
def test_reward_head_depends_on_the_seed_alone(base_path):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load_reward_model(base_path, flag="--x", device=CPU, pad_id=0)
        heads.append(model.score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.claim(17)
def test_critic_starts_as_the_mean_reward(base_path, batch, reward_model):
    policy = load_policy(base_path, flag="--x", device=CPU)
    states = response_states(policy, batch)
    for trunk in (reward_model.base_model, None):
        values = Critic(trunk, 32, 2.5)(states, batch)
        assert torch.equal(values, torch.full(batch.response_ids.shape, 2.5))


@pytest.mark.claim(17)
def test_separate_critic_sends_no_gradient_into_the_policy(base_path, batch, reward_model):
    policy = load_policy(base_path, flag="--x", device=CPU)
    for trunk, reaches_policy in ((reward_model.base_model, False), (None, True)):
        policy.zero_grad()
        critic = Critic(trunk, 32, 0.0)
        torch.nn.init.ones_(critic.head.weight)
        critic(response_states(policy, batch), batch).sum().backward()
        grad = policy.transformer.wte.weight.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) == reaches_policy


def test_kind_and_length_are_checked_before_weights(base_path, tmp_path, reward_model):
    reward_model.save_pretrained(tmp_path / "rm")
    rm_path, known = str(tmp_path / "rm"), {"flag": "--x", "max_len": 128}
    assert read_config(base_path, kind=LANGUAGE_MODEL, **known).vocab_size
    for path, kind, message in (
        (rm_path, LANGUAGE_MODEL, "is a reward model"),
        (base_path, REWARD_MODEL, "is a language model"),
        ("REQUIRED", LANGUAGE_MODEL, "REQUIRED"),
        (str(tmp_path / "missing"), LANGUAGE_MODEL, "no such checkpoint"),
        (str(tmp_path), LANGUAGE_MODEL, "config.json"),
    ):
        with pytest.raises(InputError, match=message):
            read_config(path, kind=kind, **known)
    with pytest.raises(InputError, match="128 positions"):
        read_config(base_path, flag="--x", kind=LANGUAGE_MODEL, max_len=129)


@pytest.mark.parametrize(
    ("family", "name"), [("mpt", "max_seq_len"), ("gpt_bigcode", "n_positions"), ("opt", "")]
)
def test_positions_are_found_under_any_name(family, name, tmp_path):
    options = {name or "max_position_embeddings": 32}
    config = AutoConfig.for_model(family, architectures=["XForCausalLM"], **options)
    config.save_pretrained(tmp_path)
    known = {"flag": "--x", "kind": LANGUAGE_MODEL}
    read_config(str(tmp_path), max_len=32, **known)
    with pytest.raises(InputError, match="only 32 positions"):
        read_config(str(tmp_path), max_len=33, **known)


def test_a_model_of_images_and_text_is_refused(tmp_path):
    config = AutoConfig.for_model("gemma3", architectures=["Gemma3ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reads more than text; give a model of text alone"):
        read_config(str(tmp_path), flag="--x", kind=LANGUAGE_MODEL, max_len=8)


def test_tokenizer_that_does_not_fit_is_refused(base_path, tokenizer, base_tokenizer, tmp_path):
    config = AutoConfig.from_pretrained(base_path)
    config.vocab_size = 10
    config.save_pretrained(tmp_path)
    base_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="do not belong together"):
        load_tokenizer(str(tmp_path), flag="--x", kind=LANGUAGE_MODEL, max_len=8)
    require_same_tokenizer(tokenizer, tokenizer, flag="--x")
    with pytest.raises(InputError, match="tokenizer, chat template or pad token differs"):
        require_same_tokenizer(tokenizer, base_tokenizer, flag="--x")


def test_weights_that_need_unpickling_are_refused(base_path, tmp_path, gpt2):
    gpt2.config.save_pretrained(tmp_path)
    torch.save(gpt2.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy(str(tmp_path), flag="--x", device=CPU)


@pytest.mark.claim(10)
@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2", "llama"])
def test_a_model_that_scales_or_caps_its_logits_gives_them_itself(family, tmp_path, samples):
    """The output layer's own logits would be another policy's."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **{"granite": {"logits_scaling": 8.0}, "gemma2": {"head_dim": 8}}.get(family, {}),
        **({"final_logit_softcapping": 30.0} if family == "gemma2" else {}),
    )
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), flag="--x", device=CPU)
    assert (head_of(policy) is None) == (family != "llama")
    for row, (prompt, response) in enumerate(samples):
        states = response_states(policy, build_batch(samples, 0))[row, : len(response)]
        ours = states if head_of(policy) is None else policy.lm_head(states)
        theirs = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if head_of(policy) is None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = response_states(policy, build_batch(samples, 0))
        assert not torch.equal(logits, logits.bfloat16().float())  # not rounded on the way
        with pytest.raises(InputError, match=r"--critic=shared: .*--critic=separate"):
            require_states(policy, flag="--critic=shared")


def test_selecting_rows_drops_needless_columns_and_nothing_else(samples):
    batch = build_batch(samples, 0)
    few = batch.select(torch.tensor([1]))
    assert isinstance(few, Batch)
    assert [t.tolist() for t in few] == [[[14, 15]], [[True, True]], [[23, 0]], [[True, True]]]
