"""Scores: from annotators, from a reward model's logit, from a Python function; and their units."""

import importlib
import importlib.util
import inspect
import math
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.batches import Batch, Room, micro_batches_by_length
from rlhf.errors import InputError, RunError
from rlhf.models import reward_logits
from rlhf.runtime import Runtime

LEAST_VARIANCE = 1e-8  # equal scores differ by rounding alone, which must not become a reward
Row = tuple[str, str, bool]  # prompt, response, whether it ended by itself
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


def normalized_scores(
    scores: Tensor,  # (B,)
    mean: Tensor,  # ()
    std: Tensor,  # ()
) -> Tensor:  # (B,)
    """Scores in units of their spread: an affine map, so that the same responses stay the best.

        (score - mean) / std

    The penalty `beta` then weighs against spreads instead of the reward model's own units.

    >>> normalized_scores(torch.tensor([1.0, 4.0]), torch.tensor(2.0), torch.tensor(2.0))
    tensor([-0.5000,  1.0000])
    """
    return ((scores - mean) / std).to(scores.dtype)


def merged_moments(
    num: Tensor,  # ()  how many scores there were before
    mean: Tensor,  # ()  theirs, and their unbiased variance
    variance: Tensor,  # ()
    scores: Tensor,  # (B,)
) -> tuple[Tensor, Tensor, Tensor]:  # num, mean, variance: () each, of all
    """Mean and unbiased variance of more scores than are at hand.

        d = mean(scores) - mean,  n = num + B
        mean' = mean + d * B / n
        (n - 1) variance' = (num - 1) variance + (B - 1) var(scores) + d^2 * num * B / n

    In float64. One score alone has variance 0.

    Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for
    computing sample variances", equation 2.1.

    >>> one = torch.tensor(1), torch.tensor(5.0), torch.tensor(0.0)
    >>> [float(x) for x in merged_moments(*one, torch.tensor([1.0, 3.0]))]  # of 5, 1 and 3
    [3.0, 3.0, 4.0]
    """
    scores, size = scores.double(), len(scores)
    total, difference = num + size, scores.mean() - mean
    squares = (num - 1).clamp(min=0) * variance + (scores - scores.mean()).square().sum()
    squares = squares + difference.square() * num * size / total
    return total, mean + difference * size / total, squares / (total - 1).clamp(min=1)


class ScoreScale(nn.Module):
    """The units in which training sees the scores; part of a run's state where they are learned."""

    num: Tensor  # ()  how many scores they are learned from
    mean: Tensor  # ()
    variance: Tensor  # ()

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        for name, value in {"num": 0.0, "mean": mean, "variance": std**2}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    @property
    def std(self) -> Tensor:  # ()
        """One unit, in those of the scores."""
        return self.variance.clamp(min=LEAST_VARIANCE).sqrt()

    def forward(self, scores: Tensor) -> Tensor:  # (B,) -> (B,)
        """Give scores in these units."""
        return normalized_scores(scores, self.mean, self.std)

    def learn(self, scores: Tensor) -> None:  # (B,)
        """Take scores into account beside those that were."""
        moments = merged_moments(self.num, self.mean, self.variance, scores)
        self.num, self.mean, self.variance = moments


class RewardFacts(NamedTuple):
    """What a reward model's `run.json` tells of its reward."""

    loss: str  # "regression", "pairwise" or "listwise"
    max_reward: float
    logit_mean: float
    reward_mean: float
    reward_std: float | None = None  # None: of a checkpoint from before it was stored


def read_reward_facts(run: dict[str, Any], *, path: str, max_reward: float | None) -> RewardFacts:
    """Take them out of a `run.json`, and check `--max_reward` against them, if it is given.

    Raises: InputError if they are missing, or if the reward model was trained on another scale.
    """
    flag = f"--rm_model_path={path}"
    try:
        told = run["reward"]
        needed = [told[name] for name in RewardFacts._fields[:-1]]
        facts = RewardFacts._make([*needed, told.get("reward_std")])
    except (KeyError, TypeError) as error:
        raise InputError(f"{flag}: its run.json tells no reward; train it by run_rm.py") from error
    numbers = all(isinstance(fact, int | float) for fact in needed[1:])
    if facts.loss not in ("regression", "pairwise", "listwise") or not numbers:
        raise InputError(f"{flag}: its run.json tells no usable reward ({facts})")
    if max_reward not in (None, facts.max_reward):
        raise InputError(
            f"--max_reward={max_reward:g}: {flag} was trained with {facts.max_reward:g}"
        )
    return facts


def stored_scale(facts: RewardFacts, *, path: str) -> ScoreScale:
    """Take the units that a reward model had on held-out responses.

    Raises: InputError if it tells none, or has none.
    """
    if not facts.reward_std or not facts.reward_std > 0:
        raise InputError(
            f"--normalize_reward=stored: --rm_model_path={path} tells no spread of its rewards"
            f" (reward_std={facts.reward_std}); train it anew by run_rm.py, or give running"
        )
    return ScoreScale(facts.reward_mean, facts.reward_std)


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

    def call(rows: Sequence[Row]) -> Any:
        prompts, responses, ended = map(list, zip(*rows, strict=True))
        options = {"ended": ended} if wants_ended else {}
        try:
            return function(prompts, responses, **options)
        except SystemExit as error:
            if type(error) is not SystemExit:  # a signal has told the run to stop
                raise
            raise RuntimeError(f"SystemExit: {error}") from error

    def score(
        prompts: list[str], responses: list[str], batch: Batch, ended: Tensor, room: Room
    ) -> Tensor:
        rows = list(zip(prompts, responses, ended.tolist(), strict=True))
        try:
            values = call(rows)
        except Exception as error:  # whatever it is, it is the function's
            raise RunError(f"{flag} raised {first_failure(call, rows, error)}") from error
        # Keys and letters are lists of something else than scores.
        if isinstance(values, Mapping | Set | str | bytes) or not isinstance(values, Iterable):
            told = (
                f"{values!r:.80} for {len(prompts)} prompts, the first of which is {prompts[0]!r}"
            )
            raise RunError(f"{flag} returned {told}; it must return a list of numbers")
        values = list(values)
        if len(values) != len(prompts):
            told = f"{len(values)} numbers for {len(prompts)} prompts, the first of which is"
            raise RunError(f"{flag} returned {told} {prompts[0]!r}; it must return one for each")
        scores = torch.tensor([as_number(value) for value in values])
        for prompt, value, is_finite in zip(prompts, values, scores.isfinite(), strict=True):
            if not is_finite:
                told = f"{value!r:.80} for the prompt {prompt!r}"
                raise RunError(f"{flag} returned {told}; it must return a finite number for each")
        return scores.to(ended.device)

    return score


def as_number(value: Any) -> float:
    """Take what a function returned for a number; nan if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def first_failure(
    call: Callable[[Sequence[Row]], Any], rows: Sequence[Row], error: Exception
) -> str:
    """Tell what was raised, and for which prompt, by asking for one at a time."""
    for row in rows:
        try:
            call([row])
        except Exception as own:  # now for one prompt alone
            *_, place = extract_tb(own.__traceback__)
            where = f"{Path(place.filename).name} line {place.lineno}"
            if place.filename == __file__:  # its signature does not fit
                where = "it is called with prompts and responses"
            return f"{type(own).__name__}: {own} ({where}) for the prompt {row[0]!r}"
    together = f"{len(rows)} prompts at once, and for none of them alone"
    return f"{type(error).__name__}: {error} for {together}; the first is {rows[0][0]!r}"


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
