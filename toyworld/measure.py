"""Judge checkpoints by plain transformers: a witness of its own beside the training scripts.

    KL = E_y [ sum_t KL(policy(. | x, y_<t) || reference(. | x, y_<t)) ]

is the divergence of whole responses, with the inner sum exact and the outer mean over samples.
Policies answer over their whole vocabulary, whatever sampling settings are stored beside them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlhf.errors import InputError
from toyworld.world import EOS, MAX_RESPONSE_TOKENS, TAGS, VOCABULARY, gold_reward

EOS_ID = VOCABULARY.index(EOS)
Model = Any  # a transformers model: its types promise less than the models keep


class Sequences(NamedTuple):
    """Prompts with sampled responses, padded on the right: real tokens need no position ids."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool: prompt, and response with its EOS
    response_mask: Tensor  # (B, T) bool: response with its EOS


class Result(NamedTuple):
    """What one model wrote; the tensors hold a mean over samples for each of N prompts."""

    texts: list[str]  # (N,)  the first sample
    gold: Tensor  # (N,)
    learned: Tensor | None  # (N,)  None without a reward model
    kl: Tensor  # (N,) nats
    length: Tensor  # (N,) tokens, closing tag and EOS included


def check_checkpoint(flag: str, kind: str) -> str:
    """Return the path in `--flag=path`, a checkpoint of this kind over the words of the world.

    Raises: InputError if it is not.
    """
    path = flag.rpartition("=")[2]
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        vocab_size = config["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag}: this is not a checkpoint folder") from error
    if not architecture.endswith(kind):
        raise InputError(f"{flag}: holds a {architecture}, expected a ...{kind}")
    if vocab_size != len(VOCABULARY):
        raise InputError(f"{flag}: knows {vocab_size} tokens, the toy world has {len(VOCABULARY)}")
    return path


def load_policy(flag: str) -> Model:
    """Load a language model, without the sampling settings that are stored beside it."""
    model = AutoModelForCausalLM.from_pretrained(check_checkpoint(flag, "LMHeadModel")).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    return model


def load_tokenizer(flag: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; raise InputError if its words are not the world's."""
    tokenizer = AutoTokenizer.from_pretrained(check_checkpoint(flag, "LMHeadModel"))
    if tokenizer.get_vocab() != {word: i for i, word in enumerate(VOCABULARY)}:
        raise InputError(f"{flag}: its tokenizer has other words than the toy world")
    return tokenizer


def load_reward(flag: str) -> Callable[[Sequences], Tensor]:
    """Load a reward model as a function from sequences to rewards (B,)."""
    path = check_checkpoint(flag, "ForSequenceClassification")
    try:
        facts = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))["reward"]
        loss, max_reward, logit_mean = (facts[k] for k in ("loss", "max_reward", "logit_mean"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag}: has no run.json that tells its reward") from error
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    def reward(sequences: Sequences) -> Tensor:
        logits = model(sequences.ids, attention_mask=sequences.mask.long()).logits[:, 0]
        if loss == "pairwise":
            return (logits - logit_mean).clamp(-max_reward, max_reward)
        return 1 + (max_reward - 1) * torch.sigmoid(logits)

    return reward


@torch.no_grad()
def measure(
    policy: Model,
    reference: Model,
    reward: Callable[[Sequences], Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    num_samples: int,
    temperature: float,
) -> Result:
    """Let a policy answer every prompt `num_samples` times, and judge the answers."""
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    sequences = sample(policy, tokenizer, asked, temperature=temperature)
    texts = [
        response_text(tokenizer, ids[mask].tolist())
        for ids, mask in zip(sequences.ids, sequences.response_mask, strict=True)
    ]

    def per_prompt(values: Tensor) -> Tensor:  # (B,) -> (N,)
        return values.view(len(prompts), num_samples).mean(dim=1)

    return Result(
        texts=texts[::num_samples],
        gold=per_prompt(torch.tensor(gold_reward(asked, texts))),
        learned=None if reward is None else per_prompt(reward(sequences)),
        kl=per_prompt(divergence(policy, reference, sequences, temperature=temperature)),
        length=per_prompt(sequences.response_mask.sum(dim=1).float()),
    )


def sample(
    policy: Model, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, temperature: float
) -> Sequences:
    """Sample a response to each prompt from the whole vocabulary."""
    texts = [f"<instruction>{prompt}</instruction><response>" for prompt in prompts]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    output = policy.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_RESPONSE_TOKENS,
    )
    width = batch.input_ids.shape[1]
    ids, masks, response_masks = [], [], []
    for row, is_real in zip(output, batch.attention_mask.bool(), strict=True):
        prompt, response = row[:width][is_real], row[width:]
        is_eos = (response == EOS_ID).int()
        response = response[is_eos.cumsum(dim=0) - is_eos == 0]  # up to the first EOS
        ids.append(torch.cat((prompt, response)))
        masks.append(torch.ones(len(ids[-1]), dtype=torch.bool))
        response_masks.append(torch.arange(len(ids[-1])) >= len(prompt))
    return Sequences(
        pad_sequence(ids, batch_first=True, padding_value=EOS_ID),
        pad_sequence(masks, batch_first=True),
        pad_sequence(response_masks, batch_first=True),
    )


def response_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode a response, without its EOS and one closing tag."""
    text = tokenizer.decode([i for i in ids if i != EOS_ID])
    assert isinstance(text, str)
    return text.removesuffix(TAGS[-1]).strip()


def divergence(
    policy: Model, reference: Model, sequences: Sequences, *, temperature: float
) -> Tensor:  # (B,) nats
    """Sum the exact divergence of the next token along each sampled response."""
    ours, theirs = (
        model(sequences.ids, attention_mask=sequences.mask.long())
        .logits[:, :-1]
        .div(temperature)
        .log_softmax(dim=2)
        for model in (policy, reference)
    )  # (B, T - 1, V) each
    kl = (ours.exp() * (ours - theirs)).sum(dim=2)  # (B, T - 1)
    return (kl * sequences.response_mask[:, 1:]).sum(dim=1)
