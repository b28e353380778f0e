"""ENDPOINTS: a language model behind an OpenAI-compatible URL is asked one question.

    OPENAI_BASE_URL  where it is; without it, OpenAI
    OPENAI_API_KEY   what it asks for; a server of one's own may need none

The key is never printed or written, even where an endpoint repeats it in what it complains of.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rlhf.errors import InputError
from rlhf.markdown import CONTROL
from rlhf.verdicts import read_verdict

if TYPE_CHECKING:
    from openai import OpenAI

OPENAI = "https://api.openai.com/v1"
NO_KEY = "none"  # the client wants one; a server that needs none ignores it
MOST_BYTES = 100_000  # of an answer
NO_VERDICT = "no verdict in the answer"
# Why nothing can be asked at all, and what helps: it shows in the very first question.
REMEDIES = {
    "HTTP 400": "name a judge that takes such a request: temperature 0, max_tokens",
    "HTTP 422": "name a judge that takes such a request: temperature 0, max_tokens",
    "HTTP 401": "set OPENAI_API_KEY to a key that it takes",
    "HTTP 403": "set OPENAI_API_KEY to a key that may use this model",
    "HTTP 404": "check OPENAI_BASE_URL, which mostly ends in /v1, and the judge's name",
    "no connection": "start the server, or set OPENAI_BASE_URL to where it is",
    "time-out": "check OPENAI_BASE_URL, or raise --judge_timeout",
}


class Outcome(NamedTuple):
    """A verdict, or why there is none."""

    verdict: str | None
    cause: str = ""
    detail: str = ""  # what the endpoint says, without the key


def find_endpoint() -> str:
    """Return the URL of the endpoint. Raises: InputError if it is none, or a key is missing."""
    base_url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/") or OPENAI
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not (usable and is_one_word(base_url)):
        raise InputError(
            f"OPENAI_BASE_URL={base_url.rpartition('@')[2]} is not the URL of an endpoint, as"
            " http://localhost:8000/v1"
        )
    key = read_key()
    if not key and base_url == OPENAI:
        raise InputError(
            "OPENAI_API_KEY is not set: the judge needs a key; for a server of your own set"
            " OPENAI_BASE_URL, as http://localhost:8000/v1"
        )
    if not is_one_word(key):
        raise InputError(
            "OPENAI_API_KEY holds characters that no key has; set it to the key and nothing else"
        )
    return base_url


def is_one_word(text: str) -> bool:
    """Whether a text is of visible ASCII characters alone: others cannot go into a header."""
    return text.isascii() and text.isprintable() and " " not in text


def read_key() -> str:
    """Return the key, "" if there is none."""
    return os.environ.get("OPENAI_API_KEY", "").strip()


def open_client(base_url: str, *, timeout: float, max_retries: int) -> "OpenAI":
    """Return a client, which repeats by itself what fails on the way."""
    from openai import OpenAI  # takes a third of a second, which other scripts need not wait

    key = read_key() or NO_KEY
    return OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=max_retries)


def shown_url(base_url: str) -> str:
    """Return a URL without what it may hold of secrets."""
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def ask(
    client: "OpenAI",
    request: Mapping[str, Any],
    *,
    seconds: float,  # for an answer
    max_retries: int,
    stop: threading.Event,
) -> Outcome:
    """Ask one question. The client itself repeats what failed on the way."""
    import openai
    from httpx2 import TimeoutException, TransportError  # what openai is made with

    outcome = Outcome(None)
    for attempt in range(1 + max_retries):
        if attempt > 1 and outcome.cause == NO_VERDICT:  # at temperature 0 it says the same again
            break
        try:
            with client.chat.completions.with_streaming_response.create(**request) as response:
                answer = read_body(response.iter_bytes(), seconds=seconds)
        except (openai.APITimeoutError, TimeoutError, TimeoutException):
            return Outcome(None, "time-out")
        except openai.APIStatusError as error:
            body = error.body.get("message") if isinstance(error.body, dict) else None
            return Outcome(None, f"HTTP {error.status_code}", shown(str(body or "")))
        except (openai.OpenAIError, TransportError):
            return Outcome(None, "no connection")
        outcome = read_answer(answer)
        if outcome.verdict:
            break
        if outcome.cause != NO_VERDICT and attempt < max_retries:
            stop.wait(min(0.5 * 2**attempt, 8.0))  # a gateway's error page, perhaps
        if stop.is_set():
            break
    return outcome


def read_body(parts: Iterator[bytes], *, seconds: float) -> str:
    """Read an answer that may come in bits. Raises: TimeoutError if the bits take too long."""
    last, body = time.monotonic() + seconds, b""
    for part in parts:
        body += part
        if time.monotonic() > last:
            raise TimeoutError
        if len(body) > MOST_BYTES:
            break  # no verdict is as long
    return body.decode("utf-8", "replace")


def read_answer(answer: str) -> Outcome:
    """Read the verdict out of a chat completion."""
    try:
        reply = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Outcome(None, "not a chat completion", shown(answer))
    verdict = read_verdict(reply) if isinstance(reply, str) else None
    return Outcome(verdict) if verdict else Outcome(None, NO_VERDICT, shown(repr(reply)))


def shown(message: str) -> str:
    """Return what an endpoint complains of, in one line, short and without the key."""
    key = read_key()
    told = " ".join((message.replace(key, "***") if key else message).split())
    told = CONTROL.sub("", told)
    return told if len(told) <= 200 else f"{told[:200]}..."
