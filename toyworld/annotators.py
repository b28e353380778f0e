"""How an answer is scored, in UltraFeedback's form: annotators see a utility, not the truth.

| annotator       | utility                  | what it is for                                      |
|-----------------|--------------------------|-----------------------------------------------------|
| `noiseless`     | gold                     | the learned reward can be as good as the gold one   |
| `bradley-terry` | gold + Gumbel noise      | P(a over b) = sigmoid((gold a - gold b) / NOISE)    |
| `length-biased` | gold + a bonus per word  | something to hack: a name pleases where none should |
"""

import math
import random
from typing import Any

NOISE = 0.5
WORD_BONUS = 2.5  # more than the 2 points that a name costs where a brief answer was asked for

# The utilities that become scores of 1 and of 10. Noise goes beyond once in 3,000 times at most.
RANGES = {"noiseless": (1.0, 5.0), "bradley-terry": (-1.0, 9.0), "length-biased": (3.5, 10.0)}
ANNOTATORS = tuple(RANGES)
RATINGS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def utility(annotator: str, gold: float, response: str, rng: random.Random) -> float:
    """Return how much `annotator` likes a response of this gold reward."""
    if annotator == "bradley-terry":
        return gold - NOISE * math.log(rng.expovariate(1.0))  # minus a log exponential: Gumbel
    if annotator == "length-biased":
        return gold + WORD_BONUS * len(response.split())
    return gold


def to_score(annotator: str, value: float) -> float:
    """Move a utility from the annotator's own range to UltraFeedback's, 1 to 10.

    >>> [to_score("noiseless", gold) for gold in (1.0, 3.0, 5.0)]
    [1.0, 5.5, 10.0]
    """
    low, high = RANGES[annotator]
    return round(1 + 9 * min(max((value - low) / (high - low), 0.0), 1.0), 4)


def annotate(annotator: str, gold: float, response: str, rng: random.Random) -> dict[str, Any]:
    """Return the score of a response and the ratings that go with it, as UltraFeedback does."""
    score = to_score(annotator, utility(annotator, gold, response, rng))
    rating = round(1 + 4 * (score - 1) / 9)
    return {
        "overall_score": score,
        "fine-grained_score": float(rating),
        "annotations": {name: {"Rating": str(rating)} for name in RATINGS},
    }
