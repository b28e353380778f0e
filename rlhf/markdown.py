"""MARKDOWN: tables, and texts of which nothing is read as Markdown."""

import re
from typing import Any

Rows = list[list[str]]  # of a table, the header first
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # some of them end a line


def fence_of(text: str, least: int) -> str:
    """Give as many backticks as stand nowhere in a text, and no fewer than so many."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def fenced(text: str) -> str:
    """Show a text as a block of code, whatever it holds.

    >>> print(fenced("a ``` b"))
    ````
    a ``` b
    ````
    """
    fence = fence_of(text, 3)
    return f"{fence}\n{text}\n{fence}"


def code(value: Any) -> str:
    r"""Show a value as Markdown's code, whatever it holds.

    >>> [code(x) for x in (False, 2e-05, None, "a\nb", "`", "")]
    ['`false`', '`2e-05`', '–', '`a\\nb`', '`` ` ``', '`""`']
    """
    if value is None:
        return "–"
    text = str(value).lower() if isinstance(value, bool) else str(value) or '""'
    text = CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
    fence = fence_of(text, 1)
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(rows: Rows) -> str:
    r"""Lay out a table so that it reads well as plain text too.

    >>> print(markdown_table([["model", "KL"], ["a|b", "0"]]))
    | model | KL |
    |-------|----|
    | a\|b  | 0  |
    """
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
