"""JUDGES: a language model behind an endpoint compares responses.

A judge prefers what it is shown first, some by a lot. Each pair is therefore shown in both orders,
and where the two verdicts differ it is a tie.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from rlhf.disk import digest_of
from rlhf.endpoints import (
    NO_VERDICT,
    REMEDIES,
    Outcome,
    ask,
    find_endpoint,
    open_client,
    shown_url,
)
from rlhf.errors import InputError, RunError
from rlhf.records import Prompt
from rlhf.verdicts import KeptVerdicts, build_request

MAX_FAILURES_IN_A_ROW = 20
WIN_SHOWN_FIRST = {"A": 1.0, "tie": 0.5, "B": 0.0}

Pair = tuple[Prompt, str, str]  # prompt, the model's response, the other's


class Judged(NamedTuple):
    """What a judge said of each pair; None where it gave no verdict in one of the two orders."""

    wins: list[float | None]  # 1, 0, or 0.5: a tie in both orders, or two verdicts that differ
    consistent: list[bool | None]  # whether they agree; None too where it needed no asking
    first: list[float | None]  # the win by the verdict with the model's response shown first
    num_asked: int  # questions put to the judge; a pair has two
    num_kept: int  # questions that an earlier run had answered
    failures: dict[str, int]  # questions without a verdict, by cause

    @property
    def consistency(self) -> float:
        """Share of the pairs asked about in which both orders agree; nan if there are none."""
        told = [agree for agree in self.consistent if agree is not None]
        return sum(told) / len(told) if told else float("nan")


def judge_pairs(
    pairs: Sequence[Pair],
    *,
    model: str,
    cache: Path,
    timeout: float,  # seconds for an answer
    max_retries: int,
    num_workers: int,  # questions at a time
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Ask about every pair in both orders, unless `cache` has the verdict from an earlier time.

    Equal responses are a tie without asking. Time-outs, lost connections, HTTP 408, 409, 429 and
    500 to 599 are tried again, later and later, and so are answers without a verdict; what fails
    `max_retries` times more is skipped and counted.

    Raises: InputError if the endpoint cannot be used; RunError if it no longer answers.
    """
    base_url = find_endpoint()
    questions: dict[str, dict[str, Any]] = {}
    keys: list[tuple[str, str] | None] = []  # of both orders; None: nothing to ask
    for prompt, output, ref_output in pairs:
        orders = ((output, ref_output), (ref_output, output))
        requests = [build_request(model, prompt, *order) for order in orders]
        first, second = (digest_of([base_url, request]) for request in requests)
        keys.append(None if output == ref_output else (first, second))
        if output != ref_output:
            questions |= {first: requests[0], second: requests[1]}
    with KeptVerdicts(cache) as kept:
        missing = {key: request for key, request in questions.items() if key not in kept.known}
        failures = ask_all(
            missing,
            kept,
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
            num_workers=num_workers,
            progress=progress,
        )
    num_kept = len(questions) - len(missing)
    return Judged(*join_orders(keys, kept.known), len(missing), num_kept, failures)


def join_orders(
    keys: Sequence[tuple[str, str] | None], verdicts: Mapping[str, str]
) -> tuple[list[float | None], list[bool | None], list[float | None]]:
    """Make one win of the verdicts in both orders.

    A win in one order and a tie in the other differ too, so they are a tie.

    Source: Zheng et al., 2306.05685, section 3.4; Wang et al., 2305.17926.

    >>> join_orders([("x", "y"), ("x", "x"), ("x", "z"), None], {"x": "A", "y": "B"})
    ([1.0, 0.5, None, 0.5], [True, False, None, None], [1.0, 1.0, None, 0.5])
    """
    wins: list[float | None] = []
    consistent: list[bool | None] = []
    first: list[float | None] = []
    for orders in keys:
        told = [verdicts.get(key) for key in orders] if orders else ["tie", "tie"]
        ours, theirs = (None if verdict is None else WIN_SHOWN_FIRST[verdict] for verdict in told)
        if ours is None or theirs is None:
            wins.append(None)
            consistent.append(None)
            first.append(None)
        else:
            agree = ours == 1 - theirs
            wins.append(ours if agree else 0.5)
            consistent.append(agree if orders else None)
            first.append(ours)
    return wins, consistent, first


def ask_all(
    questions: Mapping[str, Mapping[str, Any]],
    kept: KeptVerdicts,
    *,
    base_url: str,
    timeout: float,
    max_retries: int,
    num_workers: int,
    progress: Callable[[int, int], None],
) -> dict[str, int]:
    """Ask questions and keep the verdicts; return how many have none, by cause.

    The first one goes alone: what is wrong with the endpoint, or the key, it tells at once.

    Raises: InputError if so; RunError after many questions in a row that nothing answers.
    """
    if not questions:
        return {}
    client = open_client(base_url, timeout=timeout, max_retries=max_retries)
    stop = threading.Event()

    def ask_one(key: str) -> Outcome:
        limits: Any = {"seconds": timeout, "max_retries": max_retries}
        outcome = ask(client, questions[key], **limits, stop=stop)
        if outcome.verdict:
            kept.add(key, outcome.verdict)
        return outcome

    failures: Counter[str] = Counter()
    in_a_row, num_verdicts = 0, len(kept.known)
    some_request = next(iter(questions.values()))
    judge = f"the judge {some_request['model']} at {shown_url(base_url)}"
    try:
        outcomes = in_threads(ask_one, list(questions), num_workers=num_workers, stop=stop)
        for done, (_, cause, detail) in enumerate(outcomes, start=1):
            what = f"{cause} ({detail})" if detail else cause
            if done == 1 and cause in REMEDIES:
                raise InputError(f"{judge}: {what}; {REMEDIES[cause]}")
            if cause:
                failures[cause] += 1
            num_verdicts += not cause
            # Nonsense is a matter of the question, unless no question has ever had a verdict.
            is_down = cause and (cause != NO_VERDICT or not num_verdicts)
            in_a_row = in_a_row + 1 if is_down else 0
            if in_a_row == MAX_FAILURES_IN_A_ROW:
                raise RunError(
                    f"{judge}: {in_a_row} questions in a row without a verdict, the last: {what};"
                    " check OPENAI_BASE_URL and the judge; all verdicts so far are kept, and the"
                    " same command goes on"
                )
            progress(done, len(questions))
    finally:
        stop.set()
        client.close()
    return dict(failures)


def in_threads(
    ask_one: Callable[[str], Outcome],
    keys: Sequence[str],
    *,
    num_workers: int,
    stop: threading.Event,
) -> Iterator[Outcome]:
    """Ask the first question, then the others, several at a time; yield outcomes as they come."""
    assert num_workers > 0
    first, *others = keys
    yield ask_one(first)
    waiting: SimpleQueue[str] = SimpleQueue()
    outcomes: SimpleQueue[Outcome | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            while not stop.is_set():
                outcomes.put(ask_one(waiting.get_nowait()))
        except Empty:
            pass
        except BaseException as error:  # a thread's error is the run's: the main thread raises it
            outcomes.put(error)

    for key in others:
        waiting.put(key)
    for _ in range(min(num_workers, len(others))):
        # Nobody waits for the end of a daemon: Ctrl-C stops even what hangs in a request.
        threading.Thread(target=work, daemon=True).start()
    for _ in others:
        outcome = outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        yield outcome
