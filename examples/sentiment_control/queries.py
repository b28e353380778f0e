"""The prompts of the example: a control token, and the first five tokens of a text behind it."""

import random
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from examples.sentiment_control.reward import REWARDS
from rlhf.records import write_records

TEMPLATE = str(Path(__file__).parent / "raw.jinja")
QUERY_TOKENS, RESPONSE_TOKENS = 5, 20
NUM_TRAIN, NUM_HELDOUT = 1024, 256  # queries, each of which comes with every control token


def cut(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str] | None:
    """Cut the query off a text, and as many tokens more as a response has.

    None if the text is too short, or the query would be other tokens behind a control token: the
    cut may fall into the middle of a character.
    """
    ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    query_ids, rest = ids[:QUERY_TOKENS], ids[QUERY_TOKENS : QUERY_TOKENS + RESPONSE_TOKENS]
    query, control = tokenizer.decode(query_ids), next(iter(REWARDS))
    control_ids, prompt_ids = tokenizer([control, control + query]).input_ids
    if len(rest) < RESPONSE_TOKENS or prompt_ids != control_ids + query_ids:
        return None
    return query, tokenizer.decode(rest)


def write_prompts(folder: Path, queries: Iterable[str], rng: random.Random) -> None:
    """Write every query with every control token; no query is in both train and eval."""
    found: dict[str, None] = {}
    for query in queries:
        found[query] = None
        if len(found) == NUM_HELDOUT + NUM_TRAIN:
            break
    unique = list(found)
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"eval": unique[:NUM_HELDOUT], "train": unique[NUM_HELDOUT:]}
    for side, some in sides.items():
        rows = [{"prompt": control + query} for query in some for control in REWARDS]
        rng.shuffle(rows)
        write_records(folder / f"{side}.jsonl", rows)
