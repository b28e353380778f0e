"""docs/math.md and the tests hold each other: no claim without a test, no mark without a claim."""

import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NUMBERS = range(1, 27)


@cache
def marks() -> dict[str, set[int]]:
    """Every test as `tests/file.py::name`, with the claims that it is marked to show."""
    found: dict[str, set[int]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"tests/{path.name}::{node.name}"] = {
                    ast.literal_eval(argument)
                    for decorator in node.decorator_list
                    if isinstance(decorator, ast.Call)
                    and ast.unparse(decorator.func) == "pytest.mark.claim"
                    for argument in decorator.args
                }
    return found


def named_tests(text: str) -> set[str]:
    return set(re.findall(r"`(tests/test_\w+\.py::\w+)`", text))


@cache
def claims() -> list[tuple[int, str]]:
    """Number and text of each claim, in the order of the page."""
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    section = text.partition("\n## Twenty-six claims\n")[2]
    parts = re.split(r"^(\d+)\. ", section, flags=re.MULTILINE)[1:]
    return [(int(n), body) for n, body in zip(parts[::2], parts[1::2], strict=True)]


def test_the_claims_are_numbered_from_1_to_26():
    assert [number for number, _ in claims()] == list(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_claim_has_a_test_and_names_it(number):
    assert [test for test, shown in marks().items() if number in shown], "no test has this mark"
    named = named_tests(dict(claims())[number])
    assert named, "docs/math.md names no test for it"
    without_mark = [test for test in sorted(named) if number not in marks().get(test, set())]
    assert not without_mark, "named for this claim, but absent or not marked"


def test_every_mark_names_a_claim():
    unknown = {test: sorted(shown - set(NUMBERS)) for test, shown in marks().items()}
    assert not {test: numbers for test, numbers in unknown.items() if numbers}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_test_that_is_named_exists(page):
    assert not named_tests(page.read_text(encoding="utf-8")) - marks().keys()


def test_the_worked_example_prints_what_the_page_says():
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (printed,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "docs/how_it_works.md", "exec"), {})
    assert output.getvalue() == printed
