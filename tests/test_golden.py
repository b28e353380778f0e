"""Ten seeded steps of every stage, as they were recorded: a refactor must give the same numbers.

    python -m tests.test_golden    records them anew; say why in the commit

Other processors and library versions round differently, and a rounding error in sampling becomes
another token: there the comparison is skipped, until a record is made.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

import run_dpo
import run_ppo
import run_rm
import run_sft
from load_dataset import main as load_dataset
from load_dataset import parse_args as parse_load_dataset
from toyworld.__main__ import main as make_world
from toyworld.__main__ import parse_args as parse_world

GOLDEN = Path(__file__).parent / "golden"
UNTIMED = {"tokens_per_second"}
MACHINE = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "processor": torch.backends.cpu.get_cpu_capability(),
}
COMMON = ["--max_len=64", "--max_steps=10", "--batch_size=16", "--log_step=1"]


def run_all(root: Path) -> dict[str, list[dict[str, float]]]:
    """Run all stages on the toy world; returns the rows of each metrics.jsonl."""
    torch.set_num_threads(1)
    world, data = f"--out_dir={root}/world", f"--data_dir={root}/data"
    make_world(parse_world([world, "--num_prompts=600"]))
    source = f"--dataset={root}/world/ultrafeedback.jsonl"
    ratios = ["--sft_ratio=0.3", "--rm_ratio=0.3", "--language=any"]
    load_dataset(parse_load_dataset([source, data, *ratios]))
    sft, rm = f"--sft_model_path={root}/sft/best", f"--rm_model_path={root}/rm/best"
    base, fast = f"--model_id={root}/world/gpt2-toy", "--learning_rate=1e-3"
    sampling = ["--temperature=0.9", "--top_k=12", "--max_new_tokens=4", "--minibatch_size=8"]
    stages = {
        "sft": (run_sft, "sft", [base, fast]),
        "rm": (run_rm, "rm", [sft, fast]),
        "ppo": (run_ppo, "pref", [sft, rm, *sampling, "--learning_rate=3e-4"]),
        "dpo": (run_dpo, "pref", [sft, "--learning_rate=3e-4"]),
    }
    rows = {}
    for stage, (script, split, options) in stages.items():
        folders = [f"--data_dir={root}/data/{split}", f"--ckpt_dir={root}/{stage}"]
        script.main(script.parse_args([*folders, *COMMON, *options]))
        lines = (root / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows[stage] = [
            {name: value for name, value in json.loads(line).items() if name not in UNTIMED}
            for line in lines
        ]
    return rows


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_ten_steps_are_as_recorded(stage, trajectories):
    machine, *record = json.loads((GOLDEN / f"{stage}.json").read_text(encoding="utf-8"))
    if machine != MACHINE:
        pytest.skip(f"recorded with {machine}, not {MACHINE}")
    assert len(trajectories[stage]) == len(record) == 12  # 10 steps, 2 evaluations
    for step, (row, expected) in enumerate(zip(trajectories[stage], record, strict=True)):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5), f"{stage}, row {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, recorded in run_all(Path(folder)).items():
            text = ",\n".join(json.dumps(row) for row in [MACHINE, *recorded])
            (GOLDEN / f"{name}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
