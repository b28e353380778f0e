"""PAGE: one HTML file that needs nothing else (its pictures are inside it), and tables."""

import base64
import io
from html import escape

from matplotlib.figure import Figure

from rlhf.markdown import Rows

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9em; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; }
td { white-space: nowrap; }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
h3 { font-size: 1em; margin-bottom: 0.3em; white-space: pre-wrap; }
img { max-width: 100%; height: auto; }
"""


def to_png(figure: Figure) -> bytes:
    """Draw a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def picture(png: bytes, alt: str) -> str:
    """Put a picture into the page itself.

    >>> picture(b"png", "a curve")
    '<img src="data:image/png;base64,cG5n" alt="a curve">'
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def page(title: str, sections: list[tuple[str, list[str]]]) -> str:
    """Join sections, each a heading and its finished HTML, into a page."""
    body = [f"<h1>{escape(title)}</h1>"]
    for heading, parts in sections:
        if parts:
            body += [f"<h2>{escape(heading)}</h2>"] if heading else []
            body += parts
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def html_table(rows: Rows) -> str:
    """Write a table for a page, every cell escaped.

    >>> print(html_table([["a"], ["1 < 2"]]))
    <table>
    <tr><th>a</th></tr>
    <tr><td>1 &lt; 2</td></tr>
    </table>
    """
    kinds = ["th"] + ["td"] * (len(rows) - 1)
    lines = [
        "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(kinds, rows, strict=True)
    ]
    return "\n".join(["<table>", *lines, "</table>"])
