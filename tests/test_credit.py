"""Credit over length: a reward that the first tokens of a long response decide."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import run_ppo
from tests.conftest import write_jsonl
from toyworld.base_model import build_tokenizer

FIRST, LENGTH = 4, 64
NAMES = {"ada", "bob", "eve"}


def names_first(prompts, responses):
    """The share of names among the first four words; the sixty after them change nothing."""
    return [sum(word in NAMES for word in r.split()[:FIRST]) / FIRST for r in responses]


@pytest.mark.slow
@pytest.mark.claim(18)
def test_ppo_learns_what_the_first_of_64_tokens_decide(tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=80,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    facts = {"chosen": "hi", "rejected": "bye", "chosen_score": 9.0, "rejected_score": 2.0}
    prompts = [f"greet {name} {i % 2 * 'formal'}" for name in sorted(NAMES) for i in range(4)]
    for side in ("train", "eval"):
        write_jsonl(tmp_path / f"pref/{side}.jsonl", [{"prompt": p, **facts} for p in prompts * 16])
    run_ppo.main(
        run_ppo.parse_args(
            [
                f"--sft_model_path={tmp_path}/base",
                f"--data_dir={tmp_path}/pref",
                f"--ckpt_dir={tmp_path}/ppo",
                "--reward_fn=tests.test_credit:names_first",
                "--temperature=1",
                "--top_k=0",
                "--max_len=80",
                f"--min_gen_len={LENGTH}",
                f"--max_new_tokens={LENGTH}",
                "--missing_eos_penalty=0",
                "--num_outer_epoch=20",
                "--batch_size=64",
                "--learning_rate=3e-3",
                "--beta=0.001",
                "--eval_samples=64",
            ]
        )
    )
    lines = (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()
    scores = [row["eval_scores"] for row in map(json.loads, lines) if "eval_scores" in row]
    assert scores[0] < 0.3
    assert scores[-1] > 0.9
