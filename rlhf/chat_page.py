"""A page to talk to several models side by side, made with Gradio. It asks nothing of the network.

What happens on it stands in `rlhf.talks`, how it looks in `rlhf.chat_html`.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which is read with the import

import gradio as gr

from rlhf.chat import Exchange, Settings, Voice, unknown_note
from rlhf.chat_html import CSS, as_html, column_html
from rlhf.errors import InputError
from rlhf.feedback import cannot_write
from rlhf.gate import Gate
from rlhf.talks import MOST_CHARACTERS, Talk, new_talk

MOST_ANSWERING = 4  # people whose answers are written at the same time, a token of each in turn
MOST_WAITING = 20  # behind them; who comes next is told to try again
MOST_TALKS = 1000  # conversations that are remembered; each ends with its last hour
SECONDS_REMEMBERED = 3600
SECONDS_TO_END = 5.0  # answers that are no longer wanted

Update = dict[Any, Any]  # component to what becomes of it


class ChatPage:
    """The page, and what its buttons do."""

    def __init__(
        self,
        voices: list[Voice],
        settings: Settings,
        *,
        answer: Callable[..., Iterator[Exchange]],
        read_settings: Callable[..., Settings],
        feedback_dir: Path,
    ) -> None:
        self.voices, self.answer, self.read_settings = voices, answer, read_settings
        self.feedback_dir = feedback_dir
        self.turns = Lock()  # one token is written at a time, whoever asked
        self.columns: list[gr.HTML] = []
        self.buttons: list[gr.Button] = []
        with gr.Blocks(title="Talk to the models", analytics_enabled=False) as self.blocks:
            self.lay_out(settings)
            self.connect()

    def lay_out(self, settings: Settings) -> None:
        """Put everything in its place."""
        make = partial(new_talk, self.voices)
        self.talk = gr.State(make, time_to_live=SECONDS_REMEMBERED)
        gr.HTML("<h1>Talk to the models</h1>", elem_classes="title", js_on_load=None)
        with gr.Row(elem_classes="columns"):
            for row, voice in enumerate(self.voices):
                with gr.Column(min_width=230):
                    empty = self.column(new_talk(self.voices), row, is_over=True)
                    self.columns.append(gr.HTML(empty, js_on_load=None))
                    if len(self.voices) > 1:
                        self.buttons.append(
                            gr.Button(f"{voice.name} is better", size="md", interactive=False)
                        )
        self.status = gr.HTML("", elem_classes="status", js_on_load=None)
        with gr.Row():
            self.question = gr.Textbox(
                show_label=False,
                container=False,
                placeholder="Ask something",
                max_length=MOST_CHARACTERS,
                max_lines=8,
                scale=8,
                min_width=230,
            )
            self.send = gr.Button("Ask", variant="primary", min_width=80)
            self.stop = gr.Button("Stop", min_width=80, interactive=False)
            self.fresh = gr.Button("New conversation", min_width=220)
        with gr.Accordion("Sampling", open=False), gr.Row():
            self.tuned = [
                gr.Number(settings.temperature, label="temperature (0 = greedy)", step=0.1),
                gr.Number(settings.top_k, label="top-k (0 = all)", precision=0),
                gr.Number(settings.top_p, label="top-p", step=0.05),
                gr.Number(settings.max_new_tokens, label="longest answer, tokens", precision=0),
                gr.Number(settings.seed, label="seed", precision=0),
            ]

    def connect(self) -> None:
        """Say what happens when somebody presses a button."""
        changed = [self.talk, self.question, self.status, self.send, self.stop]
        changed += [*self.columns, *self.buttons]
        private: Any = {"api_visibility": "private"}  # not for programs
        gr.on(
            [self.send.click, self.question.submit],
            self.ask,
            inputs=[self.talk, self.question, *self.tuned],
            outputs=changed,
            concurrency_limit=MOST_ANSWERING,
            show_progress="full",  # how many are waiting before you
            show_progress_on=self.status,
            **private,
        )
        at_once = {**private, "show_progress": "hidden", "queue": False}
        self.stop.click(self.end_answers, inputs=self.talk, **at_once)
        # In the queue, so that the browser hears of it after the last of the answers.
        hidden = {**private, "show_progress": "hidden"}
        self.fresh.click(
            self.begin_anew,
            inputs=self.talk,
            outputs=changed,
            concurrency_limit=MOST_ANSWERING,
            **hidden,
        )
        for row, button in enumerate(self.buttons):
            choose = partial(self.choose, row)
            button.click(choose, inputs=self.talk, outputs=changed, **at_once)

    def column(self, talk: Talk, row: int, *, is_over: bool) -> str:
        """Show the conversation with one voice."""
        voice, exchanges = self.voices[row], talk.shown(row, is_over=is_over)
        is_better = talk.chosen == row
        return column_html(voice.name, voice.path, exchanges, is_better=is_better, is_over=is_over)

    def shown(self, talk: Talk, line: str, *, is_over: bool, can_choose: bool) -> Update:
        """Show all conversations, a line below them, and which buttons can be pressed."""
        columns = [self.column(talk, row, is_over=is_over) for row in range(len(self.voices))]
        return {
            self.status: as_html(line),
            self.send: gr.update(interactive=is_over),
            self.stop: gr.update(interactive=not is_over),
            **dict(zip(self.columns, columns, strict=True)),
            **dict.fromkeys(self.buttons, gr.update(interactive=can_choose)),
        }

    def ask(self, talk: Talk, question: str, *tuned: Any) -> Iterator[Update]:
        """Let all voices answer, and show every token."""

        def stream(
            row: int, exchanges: list[Exchange], question: str, settings: Settings, turn: int
        ) -> Iterator[Exchange]:
            voice = self.voices[row]
            return self.answer(voice, exchanges, question, settings, turn=turn, row=row)

        talk.is_busy = True
        try:
            settings = self.read_settings(*tuned)
            asked = talk.ask(question.strip(), settings, answer=stream, turns=self.turns)
            next(asked)
            yield {self.question: "", **self.shown(talk, "", is_over=False, can_choose=False)}
            for _ in asked:
                yield self.shown(talk, "", is_over=False, can_choose=False)
            notes = [unknown_note(self.voices, question)]
            line = "; ".join(filter(None, dict.fromkeys([*talk.failures, *notes])))
            shown = self.shown(talk, line, is_over=True, can_choose=any(talk.latest))
            again = {} if any(talk.latest) else {self.question: question}
            yield {self.talk: talk, **again, **shown}
        except InputError as error:
            yield {self.status: as_html(str(error))}
        finally:
            talk.is_busy = False

    def choose(self, row: int, talk: Talk) -> Update:
        """Keep what the better answer teaches, and say where."""
        if talk.chosen == row:  # the second half of a double click
            return {self.status: gr.skip()}
        try:
            added = talk.choose(row, self.feedback_dir)
        except InputError as error:
            return {self.status: as_html(str(error))}
        except OSError as error:
            return {self.status: as_html(cannot_write(self.feedback_dir, error))}
        return {
            self.talk: talk,
            **self.shown(talk, added.told(), is_over=True, can_choose=False),
        }

    def end_answers(self, talk: Talk) -> None:
        """Let answers end where they are."""
        talk.is_stopped = True

    def begin_anew(self, talk: Talk) -> Update:
        """Forget the conversation, once nobody writes in it any more."""
        talk.is_stopped, last = True, time.monotonic() + SECONDS_TO_END
        while talk.is_busy and time.monotonic() < last:
            time.sleep(0.01)
        talk = new_talk(self.voices)
        return {self.talk: talk, **self.shown(talk, "", is_over=True, can_choose=False)}


def open_page(page: ChatPage, *, host: str, port: int) -> Callable[[], None]:
    """Serve a page to browsers; returns what closes it. Raises: InputError."""
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page whether it is there
        os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "localhost", host])
    fonts = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    gate = {"host": host, "functions": frozenset(page.blocks.fns)}
    page.blocks.queue(max_size=MOST_WAITING, api_open=False)
    try:
        page.blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=1,
            state_session_capacity=MOST_TALKS,
            app_kwargs={"middleware": [(Gate, (), gate)]},
            theme=gr.themes.Base(font=fonts[0], font_mono=fonts[1]),
            css=CSS,
        )
    except OSError as error:
        raise InputError(f"--port={port} on --host={host}: cannot be opened ({error})") from error
    return partial(page.blocks.close, verbose=False)
