"""Records to token ids, and ids back to text.

The text form is `<instruction>…</instruction><response>…</response>` and the EOS token. The tags
are plain text, so that the vocabulary stays the base model's. Dialogues repeat the pair of tags,
with EOS after each response.

Prompt and response are tokenised apart and joined as ids, once, here. Two things make that the same
as tokenising the whole text at once, as other tools do: the saved tokenizer cuts the text at the
tags before BPE may merge across them, and the form is stored as its chat template.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import InputError
from rlhf.records import Prompt
from rlhf.token_cache import cached_ids

PROMPT_OPEN, PROMPT_CLOSE = "<instruction>", "</instruction>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<response>", "</response>"

# `generation` marks what the model writes, so that other trainers can mask the rest of the loss.
CHAT_TEMPLATE = (
    "{%- set system = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}"
    "{%- set system.text = message.content + '\\n\\n' -%}"
    "{%- elif message.role == 'user' -%}"
    "{{- '<instruction>' + system.text + message.content + '</instruction>' -}}"
    "{%- set system.text = '' -%}"
    "{%- else -%}"
    "{{- '<response>' -}}"
    "{%- generation -%}{{- message.content + '</response>' + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<response>' -}}{%- endif -%}"
)


class Sample(NamedTuple):
    """A prompt and a response as ids. The response ends with EOS unless it was cut."""

    prompt_ids: list[int]
    response_ids: list[int]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Return the tokenizer that knows the text form: tags isolated, pad = EOS, chat template.

    It has to be a plain PreTrainedTokenizerFast: GPT-2's own class would forget the isolated tags
    when it is loaded again. A tokenizer that has been prepared comes back as it is.

    Raises: InputError if it has no EOS token or is not backed by the `tokenizers` library.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{tokenizer.name_or_path}: needs a fast tokenizer (a tokenizer.json)")
    if tokenizer.eos_token is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    tags = Split(Regex("</?(?:instruction|response)>"), behavior="isolated")
    steps: list[PreTokenizer] = [tags]
    if backend.pre_tokenizer is not None:
        steps.append(backend.pre_tokenizer)
    backend.pre_tokenizer = PreTokenizerSequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.eos_token,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    data_dir: str | Path | None = None,
) -> list[list[int]]:
    """Tokenise texts as nothing but text: a special token's name in them stays plain text.

    With `data_dir` the ids are kept there for the next time.
    """

    def encode(texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return tokenizer(list(texts), **options, verbose=False).input_ids

    return cached_ids(tokenizer, texts, encode, data_dir) if texts else []


def prompt_pieces(prompt: Prompt) -> list[str]:
    """Write a prompt in the text form, cut where an EOS token stands.

    >>> prompt_pieces("Hi")
    ['<instruction>Hi</instruction><response>']
    >>> prompt_pieces([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
    ...                {"role": "user", "content": "Bye"}])[0]
    '<instruction>Hi</instruction><response>Yes?</response>'
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pieces, system = [""], ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            system = content + "\n\n"
        elif message["role"] == "user":
            pieces[-1] += PROMPT_OPEN + system + content + PROMPT_CLOSE
            system = ""
        else:
            pieces[-1] += RESPONSE_OPEN + content + RESPONSE_CLOSE
            pieces.append("")
    pieces[-1] += RESPONSE_OPEN
    return pieces


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    data_dir: str | Path | None = None,
) -> list[list[int]]:
    """Tokenise prompts up to and with the `<response>` tag after which the response begins."""
    pieces = [prompt_pieces(prompt) for prompt in prompts]
    encoded = iter(encode_texts(tokenizer, [text for texts in pieces for text in texts], data_dir))
    prompt_ids = []
    for texts in pieces:
        ids = list(next(encoded))
        for _ in texts[1:]:
            ids += [tokenizer.eos_token_id, *next(encoded)]
        prompt_ids.append(ids)
    return prompt_ids


def has_room(prompt_ids: Sequence[int], *, max_len: int, min_len: int) -> bool:
    """Whether `max_len` leaves room for a response of `min_len` tokens (at least one)."""
    return max_len - len(prompt_ids) >= max(min_len, 1)


def encode_samples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    max_len: int,
    min_len: int,
    data_dir: str | Path | None = None,
) -> list[Sample | None]:
    """Tokenise pairs of prompt and response.

    A response too long for `max_len` is cut and left without closing tag and EOS, since both would
    teach the model to stop in mid-sentence. None stands for a row whose prompt leaves less room
    than `min_len` tokens.
    """
    closing_ids = closing_tag_ids(tokenizer)
    samples: list[Sample | None] = []
    for prompt_ids, response_ids in zip(
        encode_prompts(tokenizer, prompts, data_dir),
        encode_texts(tokenizer, responses, data_dir),
        strict=True,
    ):
        room = max_len - len(prompt_ids)
        ended_ids = [*response_ids, *closing_ids, tokenizer.eos_token_id]
        if not has_room(prompt_ids, max_len=max_len, min_len=min_len):
            samples.append(None)
        elif len(ended_ids) <= room:
            samples.append(Sample(prompt_ids, ended_ids))
        elif response_ids:
            samples.append(Sample(prompt_ids, response_ids[:room]))
        else:  # white space alone, to a tokenizer that drops it
            samples.append(None)
    return samples


def closing_tag_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `</response>`: three of GPT-2's, one of a vocabulary that has the tag."""
    return encode_texts(tokenizer, [RESPONSE_CLOSE])[0]


def early_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that would end a response: EOS, and the one that opens the closing tag."""
    return sorted({tokenizer.eos_token_id, closing_tag_ids(tokenizer)[0]})


def decode_response(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int]) -> str:
    """Turn a response into the text that people and reward functions see.

    EOS and one trailing closing tag are left out; everything else stays as it was written.
    """
    ids = list(response_ids)
    closing_ids = closing_tag_ids(tokenizer)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if ids[-len(closing_ids) :] == closing_ids:
        return str(tokenizer.decode(ids[: -len(closing_ids)]))
    return str(tokenizer.decode(ids)).removesuffix(RESPONSE_CLOSE)


def count_dropped(num_kept: int, num_rows: int, *, side: str, max_len: int, min_len: int) -> str:
    """Say how many rows were left out because their prompts fill `max_len`.

    Raises: InputError if no row is left.
    """
    if num_kept == 0:
        raise InputError(
            f"--max_len={max_len}: no prompt in {side}.jsonl leaves room for a response of"
            f" {max(min_len, 1)} tokens; raise it, or ask for shorter responses"
        )
    text = f"{side}: {num_kept} rows"
    if num_kept < num_rows:
        text += (
            f"; dropped {num_rows - num_kept}, whose prompts leave no room in --max_len={max_len}"
        )
    return text
