"""How a conversation looks on the page: columns side by side, every text as text."""

from collections.abc import Sequence
from html import escape

from rlhf.chat import Exchange

# To the template of a page's component these mean something, even within a text.
MEANINGFUL = str.maketrans({x: f"&#{ord(x)};" for x in "${}@`\\"})
CSS = """
footer { display: none !important; }
.gradio-container .title h1 { font-size: 1.25rem; font-weight: 600; margin: 0.2rem 0; }
.gradio-container .html-container { padding: 0; }
.voice { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden;
         color: var(--body-text-color); background: var(--background-fill-primary); }
.voice header { padding: 0.55rem 0.9rem; background: var(--background-fill-secondary);
                border-bottom: 1px solid var(--border-color-primary); }
.voice header b, .voice header small { display: block; overflow: hidden; white-space: nowrap;
                                       text-overflow: ellipsis; }
.voice small, .voice .note { font-size: 0.8rem; opacity: 0.7; }
/* In this direction a box that scrolls stays at its end while text is added. */
.voice .talk { height: 50vh; overflow-y: auto; display: flex; flex-direction: column-reverse; }
.voice .talk::before { content: ""; flex: 1; }
.voice .turns { padding: 0.3rem 0.9rem 0.7rem; }
.voice .turns > div { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; }
.voice .turns .asked { width: fit-content; max-width: 90%; margin: 0.7rem 0 0.5rem auto;
                       padding: 0.4rem 0.75rem; border-radius: 10px;
                       background: color-mix(in srgb, var(--color-accent) 12%, transparent); }
.voice .turns .answered { min-height: 1.45em; }
.voice .turns .better { border-left: 3px solid var(--color-accent); padding-left: 0.6rem; }
.status { min-height: 1.5rem; overflow-wrap: anywhere; font-size: 0.95rem; }
/* While a question waits for its turn, its place in the queue is all that moves. */
.status [data-testid="status-tracker"] svg { display: none; }
.status .generating { border: none !important; }
.status [data-testid="status-tracker"] { align-items: flex-start; min-height: 1.5rem; }
.status .progress-text { position: static; padding: 0; font: inherit; transform: none; }
@media (max-width: 640px) { .voice .talk { height: auto; min-height: 5rem; max-height: 45vh; } }
"""


def as_html(text: str) -> str:
    """Write a text so that a page shows it as it is.

    >>> as_html("<b> ${1}")
    '&lt;b&gt; &#36;&#123;1&#125;'
    """
    return escape(text).translate(MEANINGFUL)


def notes_of(exchange: Exchange, own_name: str, *, is_better: bool, is_over: bool) -> list[str]:
    """Say what is to be known of an answer."""
    notes = []
    if exchange.num_dropped:
        notes.append(exchange.dropped_note())
    if exchange.author != own_name:
        notes.append(f"{exchange.author}'s answer")
    if exchange.score is not None:
        notes.append(f"reward {exchange.score:.2f}")
    if is_over and not exchange.answer.is_whole:
        notes.append("not finished")
    if is_better:
        notes.append("better")
    return notes


def column_html(
    name: str, path: str, exchanges: Sequence[Exchange], *, is_better: bool, is_over: bool
) -> str:
    """Show what a voice has been asked and has answered, the newest at the bottom."""
    turns = []
    for number, exchange in enumerate(exchanges, start=1):
        is_last = number == len(exchanges)
        style = "answered better" if is_better and is_last else "answered"
        notes = notes_of(
            exchange, name, is_better=is_better and is_last, is_over=is_over or not is_last
        )
        turns += [
            f'<div class="asked">{as_html(exchange.asked)}</div>',
            f'<div class="{style}">{as_html(exchange.answer.text)}</div>',
            f'<div class="note">{as_html(" · ".join(notes))}</div>',
        ]
    return (
        f'<section class="voice"><header><b>{as_html(name)}</b><small>{as_html(path)}</small>'
        f'</header><div class="talk"><div class="turns">{"".join(turns)}</div></div></section>'
    )
