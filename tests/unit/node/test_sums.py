"""What replicas add up, they add up under one name."""

from __future__ import annotations

from coordinator.agreement import INITIAL, Round
from node.replication.sums import round_key

HALVES = frozenset({0, 1}), frozenset({2, 3})


def proposed(first: frozenset[int], second: frozenset[int], number: int = 1) -> Round:
    return Round(1, number, INITIAL, {"a": first, "b": second})


def test_rounds_of_one_number_with_other_shares_do_not_meet() -> None:
    """Two leaders that do not see each other: as many microbatches in all, but one twice and another not at all."""
    ours, theirs = proposed(*HALVES), proposed(*reversed(HALVES))
    assert round_key("run/0", ours) != round_key("run/0", theirs)


def test_all_members_of_a_round_meet() -> None:
    same = Round(1, 1, INITIAL, {"b": frozenset({3, 2}), "a": frozenset({1, 0})})
    assert round_key("run/0", proposed(*HALVES)) == round_key("run/0", same)
    assert round_key("run/0", same) != round_key("run/1", same)
    assert round_key("run/0", same) != round_key("run/0", proposed(*HALVES, number=2))
