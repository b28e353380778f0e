"""CAUTIONS: what makes the figures of an evaluation look better, or surer, than they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.checkpoints import content_of
from rlhf.lineage import Run, lineage

FEW = 30  # prompts


def cautions(
    runs: list[Run],
    judges: Sequence[Mapping[str, Any]],
    *,
    prompts_sha256: str,
    num_prompts: int,
    rm_path: str | None,
    reward_fn: str | None,
) -> list[str]:
    """Say what makes figures look better than they are, as far as each `run.json` tells."""
    known = {run.path: run for run in (*runs, *lineage(runs))}.values()
    facts = [(run.name, run.facts()) for run in known]

    def users(file: str) -> str:
        return ", ".join(name for name, x in facts if x.get("data", {}).get(file) == prompts_sha256)

    told = []
    if num_prompts < FEW:
        told.append(f"With fewer than {FEW} prompts an interval is rough, and may have no width.")
    if names := users("train.jsonl"):
        told.append(f"Trained on these very prompts: {names}.")
    if names := users("eval.jsonl"):
        told.append(f"The best epoch was chosen by these prompts in the runs of: {names}.")
    content = rm_path and content_of(rm_path)
    pleased = {
        rm_path: [run.name for run in known if content and run.followed_content() == content],
        reward_fn: [
            name
            for name, x in facts
            if reward_fn and x.get("arguments", {}).get("reward_fn") == reward_fn
        ],
    }
    for followed, those in pleased.items():
        if those:
            told.append(
                f"Trained to please {followed}: {', '.join(those)}. Only another judge can tell"
                " whether it is better, or what was trained from it."
            )
    for judge in judges:
        if judge.get("failures"):
            causes = ", ".join(f"{number} {cause}" for cause, number in judge["failures"].items())
            told.append(f"No verdict from {judge['name']}: {causes}.")
        for name, says in judge["models"].items():
            if (share := says.get("consistency")) is not None and share < 0.5:
                told.append(
                    f"{judge['name']} agrees with itself on {share:.0%} of the pairs of {name}: its"
                    " win rate says little."
                )
    return told
