"""Records to token ids, and ids back to text.

Prompt and response are tokenised apart and joined as ids, once, here. Two things make that the same
as tokenising the whole text at once, as other tools do: a prepared tokenizer cuts the text at the
tags before BPE may merge across them, and the form is stored as its chat template. What the text
looks like, `rlhf.templates` tells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.records import Prompt
from rlhf.templates import (
    form_of,
    has_tags,
    prompt_pieces,
    starts_with_bos,
    template_pieces,
    within_text,
)
from rlhf.token_cache import cached_ids

# Who wrote a text: users and models; a template, from the beginning on; a template, further on.
TEXT, START, REST = "text", "start", "rest"


class Sample(NamedTuple):
    """A prompt and a response as ids. The response ends with its stop token unless it was cut."""

    prompt_ids: list[int]
    response_ids: list[int]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    data_dir: str | Path | None = None,
    *,
    kind: str = TEXT,
) -> list[list[int]]:
    """Tokenise texts as nothing but text: a special token's name in them stays plain text.

    It is the token only in what a template has written, of which `kind` tells START and REST. With
    `data_dir` the ids are kept there for the next time.
    """

    def encode(texts: Sequence[str]) -> list[list[int]]:
        backend = None if kind == START else within_text(tokenizer)
        if backend is None:
            options = {"add_special_tokens": False, "split_special_tokens": kind == TEXT}
            return tokenizer(list(texts), **options, verbose=False).input_ids
        backend.encode_special_tokens = kind == TEXT
        return [x.ids for x in backend.encode_batch(list(texts), add_special_tokens=False)]

    return cached_ids(tokenizer, texts, encode, data_dir, kind=kind) if texts else []


def encode_special(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """Tokenise the name of a special or added token as plain text."""
    ids = encode_texts(tokenizer, [token])[0]
    if not set(ids) & tokenizer.added_tokens_decoder.keys():
        return ids
    # An added token that is not called special is always found, but not its halves.
    return [i for part in encode_texts(tokenizer, [token[:1], token[1:]]) for i in part]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    data_dir: str | Path | None = None,
) -> list[list[int]]:
    """Tokenise prompts up to where the response begins."""
    if not has_tags(tokenizer):
        return encode_by_template(tokenizer, prompts, data_dir, add_generation_prompt=True)
    pieces = [prompt_pieces(prompt) for prompt in prompts]
    encoded = iter(encode_texts(tokenizer, [text for texts in pieces for text in texts], data_dir))
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    prompt_ids = []
    for texts in pieces:
        ids = [*bos, *next(encoded)]
        for _ in texts[1:]:
            ids += [tokenizer.eos_token_id, *next(encoded)]
        prompt_ids.append(ids)
    return prompt_ids


def encode_by_template(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    data_dir: str | Path | None = None,
    **options: Any,
) -> list[list[int]]:
    """Tokenise prompts, or whole conversations, as the tokenizer's own template writes them.

    `options` are the template's. A prompt without a special token's name is tokenised whole, as
    other tools do.
    """
    rows = template_pieces(tokenizer, prompts, **options)
    prompt_ids = encode_texts(tokenizer, [pieces[0] for pieces in rows], data_dir, kind=START)
    for ids, pieces in zip(prompt_ids, rows, strict=True):
        rest = encode_texts(tokenizer, pieces[2::2], kind=REST)
        for token, more in zip(pieces[1::2], rest, strict=True):
            ids += [*encode_special(tokenizer, token), *more]
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

    A response too long for `max_len` is cut and left without closing text and stop token, since
    both would teach the model to stop in mid-sentence. None stands for a row whose prompt leaves
    less room than `min_len` tokens.
    """
    form, ending = form_of(tokenizer), ending_ids(tokenizer)
    if form.opening:
        responses = [form.opening + response for response in responses]
    samples: list[Sample | None] = []
    for prompt_ids, written_ids in zip(
        encode_prompts(tokenizer, prompts, data_dir),
        encode_texts(tokenizer, responses, data_dir),
        strict=True,
    ):
        room = max_len - len(prompt_ids)
        response_ids = [*form.opening_ids, *written_ids]
        ended_ids = [*response_ids, *ending]
        if not has_room(prompt_ids, max_len=max_len, min_len=min_len):
            samples.append(None)
        elif len(ended_ids) <= room:
            samples.append(Sample(prompt_ids, ended_ids))
        elif response_ids:
            samples.append(Sample(prompt_ids, response_ids[:room]))
        else:  # white space alone, to a tokenizer that drops it
            samples.append(None)
    return samples


def ending_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a response: `</response>` and EOS, or what a template has instead."""
    form = form_of(tokenizer)
    closing = encode_texts(tokenizer, [form.closing])[0] if form.closing else []
    return [*closing, form.stop_id]


def stop_ids(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None = None) -> list[int]:
    """Return the ids at which a response ends: the form's, EOS, and those that a model has itself.

    `own` is what the model's generation config names.
    """
    more = own if isinstance(own, list) else [own]
    known = [i for i in more if i is not None and 0 <= i < len(tokenizer)]
    return list(dict.fromkeys([form_of(tokenizer).stop_id, tokenizer.eos_token_id, *known]))


def same_tokenizer(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both tokenizers give the same ids, for text and around it."""
    probe = ["<instruction>Is 2+2=4?</instruction><response>Yes, naturally.</response>"]

    def facts(of: PreTrainedTokenizerBase) -> tuple[Any, ...]:
        return of.get_vocab(), encode_texts(of, probe), of.chat_template, of.pad_token_id

    return facts(tokenizer) == facts(other) and ending_ids(tokenizer) == ending_ids(other)


def require_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, flag: str
) -> None:
    """Stop unless both give the same ids. Raises: InputError."""
    if not same_tokenizer(tokenizer, other):
        raise InputError(
            f"{flag}: its tokenizer, chat template or pad token differs from the SFT model's; train"
            " it by run_rm.py from that SFT model"
        )


def early_end_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[int]:
    """Return the ids that would end a response: stops, and what opens the closing text."""
    return sorted({*stops, ending_ids(tokenizer)[0]})


def decode_response(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int]) -> str:
    """Turn a response into the text that people and reward functions see.

    What the form writes around it is left out; everything else stays as it was written.
    """
    ids, form = list(response_ids), form_of(tokenizer)
    closing_ids = ending_ids(tokenizer)[:-1]
    if ids and ids[-1] in (form.stop_id, tokenizer.eos_token_id):
        ids.pop()
    if form.opening_ids and ids[: len(form.opening_ids)] == form.opening_ids:
        ids = ids[len(form.opening_ids) :]
    closing = form.closing
    if closing_ids and ids[-len(closing_ids) :] == closing_ids:
        ids, closing = ids[: -len(closing_ids)], ""
    backend = within_text(tokenizer)
    if backend is None:
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    else:
        text = backend.decode(ids, skip_special_tokens=False)
    return text.removesuffix(closing).removeprefix(form.opening)


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
