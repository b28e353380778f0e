"""PROMPTS: what the policy is to answer."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.files import read_rows
from rlhf.metrics import say
from rlhf.records import PROMPT, prompt_text, read_split
from rlhf.sources import Prompt, UnusablePrompt, as_prompt, prompt_id
from rlhf.tokens import count_dropped, encode_prompts, has_room


class Prompts(NamedTuple):
    """Prompts as ids, and as the text that reward functions and people see."""

    ids: list[list[int]]
    texts: list[str]

    def select(self, rows: Iterable[int]) -> "Prompts":
        """Take some of them, some perhaps several times."""
        taken = [(self.ids[row], self.texts[row]) for row in rows]
        return Prompts([ids for ids, _ in taken], [text for _, text in taken])


def load_prompts(
    data_dir: str,
    side: str,
    max_samples: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    min_len: int,  # of a response
) -> Prompts:
    """Read the prompts of one side that leave room for a response, and say how many do not."""
    prompts = [record["prompt"] for record in read_split(data_dir, side, PROMPT, max_samples)]
    fitting = [
        (ids, prompt_text(prompt))
        for ids, prompt in zip(encode_prompts(tokenizer, prompts, data_dir), prompts, strict=True)
        if has_room(ids, max_len=max_len, min_len=min_len)
    ]
    say(count_dropped(len(fitting), len(prompts), side=side, max_len=max_len, min_len=min_len))
    return Prompts([ids for ids, _ in fitting], [text for _, text in fitting])


def read_prompts(path: str, max_prompts: int, *, flag: str) -> list[Prompt]:
    """Read the prompts of a file, each once; its first `max_prompts` (0 = all).

    Rows have a `prompt`, as those of `.data`, or an `instruction`, as AlpacaEval's have.
    Raises: InputError if there is no such file or prompt, naming the first row that has none.
    """
    if not Path(path).is_file():
        seen = "is a folder" if Path(path).is_dir() else "there is no such file"
        raise InputError(f"{flag}={path}: {seen}; give a .jsonl or .json of prompts")
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(read_rows(Path(path), flag=flag), start=1):
        told = f"{flag}={path}: row {number}"
        if not isinstance(row, dict) or not row.keys() & {"prompt", "instruction"}:
            seen = f"only {list(row)}" if isinstance(row, dict) else "no JSON object"
            raise InputError(f"{told}: expected a prompt or an instruction, but there is {seen}")
        try:
            prompt = as_prompt(row["prompt"] if "prompt" in row else row["instruction"])
        except UnusablePrompt as flaw:
            raise InputError(f"{told}: {flaw}") from flaw
        prompts.setdefault(prompt_id(prompt), prompt)
        if len(prompts) == max_prompts:
            break
    if not prompts:
        raise InputError(f"{flag}={path}: holds no prompt")
    return list(prompts.values())
