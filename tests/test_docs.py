"""What is written equals what runs: README tables = argparse = exec_*.sh, and no dead reference."""

import argparse
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py"))]
FOLDERS = ("docs", "examples")
PAGES = [ROOT / "README.md", *sorted(page for x in FOLDERS for page in (ROOT / x).rglob("*.md"))]
REQUIRED = "REQUIRED"

# The promised names and defaults, written out once more by hand: a changed default is a changed
# product. Every float is written as one: 5.0 and 5 are different types to argparse.
TRAINING = {
    "dtype": "auto",
    "micro_batch_size": 0,
    "gradient_checkpointing": False,
    "compile": False,
    "max_gradient_norm": 1.0,
    "log_step": 10,
    "max_steps": 0,
    "max_samples": 0,
    "report_to": "none",
    "resume": "auto",
    "save_every": 10.0,
    "keep": 0,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "load_dataset.py": {
        "seed": 42,
        "data_dir": ".data",
        "sft_ratio": 0.1,
        "rm_ratio": 0.1,
        "train_ratio": 0.8,
        "dataset": "openbmb/UltraFeedback",
        "dataset_revision": None,
        "language": "en",
        "min_score_gap": 0.0,
        "exclude_source": None,
        "sft_responses": "all",
        "max_samples": 0,
    },
    "run_sft.py": {
        "seed": 42,
        "data_dir": ".data/sft",
        "ckpt_dir": ".model/sft",
        "model_id": "openai-community/gpt2",
        "gpu_id": 0,
        "max_len": 1024,
        "min_gen_len": 1,
        "batch_size": 16,
        "num_epochs": 5,
        "learning_rate": 2e-5,
        "warmup_ratio": 0.1,
        "dropout": 0.0,
        **TRAINING,
    },
    "run_rm.py": {
        "seed": 42,
        "data_dir": ".data/rm",
        "sft_model_path": REQUIRED,
        "ckpt_dir": ".model/rm",
        "gpu_id": 0,
        "max_len": 1024,
        "min_target_len": 1,
        "batch_size": 16,
        "num_epochs": 3,
        "learning_rate": 1e-5,
        "warmup_ratio": 0.0,
        "max_reward": 5.0,
        "loss": "regression",
        "margin": False,
        "center_coeff": 0.0,
        "dropout": 0.0,
        **TRAINING,
    },
    "run_ppo.py": {
        "seed": 42,
        "sft_model_path": REQUIRED,
        "rm_model_path": None,  # or --reward_fn: the script asks for one of the two
        "ckpt_dir": ".model/ppo",
        "gpu_id": 0,
        "max_reward": 5.0,
        "data_dir": ".data/pref",
        "max_len": 1024,
        "min_gen_len": 1,
        "do_sampling": True,
        "temperature": 0.2,
        "top_k": 50,
        "top_p": 1.0,
        "num_outer_epoch": 1,
        "num_inner_epoch": 3,
        "batch_size": 16,
        "num_responses": 1,
        "advantage": "gae",
        "learning_rate": 1e-5,
        "beta": 0.2,
        "kl_controller": "fixed",
        "target_kl": 6.0,
        "max_kl_div": 10.0,
        "gae_lambda": 0.9,
        "gamma": 1.0,
        "epsilon": 0.2,
        "early_stop_kl": 0.0,
        "value_loss_coeff": 0.1,
        "minibatch_size": 0,
        "max_new_tokens": 0,
        "missing_eos_penalty": 1.0,
        "value_clip": 0.0,
        "critic": "separate",
        "reward_fn": None,
        "reward_label": None,
        "normalize_reward": "none",
        "eval_samples": 256,
        **TRAINING,
        "log_step": 1,
        "lora_dropout": 0.0,
        "share_trunk": False,
    },
    "run_dpo.py": {
        "seed": 42,
        "sft_model_path": REQUIRED,
        "ckpt_dir": ".model/dpo",
        "gpu_id": 0,
        "data_dir": ".data/pref",
        "max_len": 1024,
        "min_gen_len": 1,
        "num_epochs": 1,
        "batch_size": 16,
        "learning_rate": 1e-5,
        "loss": "dpo",
        "beta": "auto",
        "label_smoothing": 0.0,
        "simpo_gamma": 1.0,
        "sft_coeff": "auto",
        **TRAINING,
        "log_step": 100,
        "lora_dropout": 0.0,
    },
    "run_eval.py": {
        "seed": 42,
        "model_path": REQUIRED,
        "prompts": ".data/pref/eval.jsonl",
        "max_prompts": 805,
        "out_dir": ".model/eval",
        "rm_model_path": None,
        "reward_label": None,
        "reward_fn": None,
        "judge_model": None,
        "judge_timeout": 60.0,
        "judge_retries": 5,
        "judge_workers": 16,
        "gpu_id": 0,
        "dtype": "auto",
        "max_len": 1024,
        "max_new_tokens": 256,
        "min_gen_len": 1,
        "do_sampling": True,
        "temperature": 0.2,
        "top_k": 50,
        "top_p": 1.0,
    },
    "run_chat.py": {
        "model_path": REQUIRED,
        "rm_model_path": None,
        "reward_label": None,
        "web": False,
        "host": "127.0.0.1",
        "port": 7860,
        "feedback_dir": ".data/chat",
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 1.0,
        "max_new_tokens": 256,
        "seed": 42,
        "max_len": 1024,
        "gpu_id": 0,
        "dtype": "auto",
    },
}
ALIASES = {
    "run_sft.py": {"max_grad_norm"},
    "run_rm.py": {"max_grad_norm"},
    "run_ppo.py": {"do_sample", "num_outer_epochs", "num_inner_epochs", "max_grad_norm"},
    "run_dpo.py": {"logging_steps", "max_grad_norm"},
    "run_eval.py": {"do_sample"},
}
# The exec scripts name a checkpoint here, where argparse has nothing to offer.
EXEC_VALUES = {"sft_model_path": ".model/sft/best", "rm_model_path": ".model/rm/best"}
EXEC_MODELS = ["SFT=.model/sft/best", "PPO=.model/ppo/best", "DPO=.model/dpo/best"]


@cache
def actions_of(script: str) -> list[argparse.Action]:
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser()._actions


def options_of(script: str) -> dict[str, argparse.Action]:
    """First long name, without dashes, to its action; `--help` and hidden ones are left out."""
    return {
        action.option_strings[0].removeprefix("--"): action
        for action in actions_of(script)
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help"
    }


def same_value(text: str, action: argparse.Action) -> bool:
    """Does argparse make its own default out of `text`?"""
    value = action.type(text) if callable(action.type) else text
    return type(value) is type(action.default) and value == action.default


def exec_script(script: str) -> Path:
    return ROOT / f"exec_{script.removesuffix('.py')}.sh"


# --- argparse


@pytest.mark.parametrize("script", DEFAULTS)
def test_names_types_and_defaults_are_the_promised_ones(script):
    promised = DEFAULTS[script]
    options = options_of(script)
    assert set(options) >= set(promised)
    for name, default in promised.items():
        action = options[name]
        found = REQUIRED if action.required else action.default
        assert (name, found, type(found)) == (name, default, type(default))


@pytest.mark.parametrize("script", ALIASES)
def test_aliases_are_the_promised_ones(script):
    names = {name[2:] for action in options_of(script).values() for name in action.option_strings}
    assert ALIASES[script] <= names


# --- exec_*.sh


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_script_holds_every_default(script):
    text = exec_script(script).read_text().replace("$place", "")  # the demo's, where they are all
    lines = re.findall(r"^ +--(\w+)=(\S*)", text, flags=re.MULTILINE)
    models = [value for name, value in lines if name == "model_path"]
    assert models in ([], EXEC_MODELS)
    lines = [line for line in lines if line[0] != "model_path"]
    values = dict(lines)
    assert len(values) == len(lines), "an argument stands there twice"
    options = options_of(script)
    with_default = {name for name, action in options.items() if action.default not in (None, [])}
    assert with_default <= set(values) <= set(options)
    for name, value in values.items():
        if name in EXEC_VALUES:
            assert value == EXEC_VALUES[name]
        else:
            assert same_value(value, options[name]), f"{name}: {value}"


# --- README.md


class Row(NamedTuple):
    name: str
    aliases: set[str]
    default: str


def readme_rows(heading: str) -> list[Row]:
    """The rows of the table below `### heading`, up to the next heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n### {heading}\n")
    assert found, f"README.md has no section ### {heading}"
    section = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]
    rows = []
    for line in section.splitlines():
        if re.match(r"\| *`--", line):
            first, default = (cell.strip() for cell in line.split("|")[1:3])
            name, *aliases = re.findall(r"--(\w+)", first)
            rows.append(Row(name, set(aliases), default.strip("`– ")))
    return rows


def check_row(row: Row, action: argparse.Action) -> None:
    names = {name.removeprefix("--") for name in action.option_strings}
    assert {row.name} | row.aliases == names
    if action.required:
        assert row.default == REQUIRED, row
    elif action.default in (None, []):
        assert row.default == "", row
    else:
        assert same_value(row.default, action), row


def common_rows() -> dict[str, Row]:
    return {row.name: row for row in readme_rows("Arguments of every training script")}


def test_the_readme_has_the_arguments_of_every_training_script():
    rows = readme_rows("Arguments of every training script")
    assert sorted(row.name for row in rows) == sorted(TRAINING)
    for row in rows:
        check_row(row, options_of("run_sft.py")[row.name])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_table_of_a_script_is_its_argparse(script):
    options = options_of(script)
    rows = readme_rows(script)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)), "an argument stands there twice"
    # What the common table already says, name and default, need not be said again.
    said = {
        name
        for name, row in common_rows().items()
        if set(TRAINING) <= set(options) and same_value(row.default, options[name])
    }
    assert set(options) - said <= set(names) <= set(options)
    for row in rows:
        check_row(row, options[row.name])


# --- every page


def code_of(page: Path) -> tuple[list[str], list[str]]:
    """The lines in fences (continued lines joined) and the inline code of a page."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(fences).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines, re.findall(r"`([^`\n]+)`", prose)


def ids_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_files_and_functions_that_are_named_exist(page):
    folders = [ROOT, page.parent, *(ROOT / name for name in ("rlhf", "tests", "toyworld"))]
    lines, inline = code_of(page)
    for code in inline:
        match = re.fullmatch(r"(\.?[\w/-]+\.(?:py|sh|md|txt|toml|yml))(?:::(\w+))?", code)
        if match:
            path, function = match.groups()
            found = [folder / path for folder in folders if (folder / path).exists()]
            assert found, f"{code} does not exist"
            if function:
                assert f"def {function}(" in found[0].read_text(encoding="utf-8"), code
    for command in lines + inline:
        for path in re.findall(r"\b(?:sh|python3?|launch|torchrun) ([\w/]+\.(?:sh|py))", command):
            assert (ROOT / path).exists(), command


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_flags_that_are_named_exist(page):
    """A flag after one of our scripts must be that script's; one on its own, any script's."""
    known = {
        script: {name for action in actions_of(script) for name in action.option_strings}
        for script in SCRIPTS
    }
    anywhere = set().union(*known.values())
    lines, inline = code_of(page)
    for code in lines + inline:
        if re.match(r"--\w", code):
            assert re.match(r"--[\w-]+", code)[0] in anywhere, code
        # One line may hold several commands: sh exec_run_sft.sh --seed=7 && sh exec_run_rm.sh
        for command in re.split(r"&&|[;|#]", code):
            stems = "|".join(script.removesuffix(".py") for script in SCRIPTS)
            match = re.search(rf"(?:exec_)?\b({stems})\.(?:py|sh)\b(.*)", command)
            if match:
                flags = set(re.findall(r"(?<!\S)--[\w-]+", match[2]))
                assert flags <= known[f"{match[1]}.py"], command
