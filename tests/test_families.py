"""Every stage with models of many families: their templates, special tokens, heads and widths."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import run_sft
from rlhf.batches import Room, build_batch
from rlhf.errors import InputError
from rlhf.experience import decode_responses
from rlhf.generation import decoder_name, generate
from rlhf.heads import head_of
from rlhf.logprobs import token_logprobs
from rlhf.models import (
    LANGUAGE_MODEL,
    load_policy,
    load_reward_model,
    load_tokenizer,
    model_stop_ids,
    response_states,
    reward_logits,
)
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.templates import CHAT_TEMPLATE
from rlhf.tokens import Sample, early_end_ids, encode_prompts, encode_samples
from tests.families import FAMILIES, THINKING, build_model, save_base
from tests.test_generation import uneven_prompts
from tests.test_scripts import rows, run

CPU = torch.device("cpu")
QUICK = ("qwen2", "gemma2")
SLOWLY = [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in FAMILIES]
STEPS = ["--max_len=96", "--max_samples=8", "--batch_size=4", "--max_steps=2"]
OWN_LOGITS = {"gemma2"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of base models, written once each."""
    folder, done = tmp_path_factory.mktemp("bases"), {}

    def base(name):
        if name not in done:
            done[name] = save_base(name, folder / f"{name}-tiny")
        return done[name]

    return base


def load(path):
    options = {"flag": "--model_id", "kind": LANGUAGE_MODEL, "max_len": 96}
    return load_tokenizer(path, **options), load_policy(path, flag="--model_id", device=CPU)


@pytest.mark.claim(4, 10)
@pytest.mark.parametrize("name", FAMILIES)
def test_our_logprobs_are_those_of_the_models_own_logits(name, bases):
    _, policy = load(bases(name))
    assert (head_of(policy) is None) == (name in OWN_LOGITS)
    plain = AutoModelForCausalLM.from_pretrained(bases(name), attn_implementation="eager").eval()
    samples = [Sample(prompt, [*prompt[::-1], 9, 8]) for prompt in uneven_prompts(5)]
    batch = build_batch(samples, 1)
    states = response_states(policy, batch)
    ids, mask = batch.response_ids, batch.response_mask
    ours = token_logprobs(states, ids, mask, head_of(policy), temperature=1.0)
    for row, (prompt, response) in enumerate(samples):
        logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        theirs = logits.log_softmax(dim=1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(ours[row, : len(response)], theirs, atol=1e-5, rtol=0)


@pytest.mark.claim(5)
@pytest.mark.parametrize("name", ["gemma2", "opt"])
def test_gradients_are_those_of_transformers_own_loss(name, bases):
    _, policy = load(bases(name))
    plain = AutoModelForCausalLM.from_pretrained(bases(name), attn_implementation="eager").eval()
    samples = [Sample(prompt, [*prompt[::-1], 9, 8]) for prompt in uneven_prompts(3)]
    run_sft.summed_loss(policy, build_batch(samples, 1), Runtime(CPU, "float32", "")).backward()
    for prompt, response in samples:
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = plain(torch.tensor([prompt + response]), labels=labels).loss
        (loss * len(response)).backward()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (policy, plain)
    )
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def sampling_of(policy, tokenizer, **settings):
    stops = model_stop_ids(policy, tokenizer)
    defaults = {
        "do_sampling": False,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_gen_len": 0,
        "max_new_tokens": 12,
        "max_len": 96,
        "pad_id": tokenizer.pad_token_id,
        "stop_ids": stops,
        "early_end_ids": early_end_ids(tokenizer, stops),
    }
    return Sampling(**{**defaults, **settings})


def roll_out(policy, prompts, sampling):
    options = {"noise_key": (7, 1), "rows": range(len(prompts)), "room": Room(3)}
    return generate(policy, prompts, sampling=sampling, **options)


@pytest.mark.claim(11)
@pytest.mark.parametrize("cache", ["ours", "theirs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_responses_are_those_of_transformers(name, cache, bases, monkeypatch):
    if cache == "theirs":
        monkeypatch.setattr("rlhf.generation.has_plain_cache", lambda model: False)
    tokenizer, policy = load(bases(name))
    prompts = encode_prompts(tokenizer, ["Name the cat", "Draw it", "Tell me of the sea, please"])
    rollout = roll_out(policy, prompts, sampling_of(policy, tokenizer))
    plain = AutoModelForCausalLM.from_pretrained(bases(name))  # stops where its own config says
    stops = model_stop_ids(policy, tokenizer)
    for prompt, response, ended in zip(prompts, rollout.responses(), rollout.ended, strict=True):
        ids = torch.tensor([prompt])
        options = {"eos_token_id": stops, "max_new_tokens": 12, "do_sample": False}
        theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert response == theirs[0, len(prompt) :].tolist()
        assert bool(ended) == (response[-1] in stops)


@pytest.mark.claim(12)
@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("cache", ["ours", "theirs"])
def test_a_response_ends_at_any_of_its_stop_tokens(stop, cache, bases, monkeypatch):
    if cache == "theirs":
        monkeypatch.setattr("rlhf.generation.has_plain_cache", lambda model: False)
    tokenizer, policy = load(bases("qwen2"))
    end = tokenizer.convert_tokens_to_ids(stop)
    assert end in model_stop_ids(policy, tokenizer)
    layer = policy.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.zeros(len(layer.weight)))
    layer.bias.data[end] = 1e4
    prompts = encode_prompts(tokenizer, ["Name the cat", "Draw it"])
    rollout = roll_out(policy, prompts, sampling_of(policy, tokenizer, max_new_tokens=5))
    if cache == "ours":
        assert rollout.responses() == [[end], [end]] and rollout.ended.all()
    assert decode_responses(tokenizer, rollout) == ["", ""]
    rollout = roll_out(policy, prompts, sampling_of(policy, tokenizer, min_gen_len=3))
    stops = model_stop_ids(policy, tokenizer)
    assert all(i not in stops for response in rollout.responses() for i in response[:3])
    assert [response[3:] for response in rollout.responses()] == [[end], [end]]


def test_a_notice_says_whose_logits_are_sampled(bases):
    assert "own forward" in decoder_name(load(bases("gemma2"))[1])
    assert "own forward" not in decoder_name(load(bases("gemma"))[1])


@pytest.mark.parametrize("name", SLOWLY)
def test_every_stage_runs_and_other_tools_load_what_it_writes(name, bases, data_dir, tmp_path):
    run("sft", tmp_path, data_dir, f"--model_id={bases(name)}", *STEPS)
    run("rm", tmp_path, data_dir, *STEPS)
    sampled = ["--temperature=1", "--top_k=0", "--max_new_tokens=6", "--eval_samples=3"]
    run("ppo", tmp_path, data_dir, *STEPS, *sampled, "--max_steps=1")
    run("dpo", tmp_path, data_dir, *STEPS)
    base, base_tokenizer = build_model(name)
    for stage in ("sft", "rm", "ppo", "dpo"):
        path = tmp_path / stage / "best"
        assert all(math.isfinite(r["loss"]) for r in rows(tmp_path / stage) if "loss" in r)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.get_vocab() == base_tokenizer.get_vocab()
        assert set(tokenizer.all_special_tokens) == set(base_tokenizer.all_special_tokens)
        assert tokenizer.pad_token == (base_tokenizer.pad_token or base_tokenizer.eos_token)
        if base_tokenizer.chat_template:
            assert tokenizer.chat_template == base_tokenizer.chat_template
        if stage == "rm":
            continue
        model = AutoModelForCausalLM.from_pretrained(path)
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        assert set(base.generation_config.eos_token_id) <= set(stops)
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    check_reward(tmp_path / "rm" / "best")


@torch.no_grad()
def check_reward(path):
    """A plain pipeline over the rendered text gives the logit that we read."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    pad_id, answers = tokenizer.pad_token_id, ["A cat.", "No, x"]
    model = load_reward_model(str(path), flag="--x", device=CPU, pad_id=pad_id)
    samples = encode_samples(tokenizer, ["Name the cat"] * 2, answers, max_len=96, min_len=1)
    ours = reward_logits(model, build_batch(samples, pad_id), pad_id=pad_id)
    # Before 5.23, transformers forgot Gemma 2's attention cap unless eager attention was asked for.
    eager = {"attn_implementation": "eager"}
    plain = AutoModelForSequenceClassification.from_pretrained(path, **eager)
    assert plain.config.pad_token_id == pad_id
    classify = pipeline("text-classification", model=plain, tokenizer=tokenizer)
    for logit, sample, answer in zip(ours, samples, answers, strict=True):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids, pad_id, pad_id]])
        torch.testing.assert_close(logit, plain(ids).logits[0, 0], atol=1e-5, rtol=0)
        question = {"role": "user", "content": "Name the cat"}
        chat = [question, {"role": "assistant", "content": answer}]
        # Some templates write a line break after the stop token, which is no part of a response.
        text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        if tokenizer("x").input_ids[0] == tokenizer.bos_token_id:  # it would come twice
            text = text.removeprefix(tokenizer.bos_token)
        theirs = classify(text, function_to_apply="none")[0]["score"]
        assert float(logit) == pytest.approx(theirs, abs=1e-5)


def test_the_template_of_a_flag_goes_through_all_stages(bases, data_dir, tmp_path):
    options = [f"--model_id={bases('qwen2')}", *STEPS]
    run("sft", tmp_path, data_dir, *options, "--chat_template=tags")
    run("dpo", tmp_path, data_dir, *STEPS)
    for stage in ("sft", "dpo"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / stage / "best")
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    # Text before the stop token, and a file instead of a name.
    own = tmp_path / "own.jinja"
    own.write_text(THINKING)
    folder = tmp_path / "own"
    run("sft", tmp_path, data_dir, *options, f"--chat_template={own}", ckpt_dir=folder)
    assert AutoTokenizer.from_pretrained(folder / "best").chat_template == THINKING
    facts = json.loads((folder / "best/run.json").read_text())
    assert facts["arguments"]["chat_template"] == str(own)
    own.write_text("none")
    with pytest.raises(InputError, match=r"own\.jinja: .*no special token; mend the file"):
        run("sft", tmp_path, data_dir, *options, f"--chat_template={own}", ckpt_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_critic_that_would_read_states_is_refused(bases, data_dir, tmp_path):
    run("sft", tmp_path, data_dir, f"--model_id={bases('gemma2')}", *STEPS)
    options = ["--reward_fn=tests.test_scripts:count_a", "--critic=shared", *STEPS]
    with pytest.raises(InputError, match=r"--critic=shared: .*--critic=separate"):
        run("ppo", tmp_path, data_dir, *options)
    assert not (tmp_path / "ppo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--gradient_checkpointing"], ["--dtype=bfloat16"]])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "opt"])
def test_memory_and_precision_settings_run(name, options, bases, data_dir, tmp_path):
    run("sft", tmp_path, data_dir, f"--model_id={bases(name)}", *STEPS, *options)
    sampled = ["--temperature=1", "--top_k=5", "--max_new_tokens=6", "--eval_samples=3"]
    reward = ["--reward_fn=tests.test_scripts:count_a"]
    run("ppo", tmp_path, data_dir, *STEPS, *sampled, *reward, "--max_steps=2", *options)
