"""CHAT: what a model answers in a conversation, a token at a time.

It reads and samples as a rollout of PPO does; with the same seed, turn and row it writes the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.actors import build_sampling
from rlhf.batches import Room, build_batch
from rlhf.checkpoints import require_undamaged
from rlhf.errors import DIVERGED, InputError, RunError
from rlhf.generation import Slots, begin, generate
from rlhf.kv_cache import has_plain_cache
from rlhf.models import (
    LANGUAGE_MODEL,
    load_policy,
    load_tokenizer,
    model_stop_ids,
    positions_of,
)
from rlhf.records import Prompt, prompt_text
from rlhf.responses import Written
from rlhf.rewards import Scorer
from rlhf.runtime import Runtime
from rlhf.sampling import Sampling
from rlhf.sources import Message, UnusablePrompt, as_prompt
from rlhf.templates import form_of
from rlhf.tokens import Sample, decode_response, encode_prompts, encode_texts, has_room

MIN_GEN_LEN = 1  # as in run_ppo.py: an answer is not over before it begins
UNFINISHED = "\ufffd"  # what decoding makes of a character that has not all its bytes yet


class Voice(NamedTuple):
    """A model to talk to."""

    name: str
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    max_len: int  # tokens of conversation and answer


class Answer(NamedTuple):
    """What has been written so far."""

    ids: list[int]
    text: str
    is_whole: bool  # ended by itself: not being written, stopped, or cut


class Exchange(NamedTuple):
    """A question and its answer."""

    asked: str
    answer: Answer
    author: str  # the name of the voice
    prompt: Prompt  # what the voice has read
    num_dropped: int  # earlier exchanges that had no room
    score: float | None = None

    def dropped_note(self) -> str:
        """Say how much of the conversation the voice has not read."""
        questions = "question" if self.num_dropped == 1 else f"{self.num_dropped} questions"
        return f"without the oldest {questions}, for which there was no room"


def load_tokenizer_of(name: str, path: str) -> PreTrainedTokenizerFast:
    """Check that a checkpoint can be talked to, and load its tokenizer. Raises: InputError."""
    flag = f"--model_path={name}"
    require_undamaged(path, flag=flag)
    return load_tokenizer(path, flag=flag, kind=LANGUAGE_MODEL, max_len=0)


def load_voice(
    name: str,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_len: int,
    device: torch.device,
) -> Voice:
    """Load a model to talk to; it reads no more tokens than it has positions."""
    model = load_policy(path, flag=f"--model_path={name}", device=device).requires_grad_(False)
    most = min(max_len, positions_of(model.config) or max_len)
    return Voice(name, path, model, tokenizer, model_stop_ids(model, tokenizer), most)


def unknown_note(voices: Sequence[Voice], question: str) -> str:
    """Say how much of a question models have no word for; "" if all of it is known to all."""
    names: dict[str, list[str]] = {}
    for voice in voices:
        (ids,) = encode_texts(voice.tokenizer, [question])
        if unknown := ids.count(voice.tokenizer.unk_token_id):
            names.setdefault(f"{unknown} of {len(ids)}", []).append(voice.name)
    return "; ".join(
        f"note: {share} tokens of this question are unknown to {', '.join(who)}"
        for share, who in names.items()
    )


def as_messages(exchanges: Sequence[Exchange], question: str) -> list[Message]:
    """Give a conversation as messages, up to a question that is not answered yet."""
    messages: list[Message] = []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.asked})
        messages.append({"role": "assistant", "content": exchange.answer.text})
    return [*messages, {"role": "user", "content": question}]


def read_prompt(
    voice: Voice, exchanges: Sequence[Exchange], question: str, *, max_new_tokens: int
) -> tuple[Prompt, list[int], int]:  # as a record has it, as ids, exchanges left out
    """Give what a voice is to answer: as much of the end of a conversation as leaves room.

    Room for a whole answer, that is, or for half of what the model can read.
    Raises: InputError if the question alone leaves none, or is no text.
    """
    room = min(max_new_tokens, voice.max_len // 2)
    for first in range(len(exchanges) + 1):
        messages = as_messages(exchanges[first:], question)
        try:
            prompt = as_prompt(messages if messages[1:] else question)
        except UnusablePrompt as flaw:
            raise InputError(f"this cannot be asked: {flaw}") from flaw
        (ids,) = encode_prompts(voice.tokenizer, [prompt])
        if has_room(ids, max_len=voice.max_len, min_len=room):
            return prompt, ids, first
    if not has_room(ids, max_len=voice.max_len, min_len=MIN_GEN_LEN):
        raise InputError(
            f"the question takes {len(ids)} tokens, and {voice.name} can read {voice.max_len} with"
            " its answer: ask a shorter one"
        )
    return prompt, ids, len(exchanges)


class Settings(NamedTuple):
    """What can be changed from question to question; the names are the flags'."""

    temperature: float  # 0 = greedily
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int


def sampling_of(voice: Voice, settings: Settings) -> Sampling:
    """Set how a voice draws its answer."""
    is_sampled = settings.temperature > 0
    own = {"do_sampling": is_sampled, "temperature": settings.temperature or 1.0}
    limits = {"min_gen_len": MIN_GEN_LEN, "max_len": voice.max_len}
    return build_sampling({**settings._asdict(), **own, **limits}, voice.tokenizer, voice.model)


class Spoken(Written):
    """What is written to be read at once: by what it could have been replaced, nobody asks."""

    def keep(self, rows: Tensor, positions: Tensor, kept_ids: Tensor) -> None:
        """Store nothing."""


@torch.no_grad()
def write(
    voice: Voice,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    noise_key: tuple[int, int],  # the seed, and how many questions came before
    row: int,  # which of several voices
    runtime: Runtime,
) -> Iterator[list[int]]:
    """Write an answer; gives its ids anew with every token, the same that `generate` writes.

    A model that remembers a text in a way of its own gives the whole answer at once.
    """
    named: Any = {"sampling": sampling, "noise_key": noise_key, "rows": [row]}
    if not has_plain_cache(voice.model):
        with runtime.autocast():
            rollout = generate(voice.model, [prompt_ids], room=Room(1), **named)
        yield rollout.responses()[0]
        return
    begun, columns = begin(voice.model, [prompt_ids], **named)
    written = Spoken(begun.limits, begun.noise, sampling)
    slots = Slots(voice.model, written, 1, columns)
    with runtime.autocast():  # not around a yield: other answers are written in between
        slots.fill([0], [0], [prompt_ids])
    while True:
        if not written.healthy[0]:
            raise RunError(f"{voice.name}: its logits are not finite. {DIVERGED}")
        yield written.ids[0, : int(written.lengths[0])].tolist()
        if slots.rows[0] == written.nobody:
            return
        with runtime.autocast():
            slots.step()


def read_answer(voice: Voice, ids: list[int], *, is_over: bool) -> Answer:
    """Turn the ids of an answer into its text.

    While it is being written, what may yet turn out to be something else is held back: half a
    character, and the beginnings of what the form writes around a response.
    """
    is_whole = bool(ids) and ids[-1] in voice.stop_ids
    text = decode_response(voice.tokenizer, ids[:-1] if is_whole else ids)
    if is_over or is_whole:
        return Answer(ids, text, is_whole)
    form = form_of(voice.tokenizer)
    if form.opening.startswith(text) or ids == form.opening_ids[: len(ids)]:
        return Answer(ids, "", False)
    text = text.rstrip(UNFINISHED)
    beginnings = [form.closing[:n] for n in range(len(form.closing) - 1, 0, -1)]
    while held := next((x for x in beginnings if text.endswith(x)), ""):
        text = text.removesuffix(held)
    return Answer(ids, text, False)


def score_answer(
    judge: Scorer, voice: Voice, prompt: Prompt, prompt_ids: list[int], answer: Answer
) -> float:
    """Ask a reward model about an answer."""
    pad_id: Any = voice.tokenizer.pad_token_id
    batch = build_batch([Sample(prompt_ids, answer.ids)], pad_id=pad_id).to(voice.model.device)
    ended = torch.tensor([answer.is_whole], device=voice.model.device)
    return float(judge([prompt_text(prompt)], [answer.text], batch, ended, Room(1)))


def answer(
    voice: Voice,
    exchanges: Sequence[Exchange],
    question: str,
    settings: Settings,
    *,
    turn: int,  # how many questions came before
    row: int,  # which of several voices
    judge: Scorer | None,
    runtime: Runtime,
) -> Iterator[Exchange]:
    """Answer a question: gives the exchange anew with every token, at last with its score.

    Raises: InputError if it cannot be asked.
    """
    most = settings.max_new_tokens
    prompt, prompt_ids, dropped = read_prompt(voice, exchanges, question, max_new_tokens=most)
    sampling, noise_key = sampling_of(voice, settings), (settings.seed, turn)
    for ids in write(voice, prompt_ids, sampling, noise_key=noise_key, row=row, runtime=runtime):
        written = read_answer(voice, ids, is_over=False)
        yield Exchange(question, written, voice.name, prompt, dropped)
    final = read_answer(voice, ids, is_over=True)
    score = None if judge is None else score_answer(judge, voice, prompt, prompt_ids, final)
    yield Exchange(question, final, voice.name, prompt, dropped, score)
