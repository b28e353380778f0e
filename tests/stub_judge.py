"""A judge for tests: an OpenAI-compatible endpoint in a thread, which answers as it is told to."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

FENCED = r"\[{name} (?P<mark>[0-9a-f]{{16}})\]\n(?P<text>.*)\n\[end of {name} (?P=mark)\]"


class Asked(NamedTuple):
    """A question as the judge sees it."""

    prompt: str
    first: str
    second: str
    content: str  # the whole message
    times: int = 1  # how often it was asked, this time included
    number: int = 1  # of all that was asked, from 1


class Reply(NamedTuple):
    """What goes back, where it is not a chat completion with a text."""

    status: int
    body: str
    headers: dict[str, str]
    drip: float = 0.0  # seconds between its bytes


Judge = Callable[[Asked], "str | Reply"]


@dataclass
class Stub:
    """A running endpoint, and what it was asked."""

    judge: Judge
    latency: float = 0.0  # seconds
    url: str = ""
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    times: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def quality(text: str) -> float:
    """The quality that an answer states of itself: `... quality=0.7 ...`; 0 if it states none."""
    match = re.search(r"quality=(-?[0-9.]+)", text)
    return float(match[1]) if match else 0.0


def truthful(asked: Asked) -> str:
    """The better answer wins; equally good ones tie."""
    first, second = quality(asked.first), quality(asked.second)
    return "tie" if first == second else "A" if first > second else "B"


def position_biased(asked: Asked) -> str:
    """The better answer wins; of equally good ones, the one that is shown first."""
    return "A" if quality(asked.first) >= quality(asked.second) else "B"


def verbosity_biased(asked: Asked) -> str:
    """The longer answer wins."""
    first, second = len(asked.first), len(asked.second)
    return "tie" if first == second else "A" if first > second else "B"


def always(reply: "str | Reply") -> Judge:
    """The same reply to everything."""
    return lambda asked: reply


def error(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI writes it."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps({"error": {"message": message}}), headers)


def chat_completion(text: str) -> str:
    """A text as the endpoint's answer."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def read_question(content: str) -> Asked:
    """Read the fenced texts out of a question, as one who trusts nothing but the marks."""
    marks = re.findall(r"the mark ([0-9a-f]{16})\.", content)[:1]
    texts = []
    for name in ("prompt", "answer A", "answer B"):
        match = re.search(FENCED.format(name=name), content, flags=re.DOTALL)
        assert match and [match["mark"]] == marks, content
        texts.append(match["text"])
    return Asked(*texts, content)


@contextmanager
def serve(judge: Judge, latency: float = 0.0) -> Iterator[Stub]:
    """Run an endpoint until the block ends."""
    stub = Stub(judge, latency)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open
        wbufsize = -1  # headers and body in one packet
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            with stub.lock:
                stub.paths.append(self.path)
                stub.bodies.append(body)
                stub.keys.add(self.headers["Authorization"])
                stub.times[content] += 1
                asked = read_question(content)._replace(
                    times=stub.times[content], number=len(stub.bodies)
                )
            time.sleep(stub.latency)
            reply = stub.judge(asked)
            if isinstance(reply, str):
                reply = Reply(200, chat_completion(reply), {})
            data = reply.body.encode()
            self.send_response(reply.status)
            headers = {"Content-Type": "application/json", **reply.headers}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            for part in [bytes([x]) for x in data] if reply.drip else [data]:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # who asked has gone

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()  # and not server_close, which waits for judges that hang
