"""How a conversation is written: in the project's tags, or by a tokenizer's own chat template.

The tags are plain text, so that the vocabulary stays the base model's:
`<instruction>…</instruction><response>…</response>` and the EOS token. A tokenizer that has a
template of its own keeps it, and everything else that it has.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import InputError
from rlhf.records import Prompt

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
BOS_CHAT_TEMPLATE = "{{- bos_token -}}" + CHAT_TEMPLATE  # for models that expect one
REMEDY = "use --chat_template=tags in run_sft.py"

# Stand-ins for what user text may not become, in characters that Unicode leaves to private use.
# User text that holds one of these characters gets a stand-in for it too.
OPEN, CLOSE = "\ue000", "\ue001"
STAND_IN = re.compile(f"{OPEN}([0-9]+){CLOSE}")
PROBE = f"{OPEN}0{CLOSE}"


class Form(NamedTuple):
    """What a template writes around a response."""

    opening_ids: list[int]  # special tokens between a prompt's ids and the response
    opening: str  # text between these and the response
    closing: str  # text between the response and the stop token
    stop_id: int


def has_tags(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether conversations are written in the project's tags."""
    return tokenizer.chat_template in (None, CHAT_TEMPLATE, BOS_CHAT_TEMPLATE)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every prompt in tags begins with the BOS token."""
    return tokenizer.chat_template == BOS_CHAT_TEMPLATE


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str = "auto"
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that knows the form of the text and has a pad token, EOS if it had none.

    `chat_template` is "auto" (its own template if it has one, else the tags), "tags", or the path
    of a Jinja file. A tokenizer that has been prepared comes back as it is.

    Raises: InputError if it is empty, has no EOS token, is not backed by the `tokenizers` library,
        or the template cannot be used.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{tokenizer.name_or_path}: needs a fast tokenizer (a tokenizer.json)")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers has made an empty one up
        raise InputError(
            f"{tokenizer.name_or_path}: holds no tokenizer; save the model's own there"
        )
    if tokenizer.eos_token is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token")
    if chat_template not in ("auto", "tags"):
        tokenizer.chat_template = read_template(chat_template)
    elif tokenizer.chat_template is None or (chat_template == "tags" and not has_tags(tokenizer)):
        tokenizer = with_tags(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        form_of(tokenizer)
    except InputError as error:
        if chat_template in ("auto", "tags"):
            raise
        cause = str(error).removesuffix(f"; {REMEDY}")
        remedy = "mend the file, or give auto or tags"
        raise InputError(f"--chat_template={chat_template}: {cause}; {remedy}") from error
    return tokenizer


def read_template(path: str) -> str:
    """Read a Jinja file. Raises: InputError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--chat_template={path}: cannot be read ({error}); give auto, tags, or a Jinja file"
        ) from error


def with_tags(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that isolates the tags, and has them as its template.

    It has to be a plain PreTrainedTokenizerFast: GPT-2's own class would forget the isolated tags
    when it is loaded again.
    """
    first = tokenizer("x").input_ids[:1]
    has_bos = tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]
    backend = copy.deepcopy(within_text(tokenizer) or tokenizer.backend_tokenizer)
    tags = Split(Regex("</?(?:instruction|response)>"), behavior="isolated")
    steps: list[PreTokenizer] = [tags]
    if backend.pre_tokenizer is not None:
        steps.append(backend.pre_tokenizer)
    backend.pre_tokenizer = PreTokenizerSequence(steps)
    if has_bos:
        # The template writes it. Written by both, it would come twice.
        backend.post_processor = None
    named: dict[str, Any] = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
    }
    named = {**tokenizer.special_tokens_map, **named}
    if tokenizer.extra_special_tokens:
        named["extra_special_tokens"] = tokenizer.extra_special_tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=BOS_CHAT_TEMPLATE if has_bos else CHAT_TEMPLATE,
    )


@lru_cache(maxsize=8)
def within_text(tokenizer: PreTrainedTokenizerFast) -> Tokenizer | None:
    """Return what tokenises text that stands behind other text; None if the tokenizer itself does.

    Llama 2's, for one, puts a space in front of whatever it is given, and takes it off again.
    """

    def without(part: Any) -> Any:
        if isinstance(part, list):
            return [without(x) for x in part if not is_space(x)]
        if not isinstance(part, dict) or is_space(part):
            return None if is_space(part) else part
        scheme = {"prepend_scheme": "never"} if "prepend_scheme" in part else {}
        return {name: without(value) for name, value in part.items()} | scheme

    def is_space(part: Any) -> bool:
        kind = part.get("type") if isinstance(part, dict) else None
        return kind == "Prepend" or (kind == "Strip" and part.get("content") == " ")

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new = {step: without(state[step]) for step in ("normalizer", "pre_tokenizer", "decoder")}
    if new.items() <= state.items():
        return None
    backend = Tokenizer.from_str(json.dumps(state | new))
    backend.no_padding()
    backend.no_truncation()
    return backend


def prompt_pieces(prompt: Prompt) -> list[str]:
    """Write a prompt in tags, cut where an EOS token stands.

    >>> prompt_pieces("Hi")
    ['<instruction>Hi</instruction><response>']
    >>> prompt_pieces([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
    ...                {"role": "user", "content": "Bye"}])[0]
    '<instruction>Hi</instruction><response>Yes?</response>'
    """
    pieces, system = [""], ""
    for message in messages_of(prompt):
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


def messages_of(prompt: Prompt) -> Sequence[Mapping[str, Any]]:
    """Give a prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens that `split_special_tokens` makes plain text."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def any_of(strings: set[str]) -> re.Pattern[str]:
    """A pattern of these strings, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=lambda x: (-len(x), x)))))


def protected(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match what in user text needs a stand-in.

    Beside special tokens these are tokens that are not called special, but which the template
    writes: DeepSeek's `<｜User｜>` is one. White space, of which Gemma has many tokens, is not.
    """
    template = str(tokenizer.chat_template)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    written = {token for token in added if token in template and not token.isspace()}
    return any_of(special_tokens(tokenizer) | written | {OPEN, CLOSE})


def render(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    """Write a conversation by the tokenizer's own template. Raises: InputError."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # templates are programs and fail in any way
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        prompt = repr(messages[-1]["content"])[:60]
        raise InputError(f"the chat template fails at {prompt} ({cause}); {REMEDY}") from error


def template_pieces(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], **options: Any
) -> list[list[str]]:
    """Write prompts by the tokenizer's own template, cut where user text holds a special token.

    In each row text of the template and such strings take turns; the first is the template's.
    Raises: InputError if the template fails.
    """
    in_answers, elsewhere = any_of(special_tokens(tokenizer) | {OPEN, CLOSE}), protected(tokenizer)
    rows = []
    for prompt in prompts:
        strings: list[str] = []

        def stand_in(match: re.Match[str], strings: list[str] = strings) -> str:
            strings.append(match.group())
            return f"{OPEN}{len(strings) - 1}{CLOSE}"

        messages = []
        for message in messages_of(prompt):
            # Templates look for `</think>` in what the assistant has said.
            pattern = in_answers if message["role"] == "assistant" else elsewhere
            messages.append({**message, "content": pattern.sub(stand_in, message["content"])})
        pieces = STAND_IN.split(render(tokenizer, messages, **options))
        pieces[1::2] = [strings[int(number)] for number in pieces[1::2]]
        rows.append(pieces)
    return rows


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """Find out what the template writes around a response.

    Raises: InputError if it fails, or no special token follows.
    """
    if has_tags(tokenizer):
        return Form([], "", RESPONSE_CLOSE, tokenizer.eos_token_id)
    question = {"role": "user", "content": "x"}
    answer = {"role": "assistant", "content": PROBE}
    prompt = render(tokenizer, [question], add_generation_prompt=True)
    before, _, after = render(tokenizer, [question, answer]).partition(PROBE)
    special = any_of(special_tokens(tokenizer))
    stop = special.search(after)
    if stop is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the chat template ends a response with no special token;"
            f" {REMEDY}"
        )
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    end = max((match.end() for match in special.finditer(opening)), default=0)
    ids = tokenizer(opening[:end], add_special_tokens=False).input_ids
    stop_id: Any = tokenizer.convert_tokens_to_ids(stop.group())
    return Form(list(ids), opening[end:], after[: stop.start()], stop_id)
