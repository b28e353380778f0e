"""SNIPPETS: lines of Python that load a checkpoint without this project, for its card.

They are made from `run.json` and the tokenizer, whose template says what is around an answer.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.templates import form_of, render

QUESTION = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Blue."}

PATH = 'path = "."  # this folder; from elsewhere, its path or its name on the Hub'
WRITE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

{path}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
chat = [{question}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
ids = model.generate(**inputs{sampling})[0]
answer = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer{without_form})
"""
JUDGE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{path}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
chat = [
    {question},
    {answer},
]
text = tokenizer.apply_chat_template(chat, tokenize=False){without_rest}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logit = model(**inputs).logits[0, 0]
reward = {reward}
print(float(reward))
"""
ADAPT = """\
from peft import PeftModel
from transformers import {auto}

parent = {parent}  # the model that the adapter was trained on
{path}
model = {auto}.from_pretrained(parent{options})
model = PeftModel.from_pretrained(model, path)
"""


def write_lines(run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the code that lets a policy answer."""
    form, sampling = form_of(tokenizer), ""
    if run["stage"] != "ppo":  # whose generation config says how its rollouts were sampled
        room = min(256, run["arguments"]["max_len"] // 2)
        sampling = f", do_sample=True, max_new_tokens={room}"
    opening = f".removeprefix({quoted(form.opening)})" if form.opening else ""
    closing = f".removesuffix({quoted(form.closing)})" if form.closing else ""
    return WRITE.format(
        path=PATH, question=quoted(QUESTION), sampling=sampling, without_form=opening + closing
    )


def judge_lines(reward: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Write the code that turns a response into the reward that PPO takes it for."""
    stop = str(tokenizer.convert_ids_to_tokens(form_of(tokenizer).stop_id))
    rest = render(tokenizer, [QUESTION, ANSWER]).rpartition(stop)[2]  # nothing of it was trained on
    if reward["loss"] == "regression":
        formula = f"1 + ({reward['max_reward']} - 1) * torch.sigmoid(logit)"
    else:
        bound = reward["max_reward"]
        formula = f"(logit - {reward['logit_mean']}).clamp(-{bound}, {bound})"
    return JUDGE.format(
        path=PATH,
        question=quoted(QUESTION),
        answer=quoted(ANSWER),
        without_rest=f".removesuffix({quoted(rest)})" if rest else "",
        reward=formula,
    )


def adapt_lines(run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write the code that puts an adapter in `folder` onto its parent."""
    is_judge = run["stage"] == "rm"
    return ADAPT.format(
        path=PATH,
        auto="AutoModelForSequenceClassification" if is_judge else "AutoModelForCausalLM",
        parent=quoted(seen_from(folder, run["parent"])),
        options=f", num_labels=1, pad_token_id={tokenizer.pad_token_id}" if is_judge else "",
    )


def seen_from(folder: Path, path: str) -> str:
    """Give a path below the current folder as seen from another folder there; else as it is."""
    real, here = folder.resolve(), Path.cwd().resolve()
    is_below = Path(path).exists() and not os.path.isabs(path) and real.is_relative_to(here)
    return os.path.relpath(path, real.relative_to(here)) if is_below else path


def quoted(value: Any) -> str:
    """Write a text, or a message, as Python code."""
    return json.dumps(value, ensure_ascii=False)
