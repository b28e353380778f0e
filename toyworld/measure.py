"""Judge checkpoints by plain transformers: a witness of its own beside the training scripts.

Policies answer over their whole vocabulary, whatever sampling settings are stored beside them.
"""

import json
from collections.abc import Callable, Mapping
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
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.checkpoints import require_undamaged
from rlhf.errors import InputError
from rlhf.records import PROMPT, read_split
from toyworld.world import EOS, TAGS, VOCABULARY, gold_reward, requests

EOS_ID = VOCABULARY.index(EOS)
Model = Any  # a transformers model: its types promise less than the models keep


class Sequences(NamedTuple):
    """Prompts with sampled responses, padded on the right: real tokens need no position ids."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool: prompt, and response with its EOS
    response_mask: Tensor  # (B, T) bool: response with its EOS


Reward = Callable[[Sequences], Tensor]  # (B,)


class Result(NamedTuple):
    """What one model wrote; the tensors hold a mean over samples for each of N prompts."""

    texts: list[str]  # (N,)  the first sample
    gold: Tensor  # (N,)
    learned: dict[str, Tensor]  # (N,) each, by the name of the reward model
    length: Tensor  # (N,) tokens, closing tag and EOS included


def read_prompts(data_dir: str, side: str) -> list[str]:
    """Read the prompts of one side; raise InputError if one is not of this world."""
    prompts = [record["prompt"] for record in read_split(data_dir, side, PROMPT)]
    strangers = [prompt for prompt in prompts if str(prompt) not in requests()]
    if strangers:
        raise InputError(
            f"--data_dir={data_dir}: {side}.jsonl asks {strangers[0]!r}, no prompt of the toy world"
        )
    return [str(prompt) for prompt in prompts]


def check_checkpoint(path: str | Path, flag: str, kind: str) -> None:
    """Raise InputError unless a checkpoint of this kind, over the words of the world, is there."""
    place = f"{flag}={path}"
    require_undamaged(str(path), flag=flag)
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        vocab_size = config["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}: this is not a checkpoint folder") from error
    if not architecture.endswith(kind):
        raise InputError(f"{place}: holds a {architecture}, expected a ...{kind}")
    if vocab_size != len(VOCABULARY):
        raise InputError(f"{place}: knows {vocab_size} tokens, the toy world {len(VOCABULARY)}")


def load_policy(path: str | Path, *, flag: str) -> Model:
    """Load a language model, without the sampling settings that are stored beside it."""
    check_checkpoint(path, flag, "LMHeadModel")
    disable_progress_bar()
    set_verbosity_error()  # generate() warns that responses which have ended go on in EOS
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    return model


def load_tokenizer(path: str | Path, *, flag: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; raise InputError if its words are not the world's."""
    check_checkpoint(path, flag, "LMHeadModel")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.get_vocab() != {word: i for i, word in enumerate(VOCABULARY)}:
        raise InputError(f"{flag}={path}: its tokenizer has other words than the toy world")
    return tokenizer


def load_reward(path: str | Path, *, flag: str) -> Reward:
    """Load a reward model as a function from sequences to rewards (B,)."""
    check_checkpoint(path, flag, "ForSequenceClassification")
    try:
        facts = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))["reward"]
        loss, max_reward, logit_mean = (facts[k] for k in ("loss", "max_reward", "logit_mean"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag}={path}: has no run.json that tells its reward") from error
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    def reward(sequences: Sequences) -> Tensor:
        logits = model(sequences.ids, attention_mask=sequences.mask.long()).logits[:, 0]
        if loss == "regression":
            return 1 + (max_reward - 1) * torch.sigmoid(logits)
        return (logits - logit_mean).clamp(-max_reward, max_reward)

    return reward


@torch.no_grad()
def measure(
    policy: Model,
    rewards: Mapping[str, Reward],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
) -> Result:
    """Let a policy answer every prompt `num_samples` times, and judge the answers."""
    asked = [prompt for prompt in prompts for _ in range(num_samples)]
    sequences = sample(
        policy, tokenizer, asked, temperature=temperature, max_new_tokens=max_new_tokens
    )
    texts = [
        response_text(tokenizer, ids[mask].tolist())
        for ids, mask in zip(sequences.ids, sequences.response_mask, strict=True)
    ]

    def per_prompt(values: Tensor) -> Tensor:  # (B,) -> (N,)
        return values.view(len(prompts), num_samples).mean(dim=1)

    return Result(
        texts=texts[::num_samples],
        gold=per_prompt(torch.tensor(gold_reward(asked, texts))),
        learned={name: per_prompt(reward(sequences)) for name, reward in rewards.items()},
        length=per_prompt(sequences.response_mask.sum(dim=1).float()),
    )


@torch.no_grad()
def sample(
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    temperature: float,
    max_new_tokens: int,
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
        max_new_tokens=max_new_tokens,
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
