"""The two exceptions that end a script in one line, and the function that prints that line."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

SECONDS_FOR_MAIN = 10.0
DIVERGED = "A lower --learning_rate or --dtype=float32 may help"


class InputError(Exception):
    """The user's arguments, files or rows cannot be used. The script ends with exit code 2.

    The message names the argument, file or row, the value seen, and the remedy.
    """


class RunError(Exception):
    """The run itself failed: a loss that is not finite, a full disk. Exit code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out; torch has no class for it on the CPU."""
    is_cuda = type(error).__name__ == "OutOfMemoryError"
    on_cpu = ("can't allocate memory", "not enough memory")
    return is_cuda or isinstance(error, MemoryError) or any(x in str(error) for x in on_cpu)


def is_left_alone(error: BaseException) -> bool:
    """Tell whether an error means that another process of the run has ended, of what it told."""
    gone = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return type(error).__name__ == "DistBackendError" or any(x in str(error) for x in gone)


def exit_in_one_line(name: str, message: str, code: int) -> NoReturn:
    """Write `name: error: message` as one line to stderr and exit with `code`.

    What one process of a run finds, mostly all find. So the others leave it to the first, whose
    exit makes the launcher end them; if they outlive it, it was theirs alone.
    """
    rank = os.environ.get("RANK") or "0"
    if rank != "0":
        time.sleep(SECONDS_FOR_MAIN)
        name = f"{name}, process {rank}"
    sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
    raise SystemExit(code)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; end in one line on what a user can cause (`RLHF_DEBUG=1`: traceback)."""
    name = os.path.basename(sys.argv[0])
    # A stream that was closed before the start is None, which nothing can print to.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        main()
    except (InputError, RunError) as error:
        if os.environ.get("RLHF_DEBUG") == "1":
            raise
        exit_in_one_line(name, str(error), 2 if isinstance(error, InputError) else 1)
    except (RuntimeError, MemoryError) as error:
        if is_left_alone(error) and os.environ.get("RLHF_DEBUG") != "1":
            exit_in_one_line(name, "another process of this run has ended, and so does this one", 1)
        if not is_out_of_memory(error) or os.environ.get("RLHF_DEBUG") == "1":
            raise
        remedy = "set --micro_batch_size=1, then lower --max_len or --batch_size"
        exit_in_one_line(name, f"out of memory: {remedy}", 1)
    except KeyboardInterrupt:
        exit_in_one_line(name, "interrupted", 130)
    except BrokenPipeError:
        # What Python would still flush on its way out must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_in_one_line(name, "the output was closed, as by | head, and the run has stopped", 1)
    except OSError as error:
        if os.environ.get("RLHF_DEBUG") == "1":
            raise
        where = f": {error.filename}" if error.filename else ""
        exit_in_one_line(name, f"{error.strerror or error}{where}", 1)
