"""RANKINGS: which responses answer the same prompt, and which of two is the better one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple


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
    rankings = []
    for rows in rows_of.values():
        pairs = [
            (i, j) if scores[rows[i]] > scores[rows[j]] else (j, i)
            for i, j in combinations(range(len(rows)), 2)
            if scores[rows[i]] != scores[rows[j]]
        ]
        if pairs:
            rankings.append(Ranking(rows, pairs))
    return rankings


def list_pairs(groups: Iterable[Iterable[tuple[int, int]]]) -> list[tuple[int, int, int]]:
    """Give the pairs of several groups as one list, each behind the number of its group.

    >>> list_pairs([[(0, 1)], [(1, 0), (2, 0)]])
    [(0, 0, 1), (1, 1, 0), (1, 2, 0)]
    """
    return [(group, *pair) for group, pairs in enumerate(groups) for pair in pairs]
