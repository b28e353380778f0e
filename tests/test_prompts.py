"""Prompts as the policy gets them."""

import pytest

from rlhf.prompts import Prompts, load_prompts
from tests.conftest import write_jsonl


def test_prompts_are_taken_in_the_order_asked_for_and_several_times():
    prompts = Prompts([[1], [2, 3], [4]], ["a", "b", "c"])
    assert prompts.select([2, 2, 0]) == Prompts([[4], [4], [1]], ["c", "c", "a"])


@pytest.mark.parametrize(("min_len", "kept"), [(1, ["Hi", "Tell me a story"]), (20, ["Hi"])])
def test_prompts_without_room_for_a_response_are_left_out_and_counted(
    tokenizer, tmp_path, capsys, min_len, kept
):
    texts = ["Hi", "Tell me a story", "Tell me a story about the sea " * 9]
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": text} for text in texts])
    limits = {"max_len": 33, "min_len": min_len}
    prompts = load_prompts(str(tmp_path), "train", 0, tokenizer=tokenizer, **limits)
    assert prompts.texts == kept and len(prompts.ids) == len(kept)
    assert f"train: {len(kept)} rows; dropped {3 - len(kept)}," in capsys.readouterr().out
