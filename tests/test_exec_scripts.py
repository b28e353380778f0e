"""The shell scripts: plain POSIX sh, callable from anywhere, and sparing with installs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("exec_*.sh") if path.name != "exec_setup.sh")
NAMES = [path.name for path in SCRIPTS]

# Pythons of an age of our choice, that lack nothing; what they are told to run, they write to
# $RECORD. `-m venv --clear .venv` makes a .venv that holds a copy of themselves.
STUB_PYTHON = """#!/bin/sh
case "$1" in
    -V) echo "Python VERSION" ;;
    -c) exec REAL -c "import sys; sys.version_info = tuple(map(int, 'VERSION'.split('.'))); $2" ;;
    -) exit 0 ;;
    -m) [ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; } || exit 1 ;;
esac
[ -z "$RECORD" ] || printf '%s\\n' "$PWD" "$@" >>"$RECORD"
""".replace("REAL", sys.executable)
GOOD_PYTHON = STUB_PYTHON.replace("VERSION", "3.11.0")
OLD_PYTHON = STUB_PYTHON.replace("VERSION", "3.10.19")
PROBE = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
. ./exec_setup.sh
echo "$PYTHON"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def run_sh(script: Path, *arguments: str, cwd: Path, **environment: str | Path):
    """Run a script with nothing but PATH and `environment` set."""
    variables = {"PATH": os.environ["PATH"], **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(
        ["sh", str(script), *arguments], cwd=cwd, env=variables, capture_output=True, text=True
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The single line of stderr of a run that failed."""
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("exec_setup.sh: error: ")
    return line


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the setup alone, and a script that says which Python it chose."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("exec_setup.sh", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    write_program(folder / "exec_probe.sh", PROBE)
    return folder


def test_there_is_a_shell_script_for_every_stage():
    stages = {"exec_load_dataset.sh", "exec_run_sft.sh", "exec_run_rm.sh"}
    stages |= {"exec_run_ppo.sh", "exec_run_dpo.sh", "exec_demo.sh", "exec_tests.sh"}
    stages |= {"exec_run_eval.sh", "exec_run_chat.sh"}
    assert stages <= set(NAMES)


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_every_script_is_valid_posix_shell(shell):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    for path in [*SCRIPTS, ROOT / "exec_setup.sh"]:
        assert subprocess.run([shell, "-n", path]).returncode == 0, path.name
        bashisms = r"^\s*(function|source|local|declare) |\[\["
        assert not re.search(bashisms, path.read_text(), flags=re.MULTILINE), path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_every_script_has_the_same_frame(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/sh"
    assert os.access(path, os.X_OK)
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == 'cd "$(dirname "$0")" || exit 1'
    assert ". ./exec_setup.sh" in code
    assert code[-1].strip().endswith('"$@"')
    options = [line for line in code if line.lstrip().startswith("--")]
    for line in options:
        assert re.fullmatch(r" +--\w+=\S*( \\)?", line), f"not one argument a line: {line}"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_arguments_of_the_caller_come_last_from_any_folder(path, tmp_path):
    python = write_program(tmp_path / "python", GOOD_PYTHON)
    record = tmp_path / "record"
    result = run_sh(path, "--seed=7", "a b", cwd=tmp_path, PYTHON=python, RECORD=record)
    assert result.returncode == 0, result.stderr
    told = record.read_text().splitlines()
    assert told[0] == str(ROOT)
    assert told[-2:] == ["--seed=7", "a b"]


@pytest.mark.parametrize("name", ["exec_run_eval.sh", "exec_run_chat.sh"])
def test_where_only_the_demo_was_run_its_checkpoints_are_taken(project, tmp_path, name):
    shutil.copy(ROOT / name, project)
    python = write_program(tmp_path / "python", GOOD_PYTHON)

    def told() -> dict[str, str]:
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        run_sh(project / name, "--seed=7", cwd=tmp_path, PYTHON=python, RECORD=record)
        lines = record.read_text().splitlines()
        assert lines[-1] == "--seed=7"
        return dict(line.rsplit("=", 1) for line in lines if "=" in line)  # the last one counts

    for stage in ("sft", "rm"):
        (project / f".model/toyworld/{stage}/best").mkdir(parents=True)
    assert told()["--model_path=SFT"] == ".model/toyworld/sft/best"
    assert told()["--rm_model_path"] == ".model/toyworld/rm/best"
    assert told()["--max_len"] == "64"
    (project / ".model/sft/best").mkdir(parents=True)
    assert told()["--model_path=SFT"] == ".model/sft/best"
    assert told()["--max_len"] == "1024"


@pytest.mark.parametrize("name", ["exec_run_eval.sh", "exec_run_chat.sh"])
def test_models_that_are_not_there_are_left_out_and_told_of(project, tmp_path, name):
    shutil.copy(ROOT / name, project)
    python = write_program(tmp_path / "python", GOOD_PYTHON)

    def given(*arguments: str) -> tuple[list[str], list[str]]:
        """The models that the script hands on, and what it says."""
        record = tmp_path / "record"
        record.unlink(missing_ok=True)
        result = run_sh(project / name, *arguments, cwd=tmp_path, PYTHON=python, RECORD=record)
        lines = record.read_text().splitlines()
        return [x for x in lines if "model_path=" in x], result.stderr.splitlines()

    left_out = f"{name}: not there, and left out: --"
    models, said = given()
    assert models == [] and len(said) == 5 and all(x.startswith(left_out) for x in said[:4])
    assert said[4] == f"{name}: no model is left: name one, or train some by sh exec_demo.sh"
    mine = "--model_path=MINE=a b/best"  # what is typed is never left out
    models, said = given(mine)
    assert models == [mine] and len(said) == 4
    for stage in ("dpo", "sft"):
        (project / f".model/{stage}/best").mkdir(parents=True)
    models, said = given(mine)
    ours = [f"--model_path={x.upper()}=.model/{x}/best" for x in ("sft", "dpo")]
    assert models == [*ours, mine]
    assert said == [
        f"{left_out}model_path=PPO=.model/ppo/best",
        f"{left_out}rm_model_path=.model/rm/best",
    ]


def test_the_chooser_takes_python_then_the_active_environment_then_dot_venv(project, tmp_path):
    given = write_program(tmp_path / "given", GOOD_PYTHON)
    active = write_program(tmp_path / "active" / "bin" / "python", GOOD_PYTHON)
    existing = write_program(project / ".venv" / "bin" / "python", GOOD_PYTHON)
    probe = project / "exec_probe.sh"

    def chosen(**environment: str | Path) -> str:
        result = run_sh(probe, cwd=tmp_path, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.strip()

    assert chosen(PYTHON=given, VIRTUAL_ENV=tmp_path / "active") == str(given)
    assert chosen(PYTHON="./given") == f"{tmp_path}/./given"  # seen from the caller's folder
    assert chosen(VIRTUAL_ENV=tmp_path / "active") == str(active)
    assert chosen() == str(existing)


def test_without_any_environment_a_new_one_is_made(project, tmp_path):
    write_program(tmp_path / "bin" / "python3", GOOD_PYTHON)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PATH=path)
    assert result.stdout.strip() == str(project / ".venv" / "bin" / "python")
    assert result.stderr == "exec_setup.sh: making .venv with Python 3.11.0\n"


def test_an_older_python3_is_passed_over_for_a_newer_one(project, tmp_path):
    write_program(tmp_path / "bin" / "python3", OLD_PYTHON)
    write_program(tmp_path / "bin" / "python3.13", GOOD_PYTHON)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PATH=path)
    assert result.stdout.strip() == str(project / ".venv" / "bin" / "python")


@pytest.mark.parametrize("variable", ["PYTHON", "VIRTUAL_ENV"])
def test_a_python_that_is_too_old_or_absent_ends_in_one_line(project, tmp_path, variable):
    old = write_program(tmp_path / "bin" / "python", OLD_PYTHON)
    value = {"PYTHON": old, "VIRTUAL_ENV": tmp_path}[variable]
    line = one_line(run_sh(project / "exec_probe.sh", cwd=tmp_path, **{variable: value}))
    assert str(old) in line and "3.10.19" in line and "3.11 or newer" in line
    old.unlink()
    line = one_line(run_sh(project / "exec_probe.sh", cwd=tmp_path, **{variable: value}))
    assert str(old) in line and "3.11 or newer" in line


def test_a_venv_that_could_not_be_made_leaves_nothing_behind(project, tmp_path):
    broken = GOOD_PYTHON.replace("cp ", "false ")
    write_program(tmp_path / "bin" / "python3", broken)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PATH=path)
    assert result.returncode == 1 and "virtual environment" in result.stderr
    assert not (project / ".venv").exists()


# --- what is installed. The environment is real, its packages are names and versions only, and its
# pip writes down what it is asked for.

RECORDING_PIP = """
import os, pathlib, sys
if "--version" not in sys.argv:
    constraints = sys.argv[sys.argv.index("--constraint") + 1]
    told = " ".join(sys.argv[1:]) + chr(10) + pathlib.Path(constraints).read_text()
    pathlib.Path(os.environ["RECORD"]).write_text(told)
"""


def pins(name: str) -> dict[str, str]:
    """Package to version, from the `a==1` lines of constraints.txt (or of the text itself)."""
    text = (ROOT / name).read_text() if name.endswith(".txt") else name
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.MULTILINE))


def build_environment(folder: Path, versions: dict[str, str]) -> Path:
    """A virtual environment that seems to hold `versions`; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        write_program(site / f"{name.replace('-', '_')}-{version}.dist-info/METADATA", metadata)
    write_program(site / "pip" / "__main__.py", RECORDING_PIP)
    shutil.copytree(Path(packaging.__file__).parent, site / "packaging")
    return folder / "bin" / "python"


def asked_of_pip(record: Path) -> tuple[set[str], dict[str, str]]:
    """The requirements that pip was called with, and the versions it was held to."""
    command, _, constraints = record.read_text().partition("\n")
    return set(re.findall(r"[\w-]+(?=[<>])", command)), pins(constraints)


def required() -> set[str]:
    return set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))


def test_a_satisfied_environment_installs_nothing(project, tmp_path):
    python = build_environment(tmp_path / "env", pins("constraints.txt"))
    record = tmp_path / "record"
    result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PYTHON=python, RECORD=record)
    assert (result.returncode, result.stderr) == (0, "")
    assert not record.exists()


def test_an_empty_environment_gets_the_tested_versions(project, tmp_path):
    python = build_environment(tmp_path / "env", {})
    record = tmp_path / "record"
    result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PYTHON=python, RECORD=record)
    assert result.returncode == 0, result.stderr
    assert asked_of_pip(record) == (required(), pins("constraints.txt"))


def test_a_torch_that_satisfies_is_never_replaced(project, tmp_path):
    versions = {**pins("constraints.txt"), "torch": "2.11.0+cu130", "tokenizers": "0.23.2"}
    versions["transformers"] = "5.16.0"  # below the floor
    del versions["tensorboard"]
    python = build_environment(tmp_path / "env", versions)
    record = tmp_path / "record"
    run_sh(project / "exec_probe.sh", cwd=tmp_path, PYTHON=python, RECORD=record)
    names, held = asked_of_pip(record)
    assert names == {"tensorboard", "transformers"}
    assert held["torch"] == "2.11.0+cu130"
    assert held["transformers"] == pins("constraints.txt")["transformers"]
    assert "tokenizers" not in held  # neither fixed to the old one nor traded for ours: pip decides


def test_a_failing_pip_ends_in_one_clear_line_and_may_be_tried_again(project, tmp_path):
    python = build_environment(tmp_path / "env", {"torch": "2.11.0"})
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    write_program(site / "pip" / "__main__.py", "import sys; sys.exit('--version' not in sys.argv)")
    for _ in range(2):
        result = run_sh(project / "exec_probe.sh", cwd=tmp_path, PYTHON=python)
        said, error = result.stderr.splitlines()
        assert result.returncode == 1 and result.stdout == ""
        assert said.startswith("exec_setup.sh: installing transformers ")
        assert error.startswith("exec_setup.sh: error: pip could not install transformers ")


@pytest.mark.parametrize(
    ("arguments", "wants_gradio"),
    [
        ([], False),
        (["--web=false"], False),
        (["--no-web"], False),
        (["--web=true"], True),
        (["--seed=7", "--web"], True),
    ],
)
def test_the_page_alone_wants_gradio(project, tmp_path, arguments, wants_gradio):
    for name in ("exec_run_chat.sh", "requirements-chat.txt"):
        shutil.copy(ROOT / name, project)
    versions = pins("constraints.txt")
    del versions["gradio"]
    python = build_environment(tmp_path / "env", versions)
    record = tmp_path / "record"
    script = project / "exec_run_chat.sh"
    run_sh(script, *arguments, cwd=tmp_path, PYTHON=python, RECORD=record)
    assert record.exists() == wants_gradio
    assert not wants_gradio or asked_of_pip(record)[0] == {"gradio"}


def test_every_requirement_has_a_tested_version_within_its_bounds():
    tested = pins("constraints.txt")
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-chat.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                assert requirement.specifier.contains(tested[requirement.name]), line
                assert {mark.operator for mark in requirement.specifier} == {">=", "<"}, line
