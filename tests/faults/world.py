"""A small world to break: data, an SFT and a reward model, and a stage as a process."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import load_dataset
import run_dpo
import run_ppo
import run_rm
import run_sft
from rlhf.disk import CARD
from rlhf.errors import run_script
from toyworld.__main__ import main as make_world
from toyworld.__main__ import parse_args as parse_world

SCRIPTS = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo, "dpo": run_dpo}
SPLITS = {"sft": "sft", "rm": "rm", "ppo": "pref", "dpo": "pref"}
FAST = ["--max_len=64", "--batch_size=16", "--learning_rate=1e-3", "--log_step=2"]
OPTIONS = {
    "sft": ["--num_epochs=3", "--max_samples=64", "--dropout=0.1"],
    "rm": ["--num_epochs=3", "--max_samples=64", "--dropout=0.1"],
    "ppo": [
        "--num_outer_epoch=2",
        "--max_samples=48",
        "--eval_samples=8",
        "--temperature=1",
        "--max_new_tokens=4",
        "--minibatch_size=8",
    ],
    "dpo": ["--num_epochs=3", "--max_samples=64"],
}


def run_apart(body: Callable[[], None], log: Path) -> int:
    """Run something in a forked process of its own, as a script; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # whatever a test put there
        torch.set_num_threads(1)
        run_script(body)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # what a user would see as a traceback
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Wait for a process; returns its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class World:
    """Data, parents, and how to start a stage in any folder by always the same command."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log.txt"
        self.seconds: dict[str, float] = {}
        self.finish(self.make_data)
        base = f"--model_id={root}/world/gpt2-toy"
        self.base = {"sft": [base], "rm": [self.sft], "ppo": [self.sft, self.rm], "dpo": [self.sft]}
        for stage in SCRIPTS:
            start = time.monotonic()
            code = self.finish(self.stage(stage, self.whole(stage)))
            assert code == 0, self.log.read_text()
            self.seconds[stage] = time.monotonic() - start

    @property
    def sft(self) -> str:
        return f"--sft_model_path={self.root}/whole/sft/best"

    @property
    def rm(self) -> str:
        return f"--rm_model_path={self.root}/whole/rm/best"

    def whole(self, stage: str) -> Path:
        """The folder of a stage that nothing disturbed."""
        return self.root / "whole" / stage

    def make_data(self) -> None:
        root = self.root
        make_world(parse_world([f"--out_dir={root}/world", "--num_prompts=400"]))
        source = [f"--dataset={root}/world/ultrafeedback.jsonl", f"--data_dir={root}/data"]
        ratios = ["--sft_ratio=0.3", "--rm_ratio=0.3", "--language=any"]
        load_dataset.main(load_dataset.parse_args([*source, *ratios]))

    def arguments(self, stage: str, folder: Path, *more: str) -> list[str]:
        paths = [f"--data_dir={self.root}/data/{SPLITS[stage]}", f"--ckpt_dir={folder}"]
        return [*paths, *self.base[stage], *FAST, *OPTIONS[stage], *more]

    def stage(self, stage: str, folder: Path, *more: str) -> Callable[[], None]:
        """Make what runs a stage in a folder."""
        script, argv = SCRIPTS[stage], self.arguments(stage, folder, *more)
        return lambda: script.main(script.parse_args(argv))

    def finish(self, body: Callable[[], None]) -> int:
        return wait(run_apart(body, self.log))

    def told(self) -> str:
        """What the last process printed."""
        return self.log.read_text(errors="replace")


def content(folder: Path) -> dict[str, str]:
    """Every file of every checkpoint by its SHA-256, what `best` names, and what was logged."""
    files = {}
    for path in sorted(folder.glob("[!.]*_epoch=*/**/*")):
        if path.is_file() and path.name not in ("run.json", "SHA256SUMS"):  # they name the folder
            data = path.read_bytes()
            if path.name == CARD:  # whose table of arguments does too, in a column as wide as that
                lines = data.splitlines()
                data = b"\n".join(line for line in lines if not line.startswith(b"| `--"))
                data = re.sub(rb"[ -]+", b" ", data)
            files[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    return {**files, "best": os.readlink(folder / "best"), "metrics": json.dumps(rows)}
