"""Trainers, one after another, in as many processes as start this: see test_processes.

    torchrun --standalone --nproc_per_node 2 -m tests.four_stages BASE DATA OUT PARENTS 2 STAGE...

PARENTS has the checkpoints that RM, DPO and PPO start from; it may be OUT itself.
Writes what each run leaves, and the gradients of its first optimiser step.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import run_dpo
import run_ppo
import run_rm
import run_sft
from rlhf.processes import is_main_process, num_processes
from rlhf.sharding import whole

# Batches do not divide the rows: each run ends in one that leaves the second process less, or none.
COMMON = ["--max_len=64", "--learning_rate=1e-5", "--log_step=1", "--dtype=float32"]

LORA = ["--use_peft", "--lora_dropout=0"]
# Without --top_k each process keeps as many ids of a token as it needs.
PPO = ["--temperature=1.0", "--top_k=0", "--top_p=0.9", "--max_new_tokens=12", "--minibatch_size=4"]
RLOO = ["--advantage=rloo", "--num_responses=4", "--kl_controller=adaptive"]
RLOO += ["--early_stop_kl=1e-12"]  # after one step: all processes must see it


def keep_gradients(path: Path) -> None:
    """Write the gradients that the next optimiser steps clip, if they are the first of a run."""
    clip, kept = torch.nn.utils.clip_grad_norm_, []

    def clip_and_keep(parameters, max_norm):
        parameters = list(parameters)
        if not kept:
            kept.append({str(i): whole(p.grad).clone() for i, p in enumerate(parameters)})
            if is_main_process():
                save_file(kept[0], path)
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = clip_and_keep


def main(base: str, data: str, out: str, parents: str, number: str, *stages: str) -> None:
    reward = [f"--rm_model_path={parents}/rm/best"]
    runs = {
        "sft": (run_sft, [f"--model_id={base}", "--batch_size=6", "--max_samples=57"]),
        "rm": (run_rm, ["--batch_size=4", "--loss=pairwise", "--num_epochs=1", "--max_samples=50"]),
        "dpo": (run_dpo, ["--batch_size=4", "--max_samples=29", "--gradient_checkpointing"]),
        "rrhf": (run_dpo, ["--loss=rrhf", "--batch_size=4", "--max_samples=57"]),
        "lora": (
            run_sft,
            [f"--model_id={base}", "--batch_size=6", "--num_epochs=1", *LORA],
        ),
        "ppo": (run_ppo, [*PPO, *reward, "--batch_size=6", "--max_samples=25"]),
        "rloo": (run_ppo, [*PPO, *reward, *RLOO, "--batch_size=3", "--max_samples=10"]),
    }
    clip = torch.nn.utils.clip_grad_norm_
    for stage in stages:
        script, options = runs[stage]
        split = {"sft": "sft", "lora": "sft", "rm": "rm", "rrhf": "rm"}.get(stage, "pref")
        if script is not run_sft:
            options = [*options, f"--sft_model_path={parents}/sft/best"]
        folder = [f"--ckpt_dir={out}/{stage}", f"--data_dir={data}/{split}", "--max_steps=10"]
        torch.nn.utils.clip_grad_norm_ = clip
        keep_gradients(Path(out) / f"{stage}.safetensors")
        script.main(script.parse_args([*COMMON, *folder, *options]))
        assert num_processes() == int(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
