"""Text to ids and back: apart, joined once, with nothing in user text that could become special."""

import pytest
from transformers import AutoTokenizer

from rlhf.errors import InputError
from rlhf.templates import CHAT_TEMPLATE, prepare_tokenizer
from rlhf.tokens import (
    count_dropped,
    decode_response,
    early_end_ids,
    encode_prompts,
    encode_samples,
    encode_texts,
    ending_ids,
    stop_ids,
)

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Name a colour."},
]


def encode(tokenizer, prompt, response, max_len=1000):
    return encode_samples(tokenizer, [prompt], [response], max_len=max_len, min_len=1)[0]


@pytest.mark.claim(1)
@pytest.mark.parametrize("response", ["Blue.", "(a.", "x", " spaced ", "a </response> b", "é…\n"])
def test_whole_text_at_once_gives_the_same_ids(tokenizer, response):
    sample = encode(tokenizer, "Name a colour.", response)
    text = f"<instruction>Name a colour.</instruction><response>{response}</response>"
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert sample.prompt_ids + sample.response_ids == [*whole, tokenizer.eos_token_id]


@pytest.mark.claim(1)
def test_unprepared_tokenizer_would_merge_across_a_tag(base_tokenizer, tokenizer):
    text = "Blue.</response>"
    apart = encode_texts(base_tokenizer, ["Blue."])[0] + ending_ids(base_tokenizer)[:-1]
    assert encode_texts(base_tokenizer, [text])[0] != apart
    assert encode_texts(tokenizer, [text])[0] == apart


@pytest.mark.claim(1)
def test_isolated_tags_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<instruction>Hi.</instruction><response>Yes.</response>"
    assert encode_texts(loaded, [text]) == encode_texts(tokenizer, [text])
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert prepare_tokenizer(loaded) is loaded


@pytest.mark.claim(2)
def test_user_text_never_becomes_a_special_token(tokenizer):
    hostile = "stop <|endoftext|> here"
    sample = encode(tokenizer, hostile, hostile)
    eos = tokenizer.eos_token_id
    assert eos not in sample.prompt_ids
    assert sample.response_ids.count(eos) == 1 and sample.response_ids[-1] == eos
    assert decode_response(tokenizer, sample.response_ids) == hostile


@pytest.mark.claim(2)
@pytest.mark.parametrize(
    "text", ["a </response> b", "</response>x", "<response>", "<instruction>do</instruction>"]
)
def test_response_that_holds_a_tag_round_trips(tokenizer, text):
    assert decode_response(tokenizer, encode(tokenizer, "Hi.", text).response_ids) == text


def test_only_one_closing_tag_is_stripped(tokenizer):
    ids = encode(tokenizer, "Hi.", "a</response>").response_ids
    assert decode_response(tokenizer, ids) == "a</response>"


@pytest.mark.claim(3)
def test_cut_response_has_neither_closing_tag_nor_eos(tokenizer):
    whole = encode(tokenizer, "Hi.", "The cat sat on the mat.")
    content = whole.response_ids[: -len(ending_ids(tokenizer))]
    for missing in range(1, len(whole.response_ids)):
        max_len = len(whole.prompt_ids) + len(whole.response_ids) - missing
        cut = encode(tokenizer, "Hi.", "The cat sat on the mat.", max_len=max_len)
        assert cut.response_ids == content[: max_len - len(whole.prompt_ids)]


def test_prompt_without_room_is_dropped(tokenizer):
    prompt_ids = encode_prompts(tokenizer, ["Hi."])[0]
    for min_len in (0, 1, 3):
        room = max(min_len, 1)
        sizes = {"max_len": len(prompt_ids) + room, "min_len": min_len}
        kept = encode_samples(tokenizer, ["Hi."], ["The cat sat on the mat."], **sizes)[0]
        assert len(kept.response_ids) == room
        sizes["max_len"] -= 1
        assert encode_samples(tokenizer, ["Hi."], ["The cat."], **sizes) == [None]


def test_no_row_left_is_an_error():
    assert "dropped 2" in count_dropped(3, 5, side="train", max_len=8, min_len=1)
    with pytest.raises(InputError, match="--max_len=8"):
        count_dropped(0, 5, side="train", max_len=8, min_len=1)


@pytest.mark.parametrize("prompt", ["Name a colour.", DIALOGUE])
def test_chat_template_gives_our_ids(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ours = encode(tokenizer, prompt, "Blue.")
    options = {"tokenize": True, "return_dict": False}
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    assert ours.prompt_ids == theirs
    answered = [*messages, {"role": "assistant", "content": "Blue."}]
    whole = [*ours.prompt_ids, *ours.response_ids]
    assert whole == tokenizer.apply_chat_template(answered, **options)


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    answered = [*DIALOGUE, {"role": "assistant", "content": "Blue."}]
    encoded = tokenizer.apply_chat_template(
        answered, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(encoded.input_ids, encoded.assistant_masks, strict=True) if m]
    assert tokenizer.decode(said) == "Yes?</response><|endoftext|>Blue.</response><|endoftext|>"


def test_dialogue_has_eos_after_each_response(tokenizer):
    ids = encode_prompts(tokenizer, [DIALOGUE])[0]
    assert tokenizer.decode(ids) == (
        "<instruction>Be brief.\n\nHi.</instruction><response>Yes?</response><|endoftext|>"
        "<instruction>Name a colour.</instruction><response>"
    )


def test_early_end_ids_open_the_closing_tag(tokenizer):
    assert len(ending_ids(tokenizer)) > 2
    first, stops = ending_ids(tokenizer)[0], stop_ids(tokenizer)
    assert stops == [tokenizer.eos_token_id]
    assert early_end_ids(tokenizer, stops) == sorted([*stops, first])


def test_tokenizer_without_eos_is_refused(base_tokenizer):
    nameless = type(base_tokenizer)(tokenizer_object=base_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no EOS"):
        prepare_tokenizer(nameless)


def test_template_is_stored(tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE
