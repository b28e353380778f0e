"""What has been written is shown as text, whatever it is."""

from html.parser import HTMLParser

import pytest

from rlhf.chat import Answer, Exchange
from rlhf.chat_html import CSS, as_html, column_html

NASTY = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "![picture](http://example.com/x.png)",
    "</div></section><iframe src=//example.com>",
    "${alert(1)} {{alert}} @children `x` $$x^2$$ \\(x\\)",
    "a & b &lt; \" onclick='x'",
]


class Reader(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def exchange(text: str, **changes) -> Exchange:
    return Exchange("Q", Answer([1], text, True), "A", "Q", 0)._replace(**changes)


def read(exchanges, name="A", path="folder", is_better=False, is_over=True) -> Reader:
    reader = Reader()
    reader.feed(column_html(name, path, exchanges, is_better=is_better, is_over=is_over))
    return reader


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_a_text_wherever_it_comes_from(text):
    plain = read([exchange("x")])
    for nasty in (
        read([exchange(text)]),
        read([exchange("x", asked=text)]),
        read([exchange("x", author=text)]),
        read([exchange("x")], name=text),
        read([exchange("x")], path=text),
    ):
        assert nasty.tags == plain.tags and text in nasty.text


@pytest.mark.parametrize("text", NASTY)
def test_the_template_around_it_finds_nothing_of_its_own(text):
    assert not set("${}@`\\<>") & set(as_html(text))


def test_what_is_to_be_known_of_an_answer_stands_under_it():
    told = read([exchange("x", score=1.234, author="B", num_dropped=2)], is_better=True).text
    for words in ("reward 1.23", "B's answer", "better", "without the oldest 2 questions"):
        assert words in told
    cut = exchange("x", answer=Answer([1], "x", False))
    assert "not finished" in read([cut]).text
    assert "not finished" not in read([cut], is_over=False).text
    assert "not finished" in read([cut, exchange("y")], is_over=False).text


def test_the_style_asks_no_other_server():
    assert "url(" not in CSS and "@import" not in CSS and "http" not in CSS
