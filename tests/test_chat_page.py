"""The page as a person uses it: a browser asks two models, and what it clicks is trained on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import run_chat
import run_dpo
import run_rm
import run_sft
from rlhf.chat import Answer, Exchange, Settings, Voice
from rlhf.talks import new_talk
from tests.conftest import write_jsonl
from toyworld.base_model import build_tokenizer

pytest.importorskip("gradio", reason="pip install -r requirements-chat.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = "<img src=x onerror=alert(1)> ${alert(2)} {{x}}"
WAIT = 30_000  # milliseconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory, base_path, data_dir) -> dict[str, Path]:
    """Two SFT models, of which the second answers in HTML, and a reward model."""
    root = tmp_path_factory.mktemp("models")
    for side in ("train", "eval"):
        rows = map(json.loads, (data_dir / "sft" / f"{side}.jsonl").read_text().splitlines())
        nasty = [{**row, "response": NASTY} for row in rows if row["response"] != "No."]
        write_jsonl(root / "nasty" / f"{side}.jsonl", nasty)
    best = {}
    for name, folder in (("A", data_dir / "sft"), ("B", root / "nasty")):
        options = ["--max_len=120", "--learning_rate=5e-3", "--num_epochs=8", "--batch_size=2"]
        where = [f"--data_dir={folder}", f"--ckpt_dir={root}/{name}", f"--model_id={base_path}"]
        run_sft.main(run_sft.parse_args([*options, *where]))
        best[name] = root / name / "best"
    where = [f"--sft_model_path={best['A']}", f"--data_dir={data_dir}/rm", f"--ckpt_dir={root}/rm"]
    run_rm.main(run_rm.parse_args([*where, "--max_len=120", "--num_epochs=1"]))
    return {**best, "rm": root / "rm" / "best"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """run_chat.py --web in a process of its own."""

    def __init__(self, models: dict[str, Path], feedback_dir: Path, *options: str) -> None:
        self.port = free_port()
        self.feedback_dir = feedback_dir
        self.url = f"http://127.0.0.1:{self.port}"
        paths = [f"--model_path={name}={models[name]}" for name in ("A", "B")]
        paths += [f"--rm_model_path={models['rm']}", f"--feedback_dir={feedback_dir}"]
        options = ("--max_len=128", "--temperature=0", f"--port={self.port}", *options)
        self.process = subprocess.Popen(
            [sys.executable, "run_chat.py", "--web", *paths, *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A proxy that is not there: nothing may be asked through it.
            env={**os.environ, "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://127.0.0.1:9"},
        )
        self.told: list[str] = []
        for line in self.process.stdout or ():
            self.told.append(line)
            if line.startswith("page: "):
                break
        assert self.told and self.told[-1].startswith("page: "), self.told

    def status(self, path: str, **options) -> int:
        request = urllib.request.Request(self.url + path, **options)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def ask(self, session: str, *values) -> int:
        """Queue a question as the page does; returns the status."""
        config = json.load(urllib.request.urlopen(self.url + "/config"))
        (asking,) = [x["id"] for x in config["dependencies"] if len(x["inputs"]) == 7]
        body = {"data": [None, *values], "fn_index": asking, "session_hash": session}
        headers = {"content-type": "application/json"}
        data = json.dumps(body).encode()
        return self.status("/gradio_api/queue/join", data=data, headers=headers)


@pytest.fixture(scope="module")
def server(models, tmp_path_factory) -> Iterator[Server]:
    server = Server(models, tmp_path_factory.mktemp("feedback") / "chat")
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=30) == 0


@contextmanager
def browse(url: str, folder: Path) -> Iterator[Any]:
    """Open a page, and see that it never asks another server, complains, or alerts."""
    if CHROMIUM is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(NAMES)})")
    faults: list[str] = []

    def requested(request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            faults.append(f"asked {request.url}")

    def noted(message) -> None:
        if message.type in ("error", "warning"):
            faults.append(f"console: {message.text}")

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            folder / "user",
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1280, "height": 800},
        )
        page = browser.pages[0]
        page.set_default_timeout(WAIT)
        page.on("request", requested)
        page.on("console", noted)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append("an alert"), dialog.dismiss()))
        page.goto(url)
        page.wait_for_selector("textarea")
        yield page
        assert faults == []
        browser.close()


@pytest.fixture
def page(server, tmp_path) -> Iterator[Any]:
    with browse(server.url, tmp_path) as page:
        yield page


def press_ask(page, question: str) -> None:
    """Ask, once the last question is quite done with: until then another click does not count."""
    page.wait_for_function(
        "!document.querySelector('.status :is(.generating, .pending, .translucent)')"
    )
    page.fill("textarea", question)
    page.click("button:text-is('Ask')")


def ask(page, question: str) -> list[str]:
    """Ask, wait until all have answered, and return what they did."""
    press_ask(page, question)
    page.wait_for_function(
        """question => [...document.querySelectorAll('.voice')].every(
            x => [...x.querySelectorAll('.asked')].at(-1)?.innerText.trim() === question.trim())
        && [...document.querySelectorAll('button')].find(x => x.innerText === 'Stop').disabled""",
        arg=question,
    )
    return [
        column.locator(".answered").last.inner_text() for column in page.locator(".voice").all()
    ]


def status(page) -> str:
    page.wait_for_function("document.querySelector('.status .prose').innerText.trim()")
    return page.inner_text(".status .prose").strip()


def rows(server, side: str) -> list[dict]:
    return [json.loads(x) for x in (server.feedback_dir / f"{side}.jsonl").read_text().splitlines()]


def test_two_answers_stream_are_scored_and_the_better_one_is_trained_on(server, page, models):
    page.evaluate(
        """() => { window.lengths = [];
        new MutationObserver(() => window.lengths.push(Math.max(0, ...[...document
            .querySelectorAll('.answered')].map(x => x.innerText.length))))
        .observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    first = ask(page, "Name the cat")
    assert first[1] == NASTY and first[0] != NASTY
    lengths = page.evaluate("window.lengths")
    assert len(set(lengths)) > 4 and lengths == sorted(lengths)  # it came in steps, and only grew
    notes = [note.inner_text() for note in page.locator(".voice .note").all()]
    assert len(notes) == 2 and all(note.startswith("reward ") for note in notes)

    page.dblclick("button:text-is('A is better')")
    told = status(page)
    assert f"in {server.feedback_dir}/train.jsonl; now 1 in train and 0 in eval" in told
    pair = {"prompt": "Name the cat", "chosen": first[0], "rejected": NASTY, "source": "chat"}
    (row,) = rows(server, "train")
    assert pair.items() <= row.items()

    second = ask(page, "Draw the sea")
    page.click("button:text-is('B is better')")
    page.wait_for_function(
        "document.querySelector('.status .prose').innerText.includes('1 in eval')"
    )
    (row,) = rows(server, "eval")
    assert (row["chosen"], row["rejected"]) == (second[1], second[0])
    turns = [("user", "Name the cat"), ("assistant", first[0]), ("user", "Draw the sea")]
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == turns

    where = [f"--sft_model_path={models['A']}", f"--data_dir={server.feedback_dir}"]
    where += [f"--ckpt_dir={server.feedback_dir}-model", "--max_len=120", "--log_step=1"]
    run_dpo.main(run_dpo.parse_args([*where, "--num_epochs=2", "--max_steps=2"]))
    metrics = (Path(f"{server.feedback_dir}-model") / "metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(line) for line in metrics) == 2


def test_the_page_fits_a_phone_and_a_desk(page):
    ask(page, "Name the dog " * 20)
    for width in (400, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [column.bounding_box() for column in page.locator(".voice").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        side_by_side = boxes[0]["y"] == boxes[1]["y"]
        assert side_by_side == (width == 1280)
    assert boxes[0]["width"] == boxes[1]["width"] and boxes[0]["height"] == boxes[1]["height"]


def test_what_cannot_be_done_is_told_in_a_line_and_the_page_goes_on(server, page, models):
    page.click("button:text-is('Ask')")
    assert status(page) == "there is no question"
    page.fill("textarea", "x" * 5000)
    assert len(page.input_value("textarea")) <= 4000
    page.get_by_text("Sampling").click()
    page.get_by_label("top-p").fill("3")
    press_ask(page, "Name the cat")
    page.wait_for_function(
        "document.querySelector('.status .prose').innerText.includes('top_p must be')"
    )
    page.get_by_label("top-p").fill("1")
    page.get_by_label("temperature").fill("")
    press_ask(page, "Name the cat")
    page.wait_for_function(
        "document.querySelector('.status .prose').innerText.includes('temperature is empty')"
    )
    page.get_by_label("temperature").fill("0")
    page.get_by_label("longest answer").fill("2")
    ask(page, "Name the mat")
    assert "not finished" in page.locator(".voice .note").first.inner_text()
    page.click("button:text-is('A is better')")
    assert status(page).startswith("no pair: A has not finished")
    page.click("button:text-is('New conversation')")
    page.wait_for_function("!document.querySelector('.asked')")
    page.get_by_label("longest answer").fill("64")
    ask(page, "Name the colour")
    kept = server.feedback_dir.with_name("kept")
    server.feedback_dir.rename(kept) if server.feedback_dir.exists() else None
    server.feedback_dir.write_text("in the way")
    page.click("button:text-is('A is better')")
    page.wait_for_function(
        "document.querySelector('.status .prose').innerText.includes('is a file')"
    )
    server.feedback_dir.unlink()
    kept.rename(server.feedback_dir) if kept.exists() else None
    page.click("button:text-is('A is better')")
    page.wait_for_function(
        "document.querySelector('.status .prose').innerText.includes('1 new pair')"
    )


def test_answers_can_be_stopped_and_forgotten_while_they_are_written(tmp_path, tokenizer):
    from rlhf.chat_page import ChatPage, open_page

    def slow(voice, exchanges, question, settings, *, turn, row):
        for end in range(1, 1000):
            time.sleep(0.01)
            yield Exchange(question, Answer([1], "x" * end, False), voice.name, question, 0)

    voices: Any = [Voice(name, "folder", None, tokenizer, [], 64) for name in "AB"]
    settings = Settings(0.7, 50, 1.0, 256, 42)
    told: Any = {"read_settings": run_chat.read_settings, "feedback_dir": tmp_path / "chat"}
    port = free_port()
    close = open_page(ChatPage(voices, settings, answer=slow, **told), host="127.0.0.1", port=port)
    is_long = "document.querySelector('.answered')?.innerText.length > 9"
    try:
        with browse(f"http://127.0.0.1:{port}", tmp_path) as page:
            press_ask(page, "Name the cat")
            page.wait_for_function(is_long)
            page.click("button:text-is('Stop')")
            page.wait_for_selector("button:text-is('Stop')[disabled]")
            written = page.locator(".answered").first.inner_text()
            page.wait_for_timeout(300)
            assert 9 < len(written) < 900
            assert page.locator(".answered").first.inner_text() == written
            assert page.locator(".note").first.inner_text() == "not finished"
            page.click("button:text-is('New conversation')")
            page.wait_for_function("!document.querySelector('.asked')")
            press_ask(page, "Name the dog")
            page.wait_for_function(is_long)
            page.click("button:text-is('New conversation')")
            page.wait_for_function("!document.querySelector('.asked')")
            page.wait_for_timeout(300)
            assert page.locator(".asked").count() == 0
            assert page.is_enabled("button:text-is('Ask')")
    finally:
        close()


def test_words_that_a_model_does_not_know_are_told_of_below_the_answers(tmp_path):
    from rlhf.chat_page import ChatPage

    def answer(voice, exchanges, question, settings, *, turn, row):
        yield Exchange(question, Answer([1], "hi", True), voice.name, question, 0)

    tokenizer: Any = build_tokenizer()
    voices: Any = [Voice(name, "folder", None, tokenizer, [], 64) for name in "AB"]
    settings = Settings(0.7, 50, 1.0, 256, 42)
    told: Any = {"read_settings": run_chat.read_settings, "feedback_dir": tmp_path}
    page = ChatPage(voices, settings, answer=answer, **told)

    def status(question: str) -> str:
        return list(page.ask(new_talk(voices), question, *settings))[-1][page.status]

    assert status("greet ada please") == "note: 1 of 3 tokens of this question are unknown to A, B"
    assert status("greet ada") == ""


def test_twenty_at_once_are_answered_or_told_and_the_page_stays_up(server):
    statuses: list[int] = []

    def visit(number: int) -> None:
        statuses.append(server.ask(f"visitor{number}", "Name the cat", 1.0, 0, 1.0, 100, number))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(40)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 20
    assert server.status("/") == 200 and server.process.poll() is None


def test_files_and_programs_find_no_way_in(server):
    secret = f"/gradio_api/file={ROOT}/requirements.txt"
    for path in (secret, "/gradio_api/info", "/gradio_api/upload", "/docs", "/gradio_api/call/ask"):
        assert server.status(path) == 404
    assert server.status("/gradio_api/queue/join", data=b"x" * 200_000) == 413


def test_another_site_gets_nothing_even_under_a_name_that_leads_here(server):
    """As when a page is open on evil.example, whose address has become 127.0.0.1."""
    evil = "http://evil.example"
    for headers in ({"Host": "evil.example", "Origin": evil}, {"Origin": evil}):
        for path in ("/", "/config", "/gradio_api/startup-events"):
            assert server.status(path, headers=headers) == 403
        call = {"data": b'{"fn_index": 0}', "headers": {**headers, "content-type": "text/plain"}}
        assert server.status("/gradio_api/queue/join", **call) == 403
    assert server.status("/config", headers={"Host": f"localhost:{server.port}"}) == 200


def test_a_page_that_an_earlier_server_left_open_makes_no_noise(models, tmp_path):
    server = Server(models, tmp_path / "chat")
    call = {"data": b'{"fn_index": 99, "data": []}'}
    call["headers"] = {"content-type": "application/json"}
    assert server.status("/gradio_api/queue/join", **call) == 404
    assert server.status("/gradio_api/run/predict", **call) == 404
    path = f"{server.url}/gradio_api/queue/data?session_hash=gone"
    with urllib.request.urlopen(path, timeout=60) as answer:
        assert b"session_not_found" in answer.read()  # the page then says so
    server.process.send_signal(signal.SIGINT)
    assert server.process.stdout.read() == ""
    assert server.process.wait(timeout=30) == 0


def test_the_page_names_no_other_server(server):
    text = urllib.request.urlopen(server.url).read().decode()
    for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", text):
        assert not re.search(r"(?:src|href)=.?(?:https?:)?//", tag), tag


def test_a_taken_port_ends_in_one_line(server, models):
    command = [sys.executable, "run_chat.py", "--web", f"--model_path=A={models['A']}"]
    done = subprocess.run(
        [*command, f"--port={server.port}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"run_chat.py: error: --port={server.port} on --host=127.0.0.1: cannot")


def test_an_open_address_is_warned_of(models, tmp_path):
    started = time.monotonic()
    server = Server(models, tmp_path / "chat", "--host=0.0.0.0")
    server.process.terminate()
    server.process.wait(timeout=30)
    (line,) = [x for x in server.told if "no password" in x]
    assert f"note: --host=0.0.0.0: whoever can reach port {server.port}" in line
    assert time.monotonic() - started < 60
