"""CARDS: what a checkpoint's README.md tells people, and its header the Hugging Face Hub.

A card is made of `run.json` and the tokenizer alone, so that the same run writes the same card. Its
header names a model or a data set only if that is on the Hub, which takes no other names.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerBase

from rlhf.disk import CARD
from rlhf.lora import ADAPTER_FOLDER
from rlhf.markdown import Rows, code, markdown_table
from rlhf.records import read_manifest
from rlhf.snippets import adapt_lines, judge_lines, write_lines
from rlhf.splits import SIDES

POLICY_LIMITS = (
    "Trained on {data} and judged by the figures above alone, it states falsehoods, repeats the"
    " faults of its data and of the model that it was trained from, and is not safe for people to"
    " rely on without tests of your own."
)
REWARD_LIMITS = (
    "Trained on {data}, it knows little of texts unlike these, a policy that is trained on its"
    " rewards finds its mistakes, and since it measures neither truth nor harm, it is not safe as"
    " the only judge of what people are shown."
)
STAGES = {  # what was done, and what not to rely on
    "sft": ("fine-tuned on responses", POLICY_LIMITS),
    "rm": ("as a reward model", REWARD_LIMITS),
    "ppo": ("trained by reinforcement", POLICY_LIMITS),
    "dpo": ("trained on preferences", POLICY_LIMITS),
}

PAGE = """\
---
{header}
---

# {title}

{lines}
## Where it comes from

{sources}

## Figures on held-out rows

{figures}

## Arguments of {script}

{arguments}

## Limits

{limits}
"""


def data_origin(data_dir: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """Tell what the manifest knows of a split, as long as both files are those that it tells of.

    A data set that was a local file is told by its name alone.
    """
    split, manifest = Path(os.path.abspath(data_dir)).name, read_manifest(data_dir)
    sides = manifest.get("splits", {}).get(split, {})
    dataset, revision = manifest.get("dataset"), manifest.get("revision")
    changed = any(sides.get(x, {}).get("sha256") != digests[f"{x}.jsonl"] for x in SIDES)
    if changed or not dataset:
        return {"split": split}
    return {
        "split": split,
        "dataset": dataset if revision else Path(os.path.abspath(dataset)).name,
        "revision": revision,
        "language": manifest.get("arguments", {}).get("language"),
        "rows": {side: sides[side]["rows"] for side in SIDES if "rows" in sides[side]},
    }


def model_cards(
    run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> dict[str, str]:
    """Write the cards of a checkpoint that is to stand in `folder`, by their places in it.

    `run` is what `run.json` holds. The adapter in a folder within has a card of its own.
    """
    is_judge = run["stage"] == "rm"
    lines = judge_lines(run["reward"], tokenizer) if is_judge else write_lines(run, tokenizer)
    lines = f"```python\n{lines}```\n"
    if not run["arguments"]["use_peft"]:
        return {CARD: card(run, "transformers", lines)}
    place = Path(ADAPTER_FOLDER, CARD)
    alone = f"```python\n{adapt_lines(run, tokenizer, folder / ADAPTER_FOLDER)}```\n"
    lines += f"\nThese weights hold the adapter; `peft` loads it alone from [here]({place}).\n"
    return {CARD: card(run, "transformers", lines), str(place): card(run, "peft", alone)}


def card(run: Mapping[str, Any], library: str, lines: str) -> str:
    """Write a card that begins with these lines, which load the model by this library."""
    stage, arguments, origin = run["stage"], run["arguments"], run["data_origin"]
    given = arguments.items()
    done, limits = STAGES[stage]
    # RLOO is not PPO, and SimPO not DPO: people look for a model by its method.
    method = arguments.get("advantage") or arguments.get("loss") or stage
    method = stage if method == "gae" else method
    tag = "reward-model" if stage == "rm" else method
    # An adapter fits onto its parent alone.
    is_fitting = library == "transformers" or run["base_model"] == run["parent"]
    dataset, language = origin.get("dataset"), origin.get("language")
    header = ModelCardData(
        library_name=library,
        pipeline_tag="text-classification" if stage == "rm" else "text-generation",
        base_model=run["base_model"] if is_fitting else None,
        datasets=[dataset] if origin.get("revision") else None,
        language=None if language == "any" else language,
        tags=["rlhf", tag, *(["lora"] if arguments["use_peft"] else [])],
    )
    told = code(dataset) if origin.get("revision") else f"the local file {code(dataset)}"
    before, epoch = run["before_training"], f"epoch {run['epoch']}"
    figures = [[code(x), shown(before.get(x)), shown(y)] for x, y in run["metrics"].items()]
    return PAGE.format(
        header=header.to_yaml(),
        title=f"{code(run['model'])} {done} ({method}), {epoch}",
        lines=lines,
        sources=markdown_table([["", ""], *told_of_sources(run)]),
        figures=markdown_table([["", "before training", epoch], *figures]),
        script=f"`run_{stage}.py`",
        arguments=markdown_table([["", ""], *([code(f"--{x}"), code(y)] for x, y in given)]),
        limits=limits.format(data=told if dataset else "data of one's own"),
    )


def told_of_sources(run: Mapping[str, Any]) -> Rows:
    """Tell what a checkpoint was made from, a row each."""
    origin, most = run["data_origin"], run["arguments"].get("max_samples")
    data = f"split {code(origin['split'])}, of which no manifest tells"
    if "dataset" in origin:
        dataset = f"the local file {code(origin['dataset'])}"
        if origin["revision"]:
            dataset = (
                f"[{code(origin['dataset'])}](https://huggingface.co/datasets/{origin['dataset']})"
            )
            dataset += f" at {code(origin['revision'])}"
        data = f"{dataset}, split {code(origin['split'])}"
    rows = origin.get("rows", {})
    counts = [f"{rows[side]:,} rows in {side}.jsonl" for side in rows]
    counts += [f"of train.jsonl no more than the first {most:,} were used"] if most else []
    told = {
        "trained from": named(run["parent"], run["parent_content"]),
        **{code(x): named(y["path"], y["content"]) for x, y in run["other_inputs"].items()},
        "data": "; ".join([data, *counts]),
        **{f"SHA-256 of {side}.jsonl": code(run["data"][f"{side}.jsonl"]) for side in SIDES},
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "git commit": code(run["git_commit"]),
    }
    return [[name, value] for name, value in told.items()]


def named(path: str, content: str) -> str:
    """Name an input and the fingerprint of its content; of a Hub id only the name is known."""
    is_id = content == hashlib.sha256(os.fsencode(path)).hexdigest()
    return code(path) if is_id else f"{code(path)}, content {code(content)}"


def shown(value: float | None) -> str:
    """Show a figure; what is not a number has none.

    >>> [shown(x) for x in (0.693147, 35, 1e-07, None, float("nan"))]
    ['0.69315', '35', '1e-07', '–', '–']
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.5g}"
