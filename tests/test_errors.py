"""How a script ends: one line on stderr and an exit code that tells whose fault it was."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import InputError, RunError, exit_in_one_line, run_script

ROOT = Path(__file__).parent.parent
FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/model.safetensors")


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a script whose main raises this."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


@pytest.fixture(autouse=True)
def named_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/run_sft.py", "--seed=1"])
    monkeypatch.delenv("RLHF_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("--beta=x: must be a number"), 2, "--beta=x: must be a number"),
        (RunError("step 7: the loss is nan"), 1, "step 7: the loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FULL, 1, "No space left on device: /disk/model.safetensors"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line(error, code, line, capsys):
    assert ending(error, capsys) == (code, f"run_sft.py: error: {line}\n")


def test_a_disk_fault_without_a_file_or_a_number_still_says_what_it_is(capsys):
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("tape is torn")):
        code, text = ending(error, capsys)
        assert code == 1 and text.count("\n") == 1
        assert text.endswith(("No space left on device\n", "tape is torn\n"))


def test_a_message_over_several_lines_becomes_one(capsys):
    code, text = ending(InputError("row 3:\n  first\r\n\tsecond\n"), capsys)
    assert (code, text) == (2, "run_sft.py: error: row 3: first second\n")


def test_a_run_that_succeeds_says_nothing(capsys):
    seen = []
    run_script(lambda: seen.append("ran"))
    assert seen == ["ran"] and capsys.readouterr() == ("", "")


def test_a_fault_of_our_own_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main)


@pytest.mark.parametrize("error", [InputError("x"), RunError("x"), FULL])
def test_debugging_shows_the_traceback(error, monkeypatch):
    def main() -> None:
        raise error

    monkeypatch.setenv("RLHF_DEBUG", "1")
    with pytest.raises(type(error)) as caught:
        run_script(main)
    assert caught.value is error


def test_exit_code_and_line_are_what_a_shell_sees():
    code = """
from rlhf.errors import InputError, run_script

def main():
    raise InputError("bad" + chr(10) + "row")

run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "-c: error: bad row\n")


def test_an_error_in_one_line_can_be_ended_with_any_code(capsys):
    with pytest.raises(SystemExit) as caught:
        exit_in_one_line("run.py", "a\nb", 7)
    assert caught.value.code == 7 and capsys.readouterr().err == "run.py: error: a b\n"


def test_a_closed_output_ends_in_one_line(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        "from rlhf.errors import run_script\n"
        "def main():\n"
        "    for _ in range(100_000):\n"
        "        print('a line of some length', flush=True)\n"
        "run_script(main)\n"
    )
    command = ["sh", "-c", f"{sys.executable} {script} | head -1"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stderr.count("\n") == 1
    assert "talk.py: error: the output was closed" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_do_not_end_a_script(closed, tmp_path):
    body = "print(1), sys.stderr.write('2'), sys.stdout.isatty(), Path(sys.argv[1]).touch()"
    imports = "import sys; from pathlib import Path; from rlhf.errors import run_script"
    code = f"{imports}; run_script(lambda: [{body}])"
    command = f'{sys.executable} -c "{code}" {tmp_path}/done {closed}'
    subprocess.run(command, shell=True, check=True, cwd=ROOT, capture_output=True)
    assert (tmp_path / "done").exists()
