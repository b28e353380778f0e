"""RANKINGS: which responses answer the same prompt, and which of two is the better one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, combinations
from typing import NamedTuple

from rlhf.records import PairRecord, PromptRecord, ScoredRecord


class Ranking(NamedTuple):
    """The responses to one prompt that are compared, and how."""

    rows: list[int]  # in the order in which they came
    pairs: list[tuple[int, int]]  # (better, worse), as positions in `rows`

    def row_pairs(self) -> list[tuple[int, int]]:
        """Give the same pairs as rows.

        >>> Ranking([7, 9], [(1, 0)]).row_pairs()
        [(9, 7)]
        """
        return [(self.rows[better], self.rows[worse]) for better, worse in self.pairs]


def rank_responses(prompt_ids: Sequence[Hashable], scores: Sequence[float]) -> list[Ranking]:
    """Group rows by the prompt that they answer, and compare every two of a group.

    Two equal scores make no pair. A prompt without a pair teaches nothing and is left out.

    >>> rank_responses(["a", "b", "a", "a", "b"], [1.0, 5.0, 3.0, 3.0, 5.0])
    [Ranking(rows=[0, 2, 3], pairs=[(1, 0), (2, 0)])]
    """
    rows_of = defaultdict(list)
    for row, prompt_id in enumerate(prompt_ids):
        rows_of[prompt_id].append(row)
    pairs = [
        (i, j) if scores[i] > scores[j] else (j, i)
        for rows in rows_of.values()
        for i, j in combinations(rows, 2)
        if scores[i] != scores[j]
    ]
    return rank_pairs(prompt_ids, pairs)


def rank_pairs(prompt_ids: Sequence[Hashable], pairs: Iterable[tuple[int, int]]) -> list[Ranking]:
    """Group pairs of rows, the better first, by the prompt of their rows; nothing else is compared.

    >>> rank_pairs(["a", "b", "a", "a", "b"], [(2, 0), (1, 4), (2, 3)])
    [Ranking(rows=[0, 2, 3], pairs=[(1, 0), (1, 2)]), Ranking(rows=[1, 4], pairs=[(0, 1)])]
    """
    pairs_of = defaultdict(list)
    for pair in pairs:
        pairs_of[prompt_ids[pair[0]]].append(pair)
    rankings = []
    for some in pairs_of.values():
        rows = sorted({*chain.from_iterable(some)})
        places = {row: place for place, row in enumerate(rows)}
        rankings.append(Ranking(rows, [(places[i], places[j]) for i, j in some]))
    return rankings


def rows_of_pairs(
    records: Iterable[PairRecord],
) -> tuple[list[ScoredRecord], list[tuple[int, int]]]:
    """Give the responses of pairs as rows, and the pairs themselves as (better, worse) of these.

    A response that several pairs of a prompt have with the same score is one row.

    >>> three = {"prompt": "Hi", "source": "", "prompt_id": "", "chosen_score": 9, "chosen": "Yes?"}
    >>> pairs = [three | {"rejected": text, "rejected_score": 2} for text in ("No", "What")]
    >>> [row["response"] for row in rows_of_pairs(pairs)[0]], rows_of_pairs(pairs)[1]
    (['Yes?', 'No', 'What'], [(0, 1), (0, 2)])
    """
    rows: dict[str, tuple[int, ScoredRecord]] = {}
    pairs = []
    for record in records:
        about = PromptRecord(
            prompt=record["prompt"], source=record["source"], prompt_id=record["prompt_id"]
        )
        chosen = ScoredRecord(**about, response=record["chosen"], score=record["chosen_score"])
        rejected = ScoredRecord(
            **about, response=record["rejected"], score=record["rejected_score"]
        )
        better, worse = (rows.setdefault(repr(x), (len(rows), x))[0] for x in (chosen, rejected))
        pairs.append((better, worse))
    return [row for _, row in rows.values()], pairs


def list_pairs(groups: Iterable[Iterable[tuple[int, int]]]) -> list[tuple[int, int, int]]:
    """Give the pairs of several groups as one list, each behind the number of its group.

    >>> list_pairs([[(0, 1)], [(1, 0), (2, 0)]])
    [(0, 0, 1), (1, 1, 0), (1, 2, 0)]
    """
    return [(group, *pair) for group, pairs in enumerate(groups) for pair in pairs]
