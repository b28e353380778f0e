"""PROMPTS: what the policy is to answer."""

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.metrics import say
from rlhf.records import PROMPT, prompt_text, read_split
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
