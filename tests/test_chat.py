"""What a voice answers: the same as in a rollout, shown as far as it can be shown."""

from itertools import pairwise

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.batches import Room
from rlhf.chat import (
    Answer,
    Exchange,
    Settings,
    Voice,
    answer,
    read_answer,
    read_prompt,
    sampling_of,
    write,
)
from rlhf.errors import InputError, RunError
from rlhf.generation import generate
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.tokens import early_end_ids, encode_prompts, encode_texts, ending_ids, stop_ids

CPU = Runtime(torch.device("cpu"), "float32", "")
GREEDY = Settings(temperature=0.0, top_k=50, top_p=1.0, max_new_tokens=24, seed=7)


@pytest.fixture
def voice(gpt2: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Voice:
    return Voice("A", "folder", gpt2, tokenizer, stop_ids(tokenizer), max_len=128)


def exchange(asked: str, answered: str, ids: tuple[int, ...] = (5,)) -> Exchange:
    return Exchange(asked, Answer(list(ids), answered, True), "A", asked, 0)


def all_ids(voice: Voice, prompt_ids: list[int], settings: Settings, row: int = 0) -> list[list]:
    key, sampling = (settings.seed, 3), sampling_of(voice, settings)
    return list(write(voice, prompt_ids, sampling, noise_key=key, row=row, runtime=CPU))


@pytest.mark.parametrize("question", ["Name a colour.", "What is the sea?", "Tell me a story"])
def test_greedy_answers_are_what_transformers_generates(voice, tokenizer, question):
    (prompt_ids,) = encode_prompts(tokenizer, [question])
    *_, last = all_ids(voice, prompt_ids, GREEDY)
    expected = voice.model.generate(
        torch.tensor([prompt_ids]),
        do_sample=False,
        max_new_tokens=24,
        begin_suppress_tokens=sampling_of(voice, GREEDY).early_end_ids,
        eos_token_id=voice.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert last == expected[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(0.7, 50, 1.0, 30, 42),
        Settings(1.0, 0, 1.0, 30, 42),
        Settings(1.3, 0, 0.8, 30, 1),
        Settings(1.0, 20, 0.9, 30, 1),
    ],
)
def test_what_is_sampled_is_what_ppo_samples_token_by_token(voice, tokenizer, settings):
    (prompt_ids,) = encode_prompts(tokenizer, ["What did the cat see?"])
    sampling = Sampling(
        do_sampling=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_gen_len=1,  # run_ppo.py's default
        max_new_tokens=30,
        max_len=128,
        pad_id=0,
        stop_ids=[0],
        early_end_ids=early_end_ids(tokenizer, [0]),
    )
    rollout = generate(
        voice.model,
        [prompt_ids],
        sampling=sampling,
        noise_key=(settings.seed, 3),
        rows=[2],
        room=Room(1),
    )
    (expected,) = rollout.responses()
    written = all_ids(voice, prompt_ids, settings, row=2)
    assert written == [expected[: n + 1] for n in range(len(expected))]


def test_seed_turn_and_row_change_what_is_sampled(voice):
    settings = Settings(1.0, 0, 1.0, 20, 42)

    def text(seed: int = 42, turn: int = 0, row: int = 0) -> str:
        options = {"turn": turn, "row": row, "judge": None, "runtime": CPU}
        *_, last = answer(voice, [], "Name a colour.", settings._replace(seed=seed), **options)
        return last.answer.text

    assert text() == text()
    assert len({text(), text(seed=1), text(turn=1), text(row=1)}) == 4


def test_an_answer_in_bits_never_shows_what_turns_out_otherwise(voice, tokenizer):
    """Characters of several bytes, and the closing tag, come in several tokens."""
    text = "naïve 😀 </re> x</response"
    ids = [*encode_texts(tokenizer, [text])[0], *ending_ids(tokenizer)]
    assert len(encode_texts(tokenizer, ["😀"])[0]) == 4 and len(ending_ids(tokenizer)) > 2
    shown = [read_answer(voice, ids[:n], is_over=False).text for n in range(1, len(ids) + 1)]
    assert shown[-1] == text
    for earlier, later in pairwise(shown):
        assert later.startswith(earlier) and "\ufffd" not in earlier
    assert "naïve 😀 </re> x" in shown
    assert [read_answer(voice, ids[:n], is_over=False).is_whole for n in (1, len(ids) - 1)] == [
        False,
        False,
    ]
    assert read_answer(voice, ids, is_over=False).is_whole
    assert read_answer(voice, ids[:-1], is_over=True).text == text  # closed, but cut before EOS


def test_a_conversation_is_read_as_it_is_trained_on(voice, tokenizer):
    exchanges = [exchange("Name a colour.", "Blue.")]
    prompt, ids, dropped = read_prompt(voice, exchanges, "Another?", max_new_tokens=8)
    assert prompt == [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another?"},
    ]
    text = (
        "<instruction>Name a colour.</instruction><response>Blue.</response><|endoftext|>"
        "<instruction>Another?</instruction><response>"
    )
    assert ids == tokenizer(text).input_ids and dropped == 0
    assert read_prompt(voice, [], "Name a colour.", max_new_tokens=8)[0] == "Name a colour."


def test_the_oldest_questions_go_until_there_is_room_for_an_answer(voice):
    exchanges = [exchange(f"Name colour {number}.", "Blue.") for number in range(9)]
    sizes = [
        len(read_prompt(voice._replace(max_len=10**6), exchanges[n:], "Now?", max_new_tokens=8)[1])
        for n in range(10)
    ]
    fitting = next(n for n in range(10) if sizes[n] <= 128 - 20)
    prompt, ids, dropped = read_prompt(voice, exchanges, "Now?", max_new_tokens=20)
    assert (len(ids), dropped) == (sizes[fitting], fitting) and fitting > 0
    assert prompt[0]["content"] == f"Name colour {fitting}."
    # A longer answer may claim half of what the model reads, not all of it.
    half = next(n for n in range(10) if sizes[n] <= 64)
    assert read_prompt(voice, exchanges, "Now?", max_new_tokens=1000)[2] == half < 9


def test_a_question_without_room_is_refused_and_says_why(voice):
    with pytest.raises(InputError, match=r"takes \d+ tokens, and A can read 128 with its answer"):
        read_prompt(voice, [], "colour " * 200, max_new_tokens=8)
    ids = read_prompt(voice, [], "Name a colour. " * 12, max_new_tokens=128)[1]
    assert 64 < len(ids) < 128  # no room for the longest answer, but for one


@pytest.mark.parametrize("question", ["", " \n", "a \ud800 b"])
def test_what_is_no_text_cannot_be_asked(voice, question):
    with pytest.raises(InputError, match="cannot be asked: prompt"):
        read_prompt(voice, [], question, max_new_tokens=8)


def test_the_judge_sees_the_ids_that_were_sampled_and_the_text_that_is_shown(voice):
    seen = []

    def judge(prompts, responses, batch, ended, room):
        seen.append((prompts, responses, batch.prompt_ids, batch.response_ids, ended.tolist()))
        return torch.tensor([1.25])

    talk = [exchange("Name a colour.", "Blue.")]
    options = {"turn": 1, "row": 0, "judge": judge, "runtime": CPU}
    *_, last = answer(voice, talk, "Another?", GREEDY, **options)
    assert last.score == 1.25 and last.author == "A" and last.asked == "Another?"
    ((prompts, responses, prompt_ids, response_ids, ended),) = seen
    assert prompts == ["User: Name a colour.\n\nAssistant: Blue.\n\nUser: Another?"]
    assert responses == [last.answer.text] and ended == [last.answer.is_whole]
    assert response_ids[0].tolist() == last.answer.ids
    assert prompt_ids[0].tolist() == read_prompt(voice, talk, "Another?", max_new_tokens=24)[1]


def test_a_model_that_has_diverged_ends_in_one_line(voice):
    torch.nn.init.constant_(voice.model.transformer.wte.weight, torch.nan)
    options = {"turn": 0, "row": 0, "judge": None, "runtime": CPU}
    with pytest.raises(RunError, match="A: its logits are not finite"):
        list(answer(voice, [], "Name a colour.", GREEDY, **options))


def test_a_model_with_a_memory_of_its_own_answers_at_once(voice, tokenizer, monkeypatch):
    (prompt_ids,) = encode_prompts(tokenizer, ["Name a colour."])
    expected = all_ids(voice, prompt_ids, GREEDY)[-1]
    for module in ("chat", "generation"):
        monkeypatch.setattr(f"rlhf.{module}.has_plain_cache", lambda model: False)
    assert all_ids(voice, prompt_ids, GREEDY) == [expected]
