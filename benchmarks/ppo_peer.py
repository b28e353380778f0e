"""A process that runs TRL's PPO, one iteration for each "go" on its standard input.

    python -m venv PPO && PPO/bin/pip install -r benchmarks/requirements-ppo.txt
    PPO/bin/python benchmarks/ppo_peer.py settings.json

bench_peers.py starts it with the Python of an environment that has the last TRL with a PPO trainer;
so nothing of this project is imported. It answers in JSON lines: first the versions, then the
seconds and figures of each iteration.

All iterations are updates of one `PPOTrainer.train()`, whose callback waits between them: an
iteration is everything from one update's end to the next, and what is done once (models, optimiser,
data loader) is not in it. No stop token is set, so that TRL writes exactly `new_tokens` tokens.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

MANY = 1_000_000  # updates; the process ends when its standard input does


class TakeTurns(TrainerCallback):
    """Wait for "go" before every update, and answer after it."""

    def __init__(self, answers: TextIO) -> None:
        self.answers, self.figures, self.columns = answers, {}, 0

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # the other end is gone or has enough
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.figures = dict(logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self.start
        say(self.answers, seconds=seconds, columns=self.columns, **self.figures)
        self.wait()


def say(stream: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=stream, flush=True)


def build_trainer(settings: dict[str, Any], callback: TakeTurns) -> PPOTrainer:
    """TRL's trainer without what costs time and changes no number."""
    prompts, half = settings["prompts"], settings["dtype"] == "bfloat16"
    size = len(prompts)
    micro = settings["micro_batch_size"] or size
    config = GPT2Config(**settings["model"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config.num_labels, config.pad_token_id = 1, config.vocab_size - 1
    pad_token = "<|endoftext|>"
    vocabulary = models.WordLevel({pad_token: config.pad_token_id, "x": 0}, unk_token="x")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary),
        eos_token=pad_token,
        pad_token=pad_token,
        padding_side="left",
    )
    policy = GPT2LMHeadModel(config)
    reference = GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    reward_model, value_model = (GPT2ForSequenceClassification(config).eval() for _ in range(2))

    def note_columns(_: Any, args: Any, kwargs: Any) -> None:
        callback.columns = kwargs["input_ids"].shape[1]

    reward_model.base_model.register_forward_pre_hook(note_columns, with_kwargs=True)
    if half:  # TRL's own setting reaches the training forward only
        autocast = torch.autocast("cpu", torch.bfloat16)
        policy.generate = autocast(policy.generate)
        for model in (reference, reward_model.base_model, value_model.base_model):
            model.forward = autocast(model.forward)
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=half,
        seed=settings["seed"],
        learning_rate=settings["learning_rate"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=size // micro,
        num_mini_batches=1,
        num_ppo_epochs=settings["num_inner_epochs"],
        local_rollout_forward_batch_size=size,
        response_length=settings["new_tokens"],
        temperature=1.0,
        stop_token=None,
        total_episodes=MANY * size,
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[callback],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("settings", type=Path, help="a JSON file; bench_peers.py writes it")
    settings = json.loads(parser.parse_args().settings.read_text(encoding="utf-8"))
    answers, sys.stdout = sys.stdout, sys.stderr  # TRL prints; the answers stay by themselves
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    callback = TakeTurns(answers)
    trainer = build_trainer(settings, callback)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    say(answers, trl=trl.__version__, **versions)
    trainer.train()


if __name__ == "__main__":
    main()
