"""A gate in front of a page's server: what a browser needs goes through, and nothing else.

Gradio serves files, uploads, proxies and an interface for programs too; none of that is used here.
A page of another site, in the same browser, cannot drive this one: not under its own name, nor
under one that it makes lead to this machine (DNS rebinding).
"""

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

API = "/gradio_api/"
PATHS = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.*"
    rf"|{API}(queue/(join|data)|run/predict|cancel|reset|theme\.css|startup-events|heartbeat/\w+)/?"
)
CALLS = re.compile(rf"{API}(queue/join|run/predict)/?")  # of what a button does, by its number
MOST_BYTES = 100_000  # of a request
OURS = ("localhost", "127.0.0.1", "[::1]")  # this machine, as browsers name it
POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; font-src 'self';"
    " script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'self'"
)


class Gate:
    """An ASGI application around another."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        host: str,  # where the page listens
        functions: Container[int],  # what the buttons of the page can call
    ) -> None:
        self.app, self.functions = app, functions
        self.names = names_of(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer with nothing but a status."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", [])}
        size = headers.get(b"content-length", "0")
        is_chunked = b"transfer-encoding" in headers
        if not is_of_this_page(headers, self.names):
            await refuse(send, 403)
        elif scope["type"] != "http" or not PATHS.fullmatch(scope["path"]):
            await refuse(send, 404)
        elif is_chunked or not (size.isascii() and size.isdigit()) or int(size) > MOST_BYTES:
            await refuse(send, 413)
        elif CALLS.fullmatch(scope["path"]):
            body = await read_body(receive)
            if function_of(body) in self.functions:
                await self.app(scope, once_more(body, receive), guarded(send))
            else:
                await refuse(send, 404)
        else:
            await self.pass_on(scope, receive, guarded(send))

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and end what the browser knows to have failed.

        The page that an earlier server has left open asks for a session that is not there. Gradio
        says so in an answer that has begun, then raises it, and Starlette cannot answer any more.
        """
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:
            if type(error.__cause__).__name__ != "HTTPException":
                raise
            await send({"type": "http.response.body", "body": b""})


def names_of(host: str) -> frozenset[str] | None:
    """Give the names under which a browser finds a page; None if nobody can know them all.

    >>> sorted(names_of("FE80::0:1"))
    ['127.0.0.1', '[::1]', '[fe80::1]', 'localhost']
    >>> print(names_of("0.0.0.0"))
    None
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return frozenset({*OURS, host.lower()})
    if address.is_unspecified:
        return None
    return frozenset({*OURS, f"[{address}]" if address.version == 6 else str(address)})


def is_of_this_page(headers: dict[bytes, str], names: Container[str] | None) -> bool:
    """Whether a request was sent to one of these names, and by no page of another origin."""
    host = headers.get(b"host", "").lower()
    origin = headers.get(b"origin", f"http://{host}").lower()
    is_known = names is None or re.sub(r":\d*$", "", host) in names
    return is_known and origin.partition("://")[2] == host


async def read_body(receive: Receive) -> bytes:
    """Read what a request brings, which is short."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def function_of(body: bytes) -> int:
    """Tell which function a request calls; -1 if none."""
    try:
        number = json.loads(body)["fn_index"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return -1
    return number if isinstance(number, int) else -1


def once_more(body: bytes, receive: Receive) -> Receive:
    """Let what has been read be read again, then what comes after it."""
    messages = [{"type": "http.request", "body": body}]

    async def receive_again() -> Scope:
        return messages.pop() if messages else await receive()

    return receive_again


def guarded(send: Send) -> Send:
    """Tell the browser to ask no other server, whatever a page may hold."""

    async def send_with_policy(message: Scope) -> None:
        if message["type"] == "http.response.start":
            added = [
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"x-content-type-options", b"nosniff"),
            ]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_with_policy


async def refuse(send: Send, status: int) -> None:
    """Answer with nothing but a status."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
