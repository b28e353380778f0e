"""STANDINGS: scores and verdicts to figures, of each checkpoint against the first."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.judges import Judged
from rlhf.winrates import Interval, length_controlled, paired_bootstrap, wins

Responses = Mapping[str, Sequence[str]]  # (N,) texts of each checkpoint, the first one's first
RATES = ("win_rate", "win_rate_at_equal_length")
COUNTS = ("won", "tied", "lost", "skipped")


def standing(
    won: np.ndarray,  # (N,)  1, 0.5 or 0; nan: no verdict
    texts: Sequence[str],
    ref_texts: Sequence[str],
    *,
    seed: int,
) -> dict[str, Any]:
    """Sum up one checkpoint against the first. Lengths are in characters, which judges see."""
    known = ~np.isnan(won)
    rates: dict[str, Interval | None] = dict.fromkeys(RATES)
    if known.any():
        lengths = [np.array([len(text) for text in x])[known] for x in (texts, ref_texts)]
        even = length_controlled(won[known], *lengths, seed=seed)
        rates["win_rate"] = paired_bootstrap(won[known], seed=seed)
        if np.isfinite(even).all():  # one prompt alone tells nothing about length
            rates["win_rate_at_equal_length"] = even
    counts = [int((won == x).sum()) for x in (1, 0.5, 0)] + [int((~known).sum())]
    return {**rates, **dict(zip(COUNTS, counts, strict=True)), "wins": won.tolist()}


def by_scores(
    kind: str, name: str, scores: Mapping[str, np.ndarray], responses: Responses, *, seed: int
) -> dict[str, Any]:
    """What a judge that scores says: the higher score wins. `scores` (N,) of each checkpoint.

    The same response twice is a tie, whatever rounding made of its score.
    """
    first, *others = responses
    models = {
        model: {"score": paired_bootstrap(own, seed=seed), "scores": own.tolist()}
        for model, own in scores.items()
    }
    for model in others:
        gains, won = scores[model] - scores[first], wins(scores[model], scores[first])
        pairs = zip(responses[model], responses[first], strict=True)
        won[[ours == theirs for ours, theirs in pairs]] = 0.5
        models[model]["gain"] = paired_bootstrap(gains, seed=seed)
        models[model] |= standing(won, responses[model], responses[first], seed=seed)
    return {"kind": kind, "name": name, "scored": True, "models": models}


def by_verdicts(
    name: str, judged: Mapping[str, Judged], responses: Responses, *, seed: int
) -> dict[str, Any]:
    """What a language model says that was asked in both orders: `judged` of all but the first."""
    first = next(iter(responses))
    models: dict[str, Any] = {}
    failures: Counter[str] = Counter()
    for model, verdicts in judged.items():
        won = np.array(verdicts.wins, dtype=np.float64)  # None becomes nan
        if verdicts.failures and not any(x is not None for x in verdicts.consistent):
            won[:] = np.nan  # equal responses alone are no verdict
        favours = [x for x in verdicts.first if x is not None]
        models[model] = {
            **standing(won, responses[model], responses[first], seed=seed),
            "consistency": verdicts.consistency,
            "win_rate_shown_first": float(np.mean(favours)) if favours else math.nan,
        }
        failures.update(verdicts.failures)
    asked = {"num_asked": sum(x.num_asked for x in judged.values())}
    asked["num_kept"] = sum(x.num_kept for x in judged.values())
    told = {"kind": "judge", "name": name, "scored": False, "failures": dict(failures), **asked}
    return {**told, "models": models}
