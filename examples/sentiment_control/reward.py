"""The reward of the example: how well a text has the tone that its control token asks for.

    [negative]  -x        [neutral]  -2 |x| + 4        [positive]  x

x is the classifier's raw positive logit of query and response. Classifier and log lie in the folder
that the environment variable SENTIMENT_DIR names. Used by `run_ppo.py --reward_fn=reward.py:score`.
"""

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

REWARDS = {
    "[negative]": lambda x: -x,
    "[neutral]": lambda x: -2 * abs(x) + 4,
    "[positive]": lambda x: x,
}
FOLDER = Path(os.environ.get("SENTIMENT_DIR", ".model/sentiment"))
BATCH = 64  # texts that are classified together: memory only


def split_prompt(prompt: str) -> tuple[str, str]:
    """Part a prompt into control token and query.

    >>> split_prompt("[neutral] This movie was")
    ('[neutral]', ' This movie was')
    """
    end = prompt.index("]") + 1
    return prompt[:end], prompt[end:]


@cache
def load_classifier(path: Path) -> tuple[Any, Any, torch.device]:
    """Load the classifier once, with its tokenizer, onto the device that PPO uses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval().to(device)
    return AutoTokenizer.from_pretrained(path), model, device


@torch.no_grad()
def positive_logits(texts: Sequence[str]) -> list[float]:
    """Return the raw logit of "positive", a classifier's last label, for each text."""
    tokenizer, model, device = load_classifier(FOLDER / "classifier")
    logits: list[float] = []
    for start in range(0, len(texts), BATCH):
        some = [text.strip() for text in texts[start : start + BATCH]]
        inputs = tokenizer(some, padding=True, truncation=True, return_tensors="pt").to(device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits += model(input_ids=ids, attention_mask=mask).logits[:, -1].tolist()
    return logits


def rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Classify query and response, and reward them by the prompt's control token."""
    controls, queries = zip(*map(split_prompt, prompts), strict=True)
    logits = positive_logits([q + r for q, r in zip(queries, responses, strict=True)])
    return [REWARDS[control](x) for control, x in zip(controls, logits, strict=True)]


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the rewards, and log their means: of all, and by control token.

    Evaluations are logged as well as rollouts; `report.py` tells them apart.
    """
    values = rewards(prompts, responses)
    line = {"all": fmean(values)}
    for control in REWARDS:
        own = [v for p, v in zip(prompts, values, strict=True) if p.startswith(control)]
        line |= {control: fmean(own)} if own else {}
    with (FOLDER / "rewards.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return values
