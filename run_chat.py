"""Talk to the models: one or several checkpoints, in the terminal or on a page in the browser.

They read and sample as in PPO's rollouts; a reward model's score stands under each answer. A click
on the better answer (in the terminal, /better) adds pairs to .data/chat, which run_dpo.py trains
on: the loop from models to people and back. Nothing else is written.
"""

import argparse
import importlib.util
import io
import ipaddress
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from rlhf.arguments import (
    Parser,
    add_boolean,
    count,
    named_path,
    non_negative,
    nonempty,
    number,
    positive_count,
    seed,
)
from rlhf.chat import (
    Exchange,
    Settings,
    Voice,
    answer,
    load_tokenizer_of,
    load_voice,
    unknown_note,
)
from rlhf.checkpoints import require_undamaged
from rlhf.errors import InputError, RunError, run_script
from rlhf.feedback import cannot_write, require_folder
from rlhf.metrics import say
from rlhf.models import REWARD_MODEL, positions_of, read_config
from rlhf.rewards import Scorer
from rlhf.runtime import Runtime, start_runtime
from rlhf.scorers import FLAG, RewardFacts, load_judge, read_judge
from rlhf.talks import new_talk

MOST_MODELS = 4
# What can be set while talking: its type, its default, and what it does.
SETTINGS: dict[str, tuple[Any, Any, str]] = {
    "temperature": (non_negative, 0.7, "divides the logits (0 = answer greedily)"),
    "top_k": (count, 50, "sample from the likeliest so many (0 = all)"),
    "top_p": (number(float, above=0, most=1), 1.0, "share of mass kept"),
    "max_new_tokens": (positive_count, 256, "the longest answer, in tokens"),
    "seed": (seed, 42, "seed of the sampling"),
}
HELP = """/reset        begin a new conversation
/better       keep which answer was better, for training, as in /better PPO
/temperature  and /top_k, /top_p, /max_new_tokens, /seed: set it, as in /temperature 0.7
/help         show this
/quit         leave (Ctrl-D too); Ctrl-C stops an answer"""
# A model's text may hold what a terminal would take for commands.
CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def build_parser() -> Parser:
    parser = Parser("Talk to the models, in the terminal or (--web) on a page in the browser.")
    add = parser.add_argument
    help = "a model to talk to, and its name (repeatable, up to four)"
    named = {"type": named_path, "metavar": "NAME=PATH", "required": True}
    add("--model_path", **named, action="append", help=help)
    add("--rm_model_path", type=nonempty, help="reward model or text classifier that scores")
    add("--reward_label", type=nonempty, help="which label of a text classifier is the score")
    add_boolean(parser, "--web", default=False, help="a page in the browser, not the terminal")
    add("--host", type=nonempty, default="127.0.0.1", help="address of the page")
    add("--port", type=number(int, least=1, most=65535), default=7860, help="port of the page")
    help = "where a better answer adds its pairs"
    add("--feedback_dir", type=nonempty, default=".data/chat", help=help)
    for name, (kind, default, help) in SETTINGS.items():
        add(f"--{name}", type=kind, default=default, help=help)
    add("--max_len", type=positive_count, default=1024, help="tokens of conversation and answer")
    add("--gpu_id", type=count, default=0, help="which CUDA device")
    help = "precision of the matrix products (auto: bfloat16 on CUDA)"
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=help)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.model_path = dict(args.model_path)  # of two paths for one name, the last counts
    if len(args.model_path) > MOST_MODELS:
        told = f"{len(args.model_path)} models are given"
        parser.error(f"--model_path: {told}, and there is room for four")
    if args.reward_label is not None and args.rm_model_path is None:
        parser.error(f"--reward_label={args.reward_label} needs --rm_model_path: add it")
    for name in ("host", "port"):
        value = getattr(args, name)
        if not args.web and value != parser.get_default(name):
            parser.error(f"--{name}={value} is for the page: add --web, or leave --{name} out")
    return args


def check_setting(name: str, text: str) -> Any:
    """Read a value that was set while talking. Raises: InputError."""
    try:
        return SETTINGS[name][0](text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name} {error}") from error


def read_settings(*values: Any) -> Settings:
    """Read all values that were set on the page. Raises: InputError."""
    named = dict(zip(Settings._fields, values, strict=True))
    for name, value in named.items():
        if value is None:
            raise InputError(f"{name} is empty: give a number, as {SETTINGS[name][1]}")
    return Settings(*(check_setting(name, str(value)) for name, value in named.items()))


def check_page(args: argparse.Namespace) -> None:
    """Find out what would keep the page from opening, before any model is loaded."""
    if importlib.util.find_spec("gradio") is None:
        install = f"{shlex.quote(sys.executable)} -m pip install -r requirements-chat.txt"
        raise InputError(f"--web needs gradio: {install}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise InputError(f"--host={args.host}: is no address ({error.strerror})") from error
    except OSError as error:
        place = f"--port={args.port} on --host={args.host}"
        raise InputError(
            f"{place}: cannot be opened ({error.strerror}); name another port or an address of this"
            " machine"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_all(args: argparse.Namespace, runtime: Runtime) -> tuple[list[Voice], Scorer | None]:
    """Load the models and what scores their answers, after checking all of them."""
    tokenizers = {name: load_tokenizer_of(name, path) for name, path in args.model_path.items()}
    known, max_len = None, args.max_len
    if args.rm_model_path is not None:
        require_undamaged(args.rm_model_path, flag=FLAG)
        for tokenizer in tokenizers.values():
            known = read_judge(
                args.rm_model_path,
                tokenizer,
                max_len=0,
                max_reward=None,
                label=args.reward_label,
                needs_spread=False,
                shared_with=None,
            )
    if isinstance(known, RewardFacts):  # a text classifier cuts what it reads
        config = read_config(args.rm_model_path, flag=FLAG, kind=REWARD_MODEL, max_len=0)
        max_len = min(max_len, positions_of(config) or max_len)
    whatever = f"and reads no more, whatever --max_len={args.max_len} says"
    if max_len < args.max_len:
        say(f"note: {FLAG} has {max_len} positions, {whatever}; so no model here does")
    voices = [
        load_voice(name, path, tokenizers[name], max_len=max_len, device=runtime.device)
        for name, path in args.model_path.items()
    ]
    for voice in voices:
        if voice.max_len < max_len:
            say(f"note: {voice.name} has {voice.max_len} positions, {whatever}")
    if known is None:
        return voices, None
    pad_id = voices[0].tokenizer.pad_token_id
    options = {"max_len": args.max_len, "pad_id": pad_id, "runtime": runtime}
    judge = load_judge(known, args.rm_model_path, trunk=None, **options)
    return voices, judge


def main(args: argparse.Namespace) -> None:
    require_folder(Path(args.feedback_dir))
    if args.web:
        check_page(args)
    runtime = start_runtime(args.gpu_id, dtype=args.dtype, seed=args.seed, report_to="none")
    settings = Settings(*(getattr(args, name) for name in Settings._fields))
    with redirect_stdout(sys.stderr):  # stdout is for answers
        say(runtime.notice)
        voices, judge = load_all(args, runtime)
    if args.web:
        serve(args, voices, judge, settings, runtime)
    else:
        failed = talk(voices, judge, settings, runtime, Path(args.feedback_dir))
        if failed and not sys.stdin.isatty():  # scripts go by the exit code
            lines = "1 line" if failed == 1 else f"{failed} lines"
            raise RunError(f"{lines} of the input could not be done: see above")


def read_lines() -> Iterator[str]:
    """Read what the user writes, line by line: from a terminal with a prompt, or from a pipe."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  input() then knows the arrow keys

        say("/help tells what else can be done here")
        while True:
            try:
                yield input("> ")
            except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
                print()
                return
    yield from sys.stdin


def talk(
    voices: list[Voice],
    judge: Scorer | None,
    settings: Settings,
    runtime: Runtime,
    feedback_dir: Path,
) -> int:
    """Talk in the terminal: one answers after the other. Returns how many lines failed."""
    state, failed = new_talk(voices), 0
    for line in read_lines():
        question = line.strip()
        command, _, value = question.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                break
            if command == "/reset":
                state = new_talk(voices)
            elif command == "/better":
                row = row_of(value.strip(), [voice.name for voice in voices])
                tell(state.choose(row, feedback_dir).told())
            elif command.startswith("/"):
                settings = obey(command, value.strip(), settings)
            elif question:
                state.begin(question)
                for row, voice in enumerate(voices):
                    options = {"turn": state.turn, "row": row, "judge": judge, "runtime": runtime}
                    stream = answer(voice, state.exchanges[row], question, settings, **options)
                    try:
                        state.latest[row] = show(stream, f"{voice.name}: " * (len(voices) > 1))
                    except InputError as error:
                        state.failures.append(f"{voice.name}: {error}")
                        tell(state.failures[-1])
                state.end()
                failed += bool(state.failures)
                if any(state.latest):
                    tell(unknown_note(voices, question))
        except InputError as error:
            failed += 1
            tell(str(error))
        except OSError as error:
            if command != "/better":
                raise
            failed += 1
            tell(cannot_write(feedback_dir, error))
    return failed


def tell(text: str) -> None:
    """Print what is no answer, to stderr: stdout may go to a file."""
    with redirect_stdout(sys.stderr):
        say(text)


def row_of(name: str, names: list[str]) -> int:
    """Find a name, in whatever case if that leaves one. Raises: InputError.

    >>> row_of("ppo", ["SFT", "PPO"]), row_of("a", ["A", "a"])
    (1, 1)
    """
    found = [n for n in names if n == name] or [n for n in names if n.lower() == name.lower()]
    if len(found) != 1:
        raise InputError(f"/better wants one of {', '.join(names)}, not {name!r}")
    return names.index(found[0])


def obey(command: str, value: str, settings: Settings) -> Settings:
    """Do what a line that begins with / says; returns the settings from then on."""
    name = command[1:]
    if command == "/help":
        say(HELP)
    elif name in Settings._fields:
        return settings._replace(**{name: check_setting(name, value)})
    else:
        raise InputError(f"{command}: there is no such command; /help shows them")
    return settings


def show(exchanges: Iterator[Exchange], name: str) -> Exchange | None:
    """Write an answer as it comes; returns the exchange, if there is one. Ctrl-C stops it.

    Raises: InputError if it cannot be asked.
    """
    exchange, shown = None, 0
    try:
        for latest in exchanges:
            if exchange is None:
                if latest.num_dropped:
                    tell(f"note: {latest.author} answers {latest.dropped_note()}")
                print(name, end="")
            exchange, text = latest, latest.answer.text
            print(text[shown:].translate(CONTROLS), end="", flush=True)
            shown = len(text)
        if exchange is not None and not exchange.answer.is_whole:
            print(" (cut)", end="")
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    if exchange is not None and exchange.score is not None:
        print(f"\n{'  ' * bool(name)}[reward {exchange.score:.2f}]", end="")
    print(flush=True)
    return exchange


def serve(
    args: argparse.Namespace,
    voices: list[Voice],
    judge: Scorer | None,
    settings: Settings,
    runtime: Runtime,
) -> None:
    """Talk on a page, until Ctrl-C."""
    from rlhf.chat_page import ChatPage, open_page  # need gradio, which the terminal does not

    if not is_loopback(args.host):
        say(
            f"note: --host={args.host}: whoever can reach port {args.port} of this machine can ask"
            f" the models and add to {args.feedback_dir}; there is no password"
        )
    page = ChatPage(
        voices,
        settings,
        answer=partial(answer, judge=judge, runtime=runtime),
        read_settings=read_settings,
        feedback_dir=Path(args.feedback_dir),
    )
    close = open_page(page, host=args.host, port=args.port)
    shown = f"[{args.host}]" if ":" in args.host else args.host
    say(f"page: http://{shown}:{args.port} (Ctrl-C ends it)")
    try:
        Event().wait()
    except KeyboardInterrupt:
        close()


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
