"""Every form of row ends as the same Example, and flaws are told apart."""

from itertools import chain
from typing import Any

import pytest

from rlhf.sources import (
    Response,
    UnusablePrompt,
    as_prompt,
    form_of,
    num_responses,
    parse_row,
    prompt_id,
)


def completion(response: object = "An answer.", score: object = 5.0, **more: Any) -> dict[str, Any]:
    return {"response": response, "overall_score": score, **more}


def graded(*completions: object, **more: Any) -> dict[str, Any]:
    return {"instruction": "A question?", "completions": list(completions), **more}


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def scores_of(row: dict[str, Any]) -> list[float]:
    return [response.score for response in parse_row(row, "x").responses]


def flaw_of(row: dict[str, Any]) -> str:
    with pytest.raises(UnusablePrompt) as caught:
        parse_row(row, "x")
    return str(caught.value)


# --- forms

SAME_PAIR = {
    "texts": {"prompt": "Hi there", "chosen": "Hello!", "rejected": "No."},
    "messages with a prompt column": {
        "prompt": turns("Hi there"),
        "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "whole dialogues beside the prompt": {
        "prompt": "Hi there",
        "chosen": turns("Hi there", "Hello!"),
        "rejected": turns("Hi there", "No."),
    },
    "whole dialogues alone": {
        "chosen": turns("Hi there", "Hello!"),
        "rejected": turns("Hi there", "No."),
    },
    "texts with a common beginning": {"chosen": "Hi there Hello!", "rejected": "Hi there No."},
    "transcripts": {
        "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello!",
        "rejected": "\n\nHuman: Hi there\n\nAssistant: No.",
    },
    "a transcript as prompt": {
        "prompt": "\n\nHuman: Hi there\n\nAssistant:",
        "chosen": " Hello!",
        "rejected": " No.",
    },
}


@pytest.mark.parametrize("row", SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_form_of_a_pair_says_the_same(row):
    example = parse_row(row, "mine")
    assert example.prompt == "Hi there"
    assert example.source == "mine"
    assert example.responses == [Response("Hello!", 10.0), Response("No.", 1.0)]
    assert not example.scored
    assert num_responses(row) == 2


def test_ultrafeedback_rows_keep_order_scores_and_source():
    row = graded(completion("A", 7.0), completion(" B\n", 3), source="sharegpt")
    example = parse_row(row, "mine")
    assert form_of(row) == "UltraFeedback"
    assert example.responses == [Response("A", 7.0), Response("B", 3.0)]
    assert example.source == "sharegpt"
    assert example.scored
    assert num_responses(row) == 2


def test_dialogues_become_messages_and_split_at_the_last_answer():
    talk = "\n\nHuman: One?\n\nAssistant: 1, as Human: 1 says.\n\nHuman: Two?\n\nAssistant:"
    example = parse_row({"chosen": f"{talk} 2", "rejected": f"{talk} 3"}, "x")
    assert example.prompt == turns("One?", "1, as Human: 1 says.", "Two?")
    assert [response.text for response in example.responses] == ["2", "3"]


def test_a_dialogue_beside_its_prompt_column_is_the_longer_truth():
    talk = turns("One?", "1", "Two?")
    answers = ({"role": "assistant", "content": text} for text in "23")
    chosen, rejected = ([*talk, answer] for answer in answers)
    row = {"prompt": "One?", "chosen": chosen, "rejected": rejected}
    assert parse_row(row, "x").prompt == talk


def test_a_system_message_stays_at_the_head_of_the_prompt():
    system = [{"role": "system", "content": "Be kind."}]
    row = {"chosen": system + turns("Hi", "Yes"), "rejected": system + turns("Hi", "No")}
    assert parse_row(row, "x").prompt == system + turns("Hi")


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("chosen_score", "rejected_score"), (8.0, 3.0), [8.0, 3.0]),
        (("score_chosen", "score_rejected"), (8.0, 3.0), [8.0, 3.0]),
        # Ratings from 1 to 5: 1 + (4 - 1) * 9 / 4 = 7.75 and 1 + (2 - 1) * 9 / 4 = 3.25
        (("chosen-rating", "rejected-rating"), (4.0, 2.0), [7.75, 3.25]),
    ],
)
def test_scores_of_pairs_end_on_the_scale_of_one_to_ten(names, given, expected):
    row = SAME_PAIR["texts"] | dict(zip(names, given, strict=True))
    assert scores_of(row) == expected
    assert parse_row(row, "x").scored
    assert scores_of(SAME_PAIR["whole dialogues alone"] | dict(zip(names, given, strict=True)))


def test_a_pair_whose_scores_contradict_its_labels_is_not_turned_around():
    row = SAME_PAIR["texts"] | {"score_chosen": 2.0, "score_rejected": 3.0}
    assert flaw_of(row) == "chosen is scored below rejected"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "no pair at all"},
        {"instruction": "no completions"},
        {"chosen": "no partner"},
        {"question": "Is this the prompt?", "chosen": "Yes", "rejected": "Yea"},
        {"prompt": None, "question": "Is it?", "chosen": "Yes", "rejected": "Yea"},
    ],
)
def test_other_columns_are_no_form(row):
    assert form_of(row) is None


# --- what is wrong with a row


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (graded() | {"instruction": None}, "prompt is not a text"),
        (graded() | {"instruction": " \n"}, "prompt is empty"),
        (graded() | {"instruction": "half \ud83d"}, "prompt holds a lone surrogate"),
        ({"chosen": "Yes", "rejected": "Yea"}, "prompt is empty"),
        (
            {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"},
            "prompts of chosen and rejected differ",
        ),
        (
            {
                "chosen": "\n\nHuman: A\n\nHuman: B\n\nAssistant: x",
                "rejected": "\n\nHuman: A\n\nHuman: B\n\nAssistant: y",
            },
            "turns of the prompt do not alternate from user to user",
        ),
        (
            {"chosen": turns("A"), "rejected": turns("A")},
            "chosen does not end with the assistant's turn",
        ),
        ({"chosen": [], "rejected": []}, "chosen does not end with the assistant's turn"),
        (
            {"prompt": [*turns("A"), 3], "chosen": "x", "rejected": "y"},
            "a message of the prompt is not a text",
        ),
    ],
)
def test_an_unusable_prompt_has_its_reason(row, reason):
    assert flaw_of(row) == reason


def test_one_bad_completion_costs_that_completion_only():
    bad = {
        "response is not a text": [completion(None), completion(7), "no object", None],
        "response is empty": [completion(""), completion(" \n\t")],
        "response holds a lone surrogate": [completion("half \ud83d")],
        "score is missing or not a number": [
            {"response": "No score."},
            completion("N/A", "N/A"),
            completion("null", None),
            completion("nan", float("nan")),
            completion("inf", float("inf")),
            completion("true", True),
            completion("list", [5]),
            completion("huge", 10**400),
        ],
        "score is outside its scale": [completion("eleven", 11), completion("zero", 0)],
        "response is identical to an earlier one": [completion(" Good. ", 2.0)],
    }
    row = graded(completion("Good.", 7), *chain(*bad.values()), completion("Fine.", "7.5"))
    example = parse_row(row, "x")
    assert example.responses == [Response("Good.", 7.0), Response("Fine.", 7.5)]
    assert example.dropped == {reason: len(rows) for reason, rows in bad.items()}
    assert num_responses(row) == 20


def ratings(*values: object) -> dict[str, Any]:
    return {str(number): {"Rating": value} for number, value in enumerate(values)}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"fine-grained_score": 2.0}, 1.0),
        ({"fine-grained_score": 2.25}, 10.0),
        ({"fine-grained_score": 4.5}, 10.0),
        ({}, 10.0),
        ({"annotations": ratings("1", "N/A", "3")}, 1.0),  # mean 2
        ({"annotations": ratings("5", "N/A", "3")}, 10.0),
        ({"annotations": ratings("N/A")}, 10.0),
        ({"annotations": None, "fine-grained_score": float("nan")}, 10.0),
        ({"annotations": ratings("1", "1"), "fine-grained_score": float("nan")}, 1.0),
    ],
)
def test_a_ten_beside_poor_ratings_is_a_one(more, expected):
    example = parse_row(graded(completion("A", 10, **more), completion("B", 9)), "x")
    assert [response.score for response in example.responses] == [expected, 9.0]
    assert example.repaired == (expected == 1.0)


def test_only_a_ten_is_repaired():
    assert scores_of(graded(completion("A", 9, **{"fine-grained_score": 1.0}))) == [9.0]


def test_a_source_that_is_no_text_is_replaced_by_the_data_sets_name():
    for source in (None, "", 3, "\ud800"):
        assert parse_row(graded(completion(), source=source), "mine").source == "mine"


# --- prompts


def test_prompts_that_differ_in_case_width_or_spaces_share_their_id():
    same = ["Straße  ½?", "STRASSE 1⁄2?", " strasse\n1⁄2? ", "ｓｔｒａｓｓｅ ½?"]
    assert len({prompt_id(text) for text in same}) == 1
    assert prompt_id("strasse 1/3?") != prompt_id(same[0])


def test_a_dialogue_is_another_prompt_than_its_words_in_a_row():
    assert prompt_id(turns("A", "B", "C")) != prompt_id(turns("A", "B C", "D"))
    assert prompt_id("A B") != prompt_id(turns("A B"))


def test_a_prompt_ends_with_the_user():
    assert as_prompt(turns("A", "B", "C")) == turns("A", "B", "C")
    for flawed in (
        [],
        turns("A", "B"),
        turns("A", "B", "C")[1:],
        [{"role": "system", "content": "A"}],
    ):
        with pytest.raises(UnusablePrompt, match="alternate"):
            as_prompt(flawed)
