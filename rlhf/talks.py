"""TALKS: a conversation with several voices at once, and what the better answer becomes.

Each voice goes on from its own answers until one is called better: then all go on from that one, so
that they read the same again. Only answers to one and the same prompt make a pair.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.chat import Exchange, Settings, Voice
from rlhf.errors import InputError, RunError
from rlhf.feedback import Added, add_pairs

MOST_CHARACTERS = 4000  # of a question
Streams = Callable[[int, list[Exchange], str, Settings, int], Iterator[Exchange]]


@dataclass
class Talk:
    """What somebody has asked, and what each voice has answered."""

    exchanges: list[list[Exchange]]
    latest: list[Exchange | None]  # the answers to the last question
    turn: int = 0
    chosen: int | None = None  # whose answer to the last question was better
    is_stopped: bool = False
    is_busy: bool = False
    failures: list[str] = field(default_factory=list)  # to answer the last question

    def begin(self, question: str) -> None:
        """Make ready for a question. Raises: InputError if it cannot be asked."""
        if not question.strip():
            raise InputError("there is no question")
        if len(question) > MOST_CHARACTERS:
            raise InputError(
                f"a question may have {MOST_CHARACTERS:,} characters, not {len(question):,}"
            )
        if self.chosen is not None:
            self.exchanges = [list(self.exchanges[self.chosen]) for _ in self.exchanges]
        self.latest, self.failures = [None for _ in self.exchanges], []
        self.chosen, self.is_stopped = None, False

    def end(self) -> None:
        """Take what was answered into the conversations."""
        for row, exchange in enumerate(self.latest):
            if exchange is not None:
                self.exchanges[row] = [*self.exchanges[row][exchange.num_dropped :], exchange]
        self.turn += any(self.latest)

    def ask(
        self,
        question: str,
        settings: Settings,
        *,
        answer: Streams,
        turns: AbstractContextManager,
    ) -> Iterator[None]:
        """Let all voices answer, a token of each in turn; stops after each round.

        `turns` is held while a token is written. Raises: InputError if it cannot be asked.
        """
        self.begin(question)
        live = {
            row: answer(row, exchanges, question, settings, self.turn)
            for row, exchanges in enumerate(self.exchanges)
        }
        while live and not self.is_stopped:
            for row, stream in list(live.items()):
                try:
                    with turns:
                        self.latest[row] = next(stream)
                except StopIteration:
                    del live[row]
                except (InputError, RunError) as error:
                    self.failures.append(str(error))
                    del live[row]
            yield
        self.end()

    def shown(self, row: int, *, is_over: bool) -> Sequence[Exchange]:
        """Give what a voice has been asked and has answered, what is being written included."""
        latest = self.latest[row]
        return self.exchanges[row] if is_over or latest is None else [*self.exchanges[row], latest]

    def choose(self, row: int, folder: Path) -> Added:
        """Call an answer better than the others, and keep the pairs that this makes.

        Raises: InputError if it makes none; OSError if they cannot be written.
        """
        chosen = self.latest[row]
        if self.chosen not in (None, row):
            raise InputError("no pair: another answer has been called better already")
        if chosen is None or not chosen.answer.text.strip():
            raise InputError("no pair: there is no answer")
        if not chosen.answer.is_whole:
            raise InputError(
                f"no pair: {chosen.author} has not finished, and as the better answer it would"
                " teach to stop in mid-sentence; allow longer answers and ask again"
            )
        rejected = [
            other.answer.text
            for other in self.latest
            if other is not None
            and other.prompt == chosen.prompt
            and other.answer.text.strip()
            and other.answer.text != chosen.answer.text
        ]
        if not rejected:
            raise InputError("no pair: no other answer to the same conversation differs")
        added = add_pairs(folder, chosen.prompt, chosen=chosen.answer.text, rejected=rejected)
        self.chosen = row
        return added


def new_talk(voices: Sequence[Voice]) -> Talk:
    """Begin a conversation."""
    return Talk([[] for _ in voices], [None for _ in voices])
