"""A conversation with several voices: whose answer goes on, and which answers make a pair."""

import json
from contextlib import nullcontext

import pytest

from rlhf.chat import Answer, Exchange, Settings
from rlhf.errors import InputError, RunError
from rlhf.talks import MOST_CHARACTERS, Talk

SETTINGS = Settings(0.7, 50, 1.0, 8, 42)


def said(author: str, text: str, *, asked="Q", prompt="Q", is_whole=True) -> Exchange:
    return Exchange(asked, Answer([1], text, is_whole), author, prompt, 0)


def talk_of(*latest: Exchange | None) -> Talk:
    return Talk([[x] if x else [] for x in latest], list(latest), turn=1)


def streams(texts: dict[int, list[str]], seen: list):
    """Voices that answer with these texts, one letter after the other."""

    def answer(row, exchanges, question, settings, turn):
        seen.append((row, [x.answer.text for x in exchanges], question, turn))
        text = texts[row].pop(0)
        for end in range(1, len(text) + 1):
            yield said("AB"[row], text[:end], asked=question)

    return answer


def test_all_answer_a_token_each_in_turn():
    talk, seen = Talk([[], []], [None, None]), []
    answer = streams({0: ["abc"], 1: ["x"]}, seen)
    rounds = []
    for _ in talk.ask("Q", SETTINGS, answer=answer, turns=nullcontext()):
        rounds.append(tuple(x.answer.text for x in talk.latest))
    assert rounds == [("a", "x"), ("ab", "x"), ("abc", "x"), ("abc", "x")]
    assert [[x.answer.text for x in row] for row in talk.exchanges] == [["abc"], ["x"]]
    assert talk.turn == 1


def test_each_goes_on_from_its_own_answer_until_one_is_better(tmp_path):
    talk, seen = Talk([[], []], [None, None]), []
    answer = streams({0: ["a", "b", "c"], 1: ["x", "y", "z"]}, seen)
    for question in ("1", "2"):
        list(talk.ask(question, SETTINGS, answer=answer, turns=nullcontext()))
    talk.choose(1, tmp_path)
    list(talk.ask("3", SETTINGS, answer=answer, turns=nullcontext()))
    assert seen[2:4] == [(0, ["a"], "2", 1), (1, ["x"], "2", 1)]
    assert seen[4:] == [(0, ["x", "y"], "3", 2), (1, ["x", "y"], "3", 2)]
    assert [[x.answer.text for x in row] for row in talk.exchanges] == [
        ["x", "y", "c"],
        ["x", "y", "z"],
    ]
    assert talk.chosen is None


def test_who_cannot_answer_leaves_the_others_to_it():
    def answer(row, exchanges, question, settings, turn):
        if row == 0:
            raise RunError("A: its logits are not finite")
        yield said("B", "x")

    talk = Talk([[], []], [None, None])
    list(talk.ask("Q", SETTINGS, answer=answer, turns=nullcontext()))
    assert talk.failures == ["A: its logits are not finite"]
    assert [len(row) for row in talk.exchanges] == [0, 1]


def test_stopped_answers_stay_as_far_as_they_are():
    talk = Talk([[], []], [None, None])
    answer = streams({0: ["abcdef"], 1: ["uvwxyz"]}, [])
    for _ in talk.ask("Q", SETTINGS, answer=answer, turns=nullcontext()):
        talk.is_stopped = talk.latest[0].answer.text == "ab"
    assert [row[-1].answer.text for row in talk.exchanges] == ["ab", "uv"]


def test_dropped_exchanges_leave_the_conversation():
    talk = talk_of(said("A", "a"))
    talk.latest = [said("A", "b")._replace(num_dropped=1)]
    talk.end()
    assert [x.answer.text for x in talk.exchanges[0]] == ["b"]


@pytest.mark.parametrize("question", ["", "  \n", "x" * (MOST_CHARACTERS + 1)])
def test_no_question_and_a_long_one_are_refused_before_anything_changes(question):
    talk = talk_of(said("A", "a"))
    with pytest.raises(InputError, match=r"no question|may have 4,000 characters, not 4,001"):
        talk.begin(question)
    assert talk.latest == [said("A", "a")]


def test_the_better_answer_is_paired_with_each_that_differs(tmp_path):
    talk = talk_of(said("A", "a"), said("B", "b"), said("C", "b"), said("D", "d"))
    talk.choose(1, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("Q", "b", "a"),
        ("Q", "b", "d"),
    ]
    assert talk.chosen == 1


def test_answers_to_another_conversation_and_empty_ones_make_no_pair(tmp_path):
    other = said("B", "b", prompt=[{"role": "user", "content": "P"}])
    talk = talk_of(said("A", "a"), other, said("C", " \n"), None, said("E", "e", is_whole=False))
    talk.choose(0, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["rejected"] for row in rows] == ["e"]


@pytest.mark.parametrize(
    ("latest", "told"),
    [
        ([None, said("B", "b")], "there is no answer"),
        ([said("A", " "), said("B", "b")], "there is no answer"),
        ([said("A", "a", is_whole=False), said("B", "b")], "A has not finished"),
        ([said("A", "a"), said("B", "a")], "no other answer"),
        ([said("A", "a"), said("B", "b", prompt="other")], "no other answer"),
    ],
)
def test_what_makes_no_pair_says_why_and_writes_nothing(latest, told, tmp_path):
    talk = talk_of(*latest)
    with pytest.raises(InputError, match=f"no pair: {told}"):
        talk.choose(0, tmp_path)
    assert list(tmp_path.iterdir()) == [] and talk.chosen is None


def test_only_one_answer_to_a_question_is_better(tmp_path):
    talk = talk_of(said("A", "a"), said("B", "b"))
    assert talk.choose(0, tmp_path).num_new == 1
    assert talk.choose(0, tmp_path).num_new == 0
    with pytest.raises(InputError, match="another answer has been called better already"):
        talk.choose(1, tmp_path)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 1
