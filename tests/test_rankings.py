"""Which responses are compared with which."""

from rlhf.rankings import rank_responses


def test_every_two_responses_of_a_prompt_with_different_scores_are_a_pair():
    first, second = rank_responses(["x", "y", "x", "y", "x"], [2.0, 1.0, 4.0, 9.0, 3.0])
    assert first.rows == [0, 2, 4]
    assert set(first.pairs) == {(1, 0), (2, 0), (1, 2)}  # better first, as positions
    assert set(first.row_pairs()) == {(2, 0), (4, 0), (2, 4)}
    assert (second.rows, second.pairs) == ([1, 3], [(1, 0)])


def test_ties_make_no_pair_and_a_prompt_of_ties_is_left_out():
    ids, scores = ["x", "x", "x", "y", "y", "z"], [5.0, 5.0, 1.0, 2.0, 2.0, 3.0]
    (only,) = rank_responses(ids, scores)
    assert only.rows == [0, 1, 2]
    assert set(only.pairs) == {(0, 2), (1, 2)}
