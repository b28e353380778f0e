"""Small models of many families, with tokenizers as their makers ship them."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.conftest import EOS, build_base_tokenizer

CHATML = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim -}}"
    "{{- '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
GEMMA = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}"
    "{{- m.content | trim + '<end_of_turn>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
# Writes something between the prompt and the response, and a text before the stop token.
THINKING = CHATML.replace(
    "m.role + '\\n' + m.content",
    "m.role + '\\n' + ('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + m.content"
    " + (' .' if m.role == 'assistant' else '')",
)


def build_tokenizer(
    template: str | None = None,
    *,
    more: tuple[str, ...] = (),
    adds_bos: bool = False,
    plain: tuple[str, ...] = (),
    **named: str,
) -> PreTrainedTokenizerFast:
    """A base tokenizer with further special tokens (and `plain` ones, which are only added)."""
    tokenizer = build_base_tokenizer()
    tokenizer.add_special_tokens({**named, "extra_special_tokens": list(more)})
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.add_bos_token = True
    return tokenizer


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def pythia_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(pad_token="<|padding|>")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return build_tokenizer(LLAMA3, more=names, adds_bos=True, bos_token="<|begin_of_text|>")


def qwen_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    names = ("<|im_start|>", "<|im_end|>")
    named = {"eos_token": "<|im_end|>", "pad_token": EOS}
    tokenizer = build_tokenizer(template, more=names, plain=("<think>", "</think>"), **named)
    return tokenizer


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    names = ("<start_of_turn>", "<end_of_turn>")
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return build_tokenizer(GEMMA, more=names, adds_bos=True, **named)


def opt_tokenizer() -> PreTrainedTokenizerFast:
    named = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return build_tokenizer(adds_bos=True, **named)


class Family(NamedTuple):
    """How to build a model of a family."""

    model_type: str
    tokenizer: Any
    config: dict[str, Any]
    stops: tuple[str, ...] = ()  # of its generation config, beside the tokenizer's EOS


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CAPPED = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5, "sliding_window": 8}
FAMILIES = {
    "gpt2": Family("gpt2", gpt2_tokenizer, {}),
    "pythia": Family("gpt_neox", pythia_tokenizer, {}),
    "llama": Family("llama", llama_tokenizer, GROUPED, ("<|eot_id|>",)),
    "qwen2": Family("qwen2", qwen_tokenizer, GROUPED, (EOS,)),
    "qwen3": Family("qwen3", lambda: qwen_tokenizer(THINKING), GROUPED, (EOS,)),
    "gemma": Family("gemma", gemma_tokenizer, GROUPED),
    "gemma2": Family("gemma2", gemma_tokenizer, GROUPED | CAPPED, ("<end_of_turn>",)),
    "gemma3": Family("gemma3_text", gemma_tokenizer, GROUPED | {"sliding_window": 8}),
    "opt": Family("opt", opt_tokenizer, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
}


def build_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Two layers of random weights, whose logits differ clearly."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **family.config,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(family.stops))]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=None)
    return model, tokenizer


def save_base(name: str, folder: Path) -> str:
    """Write a base model as the Hub would give it."""
    model, tokenizer = build_model(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
