"""Prompts as the policy gets them."""

import json
import re

import pytest

from rlhf.errors import InputError
from rlhf.prompts import Prompts, load_prompts, read_prompts
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


def test_a_file_of_prompts_may_have_several_forms_and_gives_each_prompt_once(tmp_path):
    dialogue = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    write_jsonl(tmp_path / "ours.jsonl", [{"prompt": x} for x in ("Hi", "hi ", dialogue)])
    ours = read_prompts(f"{tmp_path}/ours.jsonl", 0, flag="--prompts")
    assert ours == ["Hi", dialogue]
    rows = [{"instruction": text, "output": "x", "generator": "y"} for text in ("One", "Two")]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    assert read_prompts(f"{tmp_path}/alpaca.json", 0, flag="--prompts") == ["One", "Two"]
    assert read_prompts(f"{tmp_path}/alpaca.json", 1, flag="--prompts") == ["One"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\nnot json\n', "row 2: expected a prompt or an instruction"),
        ('{"prompt": "a"}\n{"instruction": ""}\n', "row 2: prompt "),
        ('["a", "b"]\n', "row 1: expected a prompt"),
    ],
)
def test_a_file_without_prompts_is_named_with_the_row(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=re.escape(f"--prompts={tmp_path}/x.jsonl: {message}")):
        read_prompts(f"{tmp_path}/x.jsonl", 0, flag="--prompts")
