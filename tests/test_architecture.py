"""The rules of the house that a program can check: who may import whom, and what stays out."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf

ROOT = Path(__file__).parent.parent

# module: the modules of rlhf that it may import. Data flows down this list and never back up.
# `errors` may be imported by all; the scripts join what stands apart here.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "arguments": set(),
    "files": set(),
    "sources": set(),
    "language": {"sources"},
    "splits": {"sources"},
    "records": {"disk", "sources", "splits"},
    "token_cache": set(),
    "templates": {"records"},
    "tokens": {"records", "templates", "token_cache"},
    "rankings": {"records"},
    "batches": {"tokens"},
    "heads": set(),
    "models": {"batches", "files", "heads", "templates", "tokens"},
    "lora": set(),
    "sampling": set(),
    "kv_cache": set(),
    "responses": {"batches", "logprobs", "sampling"},
    "generation": {"batches", "heads", "kv_cache", "logprobs", "responses", "sampling"},
    "prompts": {"files", "metrics", "records", "sources", "tokens"},
    "actors": {"heads", "lora", "models", "runtime", "sampling", "tokens", "trunk"},
    "experience": {
        "actors",
        "batches",
        "generation",
        "heads",
        "logprobs",
        "masked",
        "models",
        "processes",
        "responses",
        "tokens",
    },
    "logprobs": {"masked"},
    "rewards": {"batches", "models", "runtime"},
    "classifiers": {
        "batches",
        "heads",
        "models",
        "records",
        "rewards",
        "runtime",
        "templates",
        "tokens",
    },
    "scorers": {
        "checkpoints",
        "classifiers",
        "metrics",
        "models",
        "rewards",
        "runtime",
        "tokens",
        "trunk",
    },
    "masked": set(),
    "advantages": {"masked"},
    "losses": {"masked"},
    "optim": {"processes", "sharding"},
    "evaluation": set(),
    "winrates": set(),
    "verdicts": {"disk", "records"},
    "endpoints": {"markdown", "verdicts"},
    "judges": {"disk", "endpoints", "records", "verdicts"},
    "answers": {
        "actors",
        "batches",
        "checkpoints",
        "evaluation",
        "experience",
        "lineage",
        "memory",
        "prompts",
        "rewards",
        "winrates",
    },
    "standings": {"judges", "winrates"},
    "lineage": {"checkpoints"},
    "figures": {"winrates"},
    "cautions": {"checkpoints", "lineage"},
    "report": {"figures", "lineage", "markdown", "page", "standings", "winrates"},
    "disk": set(),
    "checkpoints": {"disk", "lora", "processes"},
    "snippets": {"templates"},
    "cards": {"disk", "lora", "markdown", "records", "snippets", "splits"},
    "earlier": {"checkpoints", "disk"},
    "run_folder": {"cards", "checkpoints", "disk", "earlier", "processes", "sharding"},
    "markdown": set(),
    "page": {"markdown"},
    "curves": {"disk"},
    "metrics": {"curves", "disk", "processes"},
    "samples": {
        "batches",
        "experience",
        "generation",
        "metrics",
        "models",
        "runtime",
        "sampling",
        "tokens",
    },
    "trackers": {"disk", "markdown", "metrics", "processes", "runtime"},
    "trunk": {"checkpoints", "lora", "models"},
    "comparisons": {
        "batches",
        "checkpoints",
        "heads",
        "logprobs",
        "models",
        "processes",
        "runtime",
        "sharding",
        "tokens",
    },
    "memory": {"batches", "metrics"},
    "resume": {
        "batches",
        "checkpoints",
        "disk",
        "memory",
        "earlier",
        "metrics",
        "optim",
        "processes",
        "run_folder",
        "sharding",
    },
    "runtime": {"arguments", "processes"},
    "chat": {
        "actors",
        "batches",
        "checkpoints",
        "generation",
        "kv_cache",
        "models",
        "records",
        "responses",
        "rewards",
        "runtime",
        "sampling",
        "sources",
        "templates",
        "tokens",
    },
    "feedback": {"disk", "records", "sources", "splits"},
    "talks": {"chat", "feedback"},
    "chat_html": {"chat"},
    "gate": set(),
    "chat_page": {"chat", "chat_html", "feedback", "gate", "talks"},
    "errors": set(),
    "processes": set(),
    "sharding": {"heads", "processes"},
}
WITHOUT_TORCH = (
    "arguments",
    "endpoints",
    "errors",
    "files",
    "judges",
    "language",
    "rankings",
    "records",
    "sources",
    "splits",
    "templates",
    "token_cache",
    "tokens",
    "verdicts",
    "winrates",
)
TENSORS_ONLY = ("advantages", "logprobs", "losses", "masked")
TENSOR_LIBRARIES = {"collections", "functools", "math", "rlhf", "torch", "typing"}

PACKAGE = sorted((ROOT / "rlhf").glob("*.py"))
MODULES = [path for path in PACKAGE if path.stem != "__init__"]
SCRIPTS = sorted(ROOT.glob("*.py"))
TOYWORLD = sorted((ROOT / "toyworld").rglob("*.py"))
BY_NAME = {path.stem: path for path in MODULES}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports, at any depth: `from a import b` gives a and a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def called_names(path: Path) -> set[str]:
    """The names a file calls as plain functions: `print(...)`, not `x.print(...)`."""
    calls = (node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
    return {call.id for call in calls if isinstance(call, ast.Name)}


def attributes(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}


def names_of(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_the_map_in_the_package_docstring_lists_the_modules_that_exist():
    listed = re.findall(r"^    ([a-z_]+) {2,}\S", rlhf.__doc__ or "", flags=re.MULTILINE)
    assert sorted(listed) == sorted(BY_NAME)
    assert sorted(listed) == sorted(ALLOWED_IMPORTS)


def test_the_package_itself_holds_only_its_docstring():
    assert len(parse(ROOT / "rlhf" / "__init__.py").body) == 1


@pytest.mark.parametrize("path", MODULES, ids=names_of(MODULES))
def test_modules_import_only_what_stands_before_them(path):
    names = [name.split(".") for name in imported_names(path)]
    imported = {parts[1] for parts in names if parts[0] == "rlhf" and len(parts) > 1}
    assert imported <= ALLOWED_IMPORTS[path.stem] | {"errors"}


@pytest.mark.parametrize("path", MODULES, ids=names_of(MODULES))
def test_the_package_never_imports_scripts_or_the_toy_world(path):
    assert not libraries(path) & ({script.stem for script in SCRIPTS} | {"toyworld", "tests"})


@pytest.mark.parametrize("path", SCRIPTS, ids=names_of(SCRIPTS))
def test_scripts_never_import_each_other(path):
    assert not libraries(path) & {script.stem for script in SCRIPTS}


def test_text_modules_work_without_torch():
    for name in WITHOUT_TORCH:
        assert "torch" not in libraries(BY_NAME[name]), name
    imports = ", ".join(f"rlhf.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", TENSORS_ONLY)
def test_formulas_know_tensors_only(name):
    path = BY_NAME[name]
    assert libraries(path) <= TENSOR_LIBRARIES
    assert not called_names(path) & {"open", "print", "input"}
    # Each of these copies to the CPU or ties the formula to a device.
    assert not attributes(path) & {"item", "tolist", "cpu", "numpy", "cuda"}


def test_in_the_package_only_metrics_prints():
    assert [path.stem for path in MODULES if "print" in called_names(path)] in ([], ["metrics"])


def test_only_runtime_knows_accelerate():
    users = [path for path in MODULES + SCRIPTS + TOYWORLD if "accelerate" in libraries(path)]
    assert users == [BY_NAME["runtime"]]


def test_command_line_arguments_stay_outside_the_package():
    for path in MODULES:
        if path.stem not in ("arguments", "checkpoints"):
            assert "argparse" not in libraries(path), path.name
            named = {node.arg for node in ast.walk(parse(path)) if isinstance(node, ast.arg)}
            assert "args" not in named, path.name


def test_nothing_is_pickled_and_no_remote_code_is_trusted():
    trouble = re.compile(r"torch\.(load|save)\b|trust_remote_code(?!=False)|allow_pickle")
    for path in MODULES + SCRIPTS + TOYWORLD:
        assert not libraries(path) & {"cloudpickle", "dill", "joblib", "pickle", "shelve"}, path
        text = path.read_text(encoding="utf-8")
        assert not trouble.search(text), path


def test_there_is_no_trainer_and_no_configuration_class():
    for path in MODULES + SCRIPTS:
        classes = [node.name for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
        assert not [name for name in classes if re.search("Trainer|Callback|Config|Registry", name)]


@pytest.mark.parametrize("path", MODULES, ids=names_of(MODULES))
def test_modules_are_neither_crumbs_nor_heaps(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{path.name} has {lines} lines: split it"
    assert lines >= 30 or path.stem == "errors", f"{path.name} has {lines} lines: merge it"


def test_every_module_is_named_for_what_it_holds():
    shelves = {"common", "helpers", "misc", "util", "utils"}
    files = [*MODULES, *SCRIPTS, *TOYWORLD, *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in files if path.stem in shelves]


def test_no_name_at_the_top_shadows_a_library():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    libraries = required | {"evaluate", "peft", "tokenizers", "trl"} | set(sys.stdlib_module_names)
    importable = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not importable & libraries
