"""REPORT: what an evaluation found, as tables, `report.md` and `report.html`.

Everything is told by the record that `eval.json` holds, and by the responses.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlhf.figures import draw_distributions, draw_reward_against_kl, draw_win_rates
from rlhf.lineage import Run, lineage
from rlhf.markdown import Rows, fenced, markdown_table
from rlhf.page import html_table, page, picture, to_png
from rlhf.standings import COUNTS, RATES
from rlhf.winrates import Interval

Record = Mapping[str, Any]
NUM_SHOWN = 8  # prompts whose responses stand side by side
READING = (
    "Brackets are 95% intervals, by resampling prompts; each checkpoint is compared with {0} on the"
    " same prompts. A tie counts half. Where an interval holds 50%, {0} may be as good. At equal"
    " length: the win rate that a logistic regression expects between responses of the same length,"
    " since many judges like long ones."
)
WRITTEN = (
    "KL: nats a response. Tokens: mean length. Ended: share of responses that ended by themselves."
    " distinct-n: share of different ones among all runs of n words."
)
VERDICTS = (
    "Consistent: share of pairs on which a judge says the same in both orders; where it does not,"
    " it is a tie. When shown first: the win rate by the order that shows the checkpoint first."
    " Skipped: without a verdict, and left out."
)
KL_CAPTION = (
    "Up is better, right is farther from {0}. A high score far to the right is cheap where a judge"
    " can be fooled: look at the samples, and at another judge."
)


def percent(value: float | None) -> str:
    """Write a share.

    >>> percent(0.6125), percent(float("nan"))
    ('61.3%', '–')
    """
    return f"{value:.1%}" if value is not None and math.isfinite(value) else "–"


def with_bounds(interval: Sequence[float] | None, *, share: bool = False) -> str:
    """Write a mean with its interval.

    >>> with_bounds((0.5, 0.45, 0.55), share=True), with_bounds((-0.001, -1, 1)), with_bounds(None)
    ('50.0% [45.0, 55.0]', '0.00 [-1.00, 1.00]', '–')
    """
    if interval is None:
        return "–"
    mean, low, high = interval
    if share:
        return f"{percent(mean)} [{low * 100:.1f}, {high * 100:.1f}]"
    mean, low, high = (round(x, 2) + 0.0 for x in (mean, low, high))  # no -0.00
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def response_rows(record: Record) -> Rows:
    """Tell what each checkpoint wrote, whoever judges it."""
    header = [
        "model",
        f"KL from {record['reference']}",
        "tokens",
        "ended",
        "distinct-1",
        "distinct-2",
    ]
    rows = [header]
    for name, model in record["models"].items():
        shares = [percent(model[key]) for key in ("eos_rate", "distinct_1", "distinct_2")]
        rows.append([name, with_bounds(model["kl"]), with_bounds(model["tokens"]), *shares])
    return rows


def judge_rows(record: Record, judge: Record) -> Rows:
    """Tell what one judge says of each checkpoint."""
    reference, is_scored = record["reference"], judge["scored"]
    counts = COUNTS[: 3 if is_scored else 4]
    header = ["model", *(["mean score", f"gain over {reference}"] if is_scored else [])]
    header += [f"win rate over {reference}", "at equal length", *counts]
    rows = [header + ([] if is_scored else ["consistent", "when shown first"])]
    for name, says in judge["models"].items():
        row = [name]
        if is_scored:
            row += [with_bounds(says["score"]), with_bounds(says.get("gain"))]
        row += [with_bounds(says.get(key), share=True) for key in RATES]
        row += [str(says.get(key, "–")) for key in counts]
        if not is_scored:
            row += [percent(says[key]) for key in ("consistency", "win_rate_shown_first")]
        rows.append(row)
    return rows


def tables(record: Record) -> dict[str, Rows]:
    """Give all tables of a record, by their titles."""
    judged = {f"As {judge['name']} judges": judge_rows(record, judge) for judge in record["judges"]}
    return {**judged, "What was written": response_rows(record)}


def notes(record: Record) -> list[str]:
    """Say how the figures came about, and what to keep in mind."""
    kinds = {judge["scored"] for judge in record["judges"]}
    reading = [READING.format(record["reference"])] if kinds else []
    return [
        record["how"],
        WRITTEN,
        *reading,
        *([VERDICTS] if False in kinds else []),
        *record["notes"],
    ]


def shown_rows(num_prompts: int) -> list[int]:
    """Choose the prompts whose responses are shown, spread evenly over the file.

    >>> shown_rows(3), shown_rows(16)
    ([0, 1, 2], [0, 2, 4, 6, 8, 10, 12, 14])
    """
    num = min(num_prompts, NUM_SHOWN)
    return [i * num_prompts // num for i in range(num)]


def verdict_of(record: Record, name: str, row: int) -> str:
    """Say in one line what the judges say of one response."""
    parts = []
    for judge in record["judges"]:
        says = judge["models"].get(name)
        if judge["scored"] and says:
            parts.append(f"{judge['kind']} {says['scores'][row]:.2f}")
        elif says and name != record["reference"]:
            words = {1.0: "wins", 0.5: "ties", 0.0: "loses", None: "skipped"}
            parts.append(f"{judge['kind']}: {words[says['wins'][row]]}")
    return " · ".join(parts)


def markdown_report(
    record: Record, prompts: Sequence[str], responses: Mapping[str, Sequence[str]]
) -> str:
    """Write the report for people who read text."""
    parts = [f"# {title(record)}"]
    for heading, rows in tables(record).items():
        parts += [f"## {heading}", markdown_table(rows)]
    parts += ["## How to read it", *notes(record), "## Samples"]
    for row in shown_rows(len(prompts)):
        parts += ["**Prompt**", fenced(prompts[row])]
        for name, texts in responses.items():
            parts += [f"**{name}** {verdict_of(record, name, row)}".rstrip(), fenced(texts[row])]
    return "\n\n".join(parts) + "\n"


def title(record: Record) -> str:
    """Name the evaluation by what it compares."""
    first, *others = record["models"]
    return f"{', '.join(others)} against {first}" if others else first


def html_report(
    record: Record,
    prompts: Sequence[str],
    responses: Mapping[str, Sequence[str]],
    runs: list[Run],
) -> str:
    """Write the report as one page."""
    sections = [("", [f"<p>{escape(note)}</p>" for note in notes(record)])]
    for judge in record["judges"]:
        parts = [html_table(judge_rows(record, judge)), *judge_pictures(record, judge)]
        sections.append((f"As {judge['name']} judges", parts))
    sections += [
        ("What was written", [html_table(response_rows(record))]),
        (
            "Samples",
            [sample_table(record, prompts, responses, i) for i in shown_rows(len(prompts))],
        ),
        ("Training curves", training_curves(runs)),
    ]
    settings = [["argument", "value"]]
    for name, value in record["arguments"].items():
        values = [f"{x}={y}" for x, y in value.items()] if isinstance(value, dict) else [value]
        settings += [[f"--{name}", str(x)] for x in values if x is not None]
    return page(title(record), [*sections, ("Arguments", [html_table(settings)])])


def judge_pictures(record: Record, judge: Record) -> list[str]:
    """Draw what one judge says: win rates, and where it scores, scores against KL."""
    reference, models = record["reference"], judge["models"]
    rates = {
        name: {
            label: Interval(*says[key])
            for label, key in zip(("all responses", "at equal length"), RATES, strict=True)
            if says[key]
        }
        for name, says in models.items()
        if says.get("win_rate")
    }
    pictures = []
    if rates:
        pictures.append(drawn(draw_win_rates(rates, reference), "win rates"))
    if not judge["scored"]:
        return pictures
    points = {
        name: (Interval(*record["models"][name]["kl"]), Interval(*says["score"]))
        for name, says in models.items()
        if record["models"][name]["kl"]
    }
    scores = {name: np.asarray(says["scores"]) for name, says in models.items()}
    pictures.append(drawn(draw_distributions(scores, judge["kind"]), "distribution of scores"))
    if len(points) > 1:
        figure = draw_reward_against_kl(points, reference, judge["kind"])
        caption = f"<p>{escape(KL_CAPTION.format(reference))}</p>"
        pictures += [drawn(figure, "score against KL"), caption]
    return pictures


def drawn(figure: Figure, alt: str) -> str:
    """Put a figure into the page."""
    return picture(to_png(figure), alt)


def sample_table(
    record: Record, prompts: Sequence[str], responses: Mapping[str, Sequence[str]], row: int
) -> str:
    """Show the responses to one prompt side by side, and what the judges say of them."""
    texts = [texts[row] for texts in responses.values()]
    verdicts = [verdict_of(record, name, row) for name in responses]
    table = html_table([list(responses), texts, verdicts])
    return f'<h3>{escape(prompts[row])}</h3><div class="texts">{table}</div>'


def training_curves(runs: list[Run]) -> list[str]:
    """Take over the pictures that the runs drew of themselves, parents before their children."""
    parts = []
    for run in lineage(runs):
        if run.curves().is_file():
            png = picture(run.curves().read_bytes(), f"training of {run.name}")
            parts.append(f"<h3>{escape(run.name)}</h3>{png}")
    return parts
