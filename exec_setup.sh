# Sourced by every exec_*.sh, from the project's folder: chooses a Python, installs what it lacks
# and exports PYTHON. The order: $PYTHON, an active virtual environment, .venv, a new .venv.
# $requirements may name more files than requirements.txt.

setup_fail() {
    echo "exec_setup.sh: error: $*" >&2
    exit 1
}

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

if [ -n "${PYTHON:-}" ]; then
    case "$PYTHON" in
        /*) ;;
        */*) PYTHON="$OLDPWD/$PYTHON" ;; # relative to where the caller stood, not to this folder
    esac
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
else
    PYTHON="$PWD/.venv/bin/python"
    if ! "$PYTHON" -c "" 2>/dev/null; then
        base=
        for candidate in python3 python3.13 python3.12 python3.11; do
            if "$candidate" -c "$new_enough" 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || setup_fail "no Python 3.11 or newer found" \
            "(python3 is $(python3 -V 2>/dev/null || echo missing)): install one, or set PYTHON to its path"
        echo "exec_setup.sh: making .venv with $("$base" -V)" >&2
        "$base" -m venv --clear .venv >&2 || {
            rm -rf .venv
            setup_fail "$base cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
        }
    fi
fi

"$PYTHON" -c "$new_enough" 2>/dev/null || {
    seen=$("$PYTHON" -V 2>&1) || seen="no Python that runs"
    setup_fail "$PYTHON is $seen: set PYTHON to a Python 3.11 or newer"
}

# Only what is missing or out of bounds is handed to pip. What satisfies its requirement is pinned
# to the version it has, so that pip never trades a GPU machine's own torch for the tested one.
"$PYTHON" - ${requirements:-requirements.txt} >&2 <<'END' || exit 1
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback

import importlib
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def run(*command, **options):
    return subprocess.run([sys.executable, "-m", *command], **options).returncode == 0


def ensure_pip():
    """Environments made by uv have no pip; one whose making was interrupted has half a pip."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not run("pip", "--version", **quiet) and not run("ensurepip", **quiet):
        sys.exit(f"exec_setup.sh: error: {sys.executable} has no pip: install pip there")


try:
    from packaging.requirements import Requirement
except ImportError:  # a bare environment: pip carries a copy
    ensure_pip()
    importlib.invalidate_caches()
    from pip._vendor.packaging.requirements import Requirement


def read(path):
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def satisfied(requirement):
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


wanted = [requirement for path in sys.argv[1:] for requirement in read(path)]
lacking = [requirement for requirement in wanted if not satisfied(requirement)]
if lacking:
    ensure_pip()
    names = [requirement.name for requirement in lacking]
    print("exec_setup.sh: installing", *names, "into", sys.prefix, flush=True)
    kept = [requirement.name for requirement in wanted if requirement.name not in names]
    pins = [f"{name}=={installed(name)}" for name in kept]
    # A package that is there although nothing above names it gets no pin: pip keeps it if it can.
    pins += [str(pin) for pin in read("constraints.txt") if pin.name in names or not installed(pin.name)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pins))
        constraints.flush()
        options = ["--no-input", "--disable-pip-version-check", "--constraint", constraints.name]
        if not sys.stderr.isatty():
            options.append("--quiet")
        if not run("pip", "install", *options, *map(str, lacking)):
            sys.exit(
                f"exec_setup.sh: error: pip could not install {' '.join(names)} into {sys.prefix}: "
                "mend what it says above and run this again, or set PYTHON to another environment"
            )
END

export PYTHON
