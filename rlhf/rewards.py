"""Scores: from annotators, from a reward model's logit, from a Python function."""

import importlib
import importlib.util
import inspect
import math
import runpy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.batches import Batch, Room, micro_batches_by_length
from rlhf.errors import InputError, RunError
from rlhf.models import reward_logits
from rlhf.runtime import Runtime

# prompts, responses, the same as ids, which responses ended by themselves, room -> (B,)
Scorer = Callable[[list[str], list[str], Batch, Tensor, Room], Tensor]


def target_rewards(
    scores: Sequence[float], *, scale: tuple[float, float], max_reward: float
) -> Tensor:  # (B,)
    """Map annotators' scores from the fixed scale of their source to [1, max_reward].

    >>> target_rewards([1.0, 5.5, 10.0], scale=(1.0, 10.0), max_reward=5.0)
    tensor([1., 3., 5.])
    """
    low, high = scale
    return 1 + (max_reward - 1) * (torch.tensor(scores) - low) / (high - low)


def regression_reward(logits: Tensor, *, max_reward: float) -> Tensor:
    """Reward of a model trained by regression: between 1 and max_reward.

        1 + (max_reward - 1) * sigmoid(logit)

    >>> regression_reward(torch.tensor([0.0]), max_reward=5.0)
    tensor([3.])
    """
    return 1 + (max_reward - 1) * torch.sigmoid(logits)


def pairwise_reward(logits: Tensor, *, logit_mean: float, max_reward: float) -> Tensor:
    """Reward of a model trained on pairs, which leave the logit's offset free: centred, guarded.

        clip(logit - logit_mean, -max_reward, max_reward)

    >>> pairwise_reward(torch.tensor([2.0, 99.0]), logit_mean=1.5, max_reward=5.0)
    tensor([0.5000, 5.0000])
    """
    return (logits - logit_mean).clamp(-max_reward, max_reward)


class RewardFacts(NamedTuple):
    """What a reward model's `run.json` tells of its reward."""

    loss: str  # "regression", "pairwise" or "listwise"
    max_reward: float
    logit_mean: float
    reward_mean: float


def read_reward_facts(run: dict[str, Any], *, path: str, max_reward: float) -> RewardFacts:
    """Take them out of a `run.json`, and check `--max_reward` against them.

    Raises: InputError if they are missing, or if the reward model was trained on another scale.
    """
    flag = f"--rm_model_path={path}"
    try:
        facts = RewardFacts(*(run["reward"][name] for name in RewardFacts._fields))
    except (KeyError, TypeError) as error:
        raise InputError(f"{flag}: its run.json tells no reward; train it by run_rm.py") from error
    numbers = all(isinstance(fact, int | float) for fact in facts[1:])
    if facts.loss not in ("regression", "pairwise", "listwise") or not numbers:
        raise InputError(f"{flag}: its run.json tells no usable reward ({facts})")
    if facts.max_reward != max_reward:
        raise InputError(
            f"--max_reward={max_reward:g}: {flag} was trained with {facts.max_reward:g}"
        )
    return facts


def score_by_model(model: PreTrainedModel, facts: RewardFacts, *, runtime: Runtime) -> Scorer:
    """Score by a reward model, on the very ids that were sampled."""

    @torch.no_grad()
    def score(
        prompts: list[str], responses: list[str], batch: Batch, ended: Tensor, room: Room
    ) -> Tensor:
        logits = torch.zeros(len(ended), device=ended.device)
        for rows, micro in micro_batches_by_length(batch, range(len(ended)), room):
            with runtime.autocast():
                logits[rows] = reward_logits(model, micro, pad_id=model.config.pad_token_id)
        if facts.loss == "regression":
            return regression_reward(logits, max_reward=facts.max_reward)
        return pairwise_reward(logits, logit_mean=facts.logit_mean, max_reward=facts.max_reward)

    return score


def score_by_function(spec: str) -> Scorer:
    """Score by `file.py:function` or `module:function`, checking what it returns at every call.

    The function takes lists of prompts and of responses, and `ended` (whether each response ended
    by itself) if it has an argument of that name; it returns a finite number for each.

    Raises: InputError if there is no such function; RunError, naming the prompt, if it fails.
    """
    flag = f"--reward_fn={spec}"
    function = import_function(spec, flag=flag)
    try:
        wants_ended = "ended" in inspect.signature(function).parameters
    except ValueError:  # some functions written in C tell nothing
        wants_ended = False

    def score(
        prompts: list[str], responses: list[str], batch: Batch, ended: Tensor, room: Room
    ) -> Tensor:
        options = {"ended": ended.tolist()} if wants_ended else {}
        try:
            values = [float(value) for value in function(prompts, responses, **options)]
        except Exception as error:  # whatever it is, it is the function's
            cause = f"{type(error).__name__}: {error}"
            raise RunError(f"{flag} raised {cause}; the first prompt: {prompts[0]!r}") from error
        if len(values) != len(prompts):
            raise RunError(f"{flag} returned {len(values)} numbers for {len(prompts)} prompts")
        for prompt, value in zip(prompts, values, strict=True):
            if not math.isfinite(value):
                raise RunError(f"{flag} returned {value} for the prompt {prompt!r}")
        return torch.tensor(values, device=ended.device)

    return score


def file_of(spec: str) -> str:
    """Name the file that `file.py:function` or `module:function` comes from, if there is one."""
    source = spec.rpartition(":")[0]
    try:
        found = None if source.endswith(".py") else importlib.util.find_spec(source)
    except (ImportError, ValueError):
        found = None
    return found.origin if found and found.origin else source


def import_function(spec: str, *, flag: str) -> Callable[..., Any]:
    """Import `file.py:function` or `module:function`. Raises: InputError."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{flag}: must be file.py:function or module:function")
    try:
        if source.endswith(".py"):
            function = runpy.run_path(source).get(name)
        else:
            function = getattr(importlib.import_module(source), name, None)
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"{flag}: cannot be imported ({cause})") from error
    if not callable(function):
        raise InputError(f"{flag}: {source} has no function {name}")
    return function
