"""What the page's server lets through, and what it tells the browser."""

import asyncio

import pytest

from rlhf.gate import MOST_BYTES, Gate

CALL = b'{"fn_index": 1}'


async def answer(scope, receive, send):
    """An application that answers 200 to all."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def answers(path: str, headers: dict[str, str], *, body=CALL, kind="http", host="", app=answer):
    """All that a browser gets."""
    sent, received = [], [body[:4], body[4:]]

    async def send(message):
        sent.append(message)

    async def receive():
        if not received:
            return {"type": "http.disconnect"}
        part = received.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(received)}

    named = {"host": "localhost:7860", **headers}
    scope = {
        "type": kind,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in named.items() if v],
    }
    gate = Gate(app, host=host or "127.0.0.1", functions={1, 2})
    asyncio.run(gate(scope, receive, send))
    return sent


def ask(path: str, headers: dict[str, str] | None = None, **options) -> tuple[int, dict]:
    """Status and headers of an answer."""
    start = answers(path, headers or {}, **options)[0]
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/assets/index.js",
        "/static/js/x.js",
        "/theme.css",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/gradio_api/run/predict",
        "/gradio_api/heartbeat/abc123",
        "/gradio_api/cancel",
    ],
)
def test_what_a_browser_needs_goes_through(path):
    assert ask(path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/upload",
        "/gradio_api/info",
        "/gradio_api/call/ask",
        "/gradio_api/api/predict",
        "/gradio_api/vibe-edit/",
        "/gradio_api/process_recording",
        "/monitoring/summary",
        "/login",
        "/docs",
        "/openapi.json",
        "/gradio_api/heartbeat/a/../../file=x",
        "//",
    ],
)
def test_nothing_else_does(path):
    assert ask(path)[0] == 404


def test_a_request_is_no_longer_than_a_question_needs():
    assert ask("/gradio_api/queue/join", {"content-length": str(MOST_BYTES)})[0] == 200
    for headers in (
        {"content-length": str(MOST_BYTES + 1)},
        {"content-length": "x"},
        {"transfer-encoding": "chunked"},
    ):
        assert ask("/gradio_api/queue/join", headers)[0] == 413


@pytest.mark.parametrize(
    ("host", "sent_to"),
    [
        ("127.0.0.1", "localhost:7860"),
        ("127.0.0.1", "LocalHost"),
        ("127.0.0.1", "127.0.0.1:7860"),
        ("::1", "[::1]:7860"),
        ("127.0.0.2", "127.0.0.2:7860"),
        ("fe80:0::1", "[fe80::1]:7860"),
        ("Desk.local", "desk.local:7860"),
        ("0.0.0.0", "192.168.1.5:7860"),
        ("::", "desk.local"),
    ],
)
def test_the_page_is_found_under_its_own_names(host, sent_to):
    for origin in ("", f"http://{sent_to}", f"https://{sent_to}"):
        assert ask("/config", {"host": sent_to, "origin": origin}, host=host)[0] == 200


@pytest.mark.parametrize(
    "sent_to",
    ["", "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example"],
)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/nowhere"])
def test_a_name_that_somebody_made_lead_here_finds_nothing(path, sent_to):
    for origin in ("", f"http://{sent_to}"):
        assert ask(path, {"host": sent_to, "origin": origin}) == (403, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:7860"]
)
def test_a_page_of_another_origin_gets_nothing_and_is_allowed_nothing(origin, host):
    for path in ("/config", "/gradio_api/queue/join"):
        assert ask(path, {"origin": origin}, host=host) == (403, {})


def test_a_call_reaches_the_page_whole():
    read = []

    async def app(scope, receive, send):
        read.append((await receive())["body"])
        read.append((await receive())["type"])
        await answer(scope, receive, send)

    assert ask("/gradio_api/queue/join", app=app)[0] == 200
    assert read == [CALL, "http.disconnect"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"fn_index": 99}',
        b'{"fn_index": null}',
        b'{"fn_index": [1]}',
        b"{}",
        b"[]",
        b"x",
        b"",
        b"\xff",
        b"[" * 50_000,
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_what_no_button_calls_is_not_called(path, body):
    assert ask(path, body=body)[0] == 404


def fail_with(error: Exception, cause: Exception | None):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise error from cause

    return app


def test_an_answer_that_has_told_of_its_failure_is_ended_quietly():
    class HTTPException(Exception):
        pass

    app = fail_with(RuntimeError("response already started"), HTTPException(404))
    last = answers("/gradio_api/queue/data", {}, app=app)[-1]
    assert last["body"] == b"" and not last.get("more_body")


@pytest.mark.parametrize(
    ("error", "cause"),
    [(RuntimeError("x"), None), (RuntimeError("x"), ValueError("y")), (KeyError(99), None)],
)
def test_a_real_fault_is_not_hidden(error, cause):
    with pytest.raises(type(error)):
        answers("/gradio_api/queue/data", {}, app=fail_with(error, cause))


def test_other_kinds_of_connection_are_refused():
    assert ask("/", kind="websocket")[0] == 404


def test_the_browser_is_told_to_ask_no_other_server():
    policy = ask("/")[1]["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
