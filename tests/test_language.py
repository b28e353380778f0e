"""English text survives, foreign text goes, and what goes is counted."""

import gzip
import json
import re
from pathlib import Path

import pytest

from rlhf.errors import InputError
from rlhf.language import keep_language, language_filter
from rlhf.sources import UnusablePrompt, parse_row

REAL_DATA = Path(__file__).parent.parent.parent / "shared" / "data"

ENGLISH = [
    "Hi",
    "42",
    "3.14159, 2.71828, 1.41421",
    "🙂🙂",
    "\u200b",
    "???",
    "x = [i ** 2 for i in range(10)]\nprint(sum(x))",
    "SELECT name FROM users WHERE id = 3;",
    "- apples\n- flour\n- two eggs",
    "I’m sorry?",
    "CAN YOU TELL ME WHO WROTE HARRY POTTER?",
    "What does “Wanderlust” mean in German?",
    "E = mc², and α + β = γ for all angles of the triangle that we drew on the board.",
    "Translate the word 猫 into English, please.",
]
FOREIGN = [
    "Wie spät ist es, und wann fährt der nächste Zug nach Berlin?",
    "¿Dónde está la biblioteca más cercana de la ciudad?",
    "Le chat dort sur le canapé pendant que la pluie tombe dehors.",
    "今天天气怎么样？",
    "Какая сегодня погода?",
    "ما هي عاصمة فرنسا؟",
    "東京の天気はどうですか。",
]


@pytest.fixture(scope="module")
def in_english():
    return language_filter("en")


@pytest.mark.parametrize("text", ENGLISH)
def test_short_prompts_code_numbers_and_lists_stay(in_english, text):
    assert in_english(text)


def test_curly_and_straight_quotes_get_the_same_verdict(in_english):
    straight = '"Sí, you can say "¿Podemos encontrar un bar en (el lugar)?""'
    curly = '“Sí, you can say "¿Podemos encontrar un bar en (el lugar)?"”'
    assert in_english(curly) == in_english(straight)


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_goes(in_english, text):
    assert not in_english(text)


def test_another_language_and_any_language_can_be_asked_for():
    german = language_filter("de")
    assert german(FOREIGN[0])
    assert not german("The cat sleeps on the sofa while the rain falls outside the house.")
    assert all(map(language_filter("any"), FOREIGN))


def test_an_unknown_language_names_those_that_are_known():
    with pytest.raises(InputError, match=r"--language=english.*any.* de .* en "):
        language_filter("english")


def test_of_real_english_texts_at_most_two_in_a_thousand_are_lost(in_english):
    path = REAL_DATA / "hh_rlhf_helpful_base_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} in {REAL_DATA}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    talks = "".join(row["chosen"] + row["rejected"] for row in rows)
    texts = {text.strip() for text in re.split("\n\n(?:Human|Assistant):", talks)} - {""}
    lost = [text for text in texts if not in_english(text)]
    assert len(texts) > 13_000
    assert len(lost) <= 0.002 * len(texts)


def dialogue(*texts: str) -> dict[str, object]:
    prompt = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, texts, strict=False)
    ]
    answers = [FOREIGN[0], "It leaves at noon.", "", FOREIGN[1]]
    completions = [{"response": answer, "overall_score": 5} for answer in answers]
    return {"instruction": prompt, "completions": completions}


def test_foreign_responses_go_and_are_counted_beside_those_dropped_before(in_english):
    example = parse_row(dialogue("When does the train leave?"), "x")
    kept = keep_language(example, "en", in_english)
    assert [response.text for response in kept.responses] == ["It leaves at noon."]
    assert kept.dropped == {"response is empty": 1, "response is not in language en": 2}
    assert example.dropped == {"response is empty": 1}
    everything = keep_language(example, "any", language_filter("any"))
    assert everything == example


def test_a_dialogue_is_judged_by_all_its_turns(in_english):
    talk = dialogue(FOREIGN[0], FOREIGN[0], FOREIGN[0])
    with pytest.raises(UnusablePrompt, match="prompt is not in language en"):
        keep_language(parse_row(talk, "x"), "en", in_english)
