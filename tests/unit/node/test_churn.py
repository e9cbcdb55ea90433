"""The churn benchmark's pure parts: who is hit, what is counted, what the times say."""

from __future__ import annotations

import random
from collections import Counter

from node.bench.churn.journal import Counted, Journal, Struck, count_microbatches, percentile
from node.bench.churn.schedule import Blow, ChurnPlan, choose_victim


def test_the_last_peer_of_a_stage_is_spared() -> None:
    serving = {"a": 0, "b": 0, "c": 1}
    hit = Counter(choose_victim(serving, random.Random(seed)) for seed in range(50))
    assert hit.keys() == {"a", "b"}
    assert choose_victim({"a": 0, "b": 1}, random.Random(0)) is None


def test_a_seed_gives_the_same_churn() -> None:
    serving = {f"peer-{number}": number % 2 for number in range(8)}
    first, second = (
        [choose_victim(serving, chance) for _ in range(9)] for chance in (random.Random(3), random.Random(3))
    )
    assert first == second
    assert ChurnPlan(8, 60.0, 600.0, 20.0, 15.0).num_blows == 30


def test_lost_and_doubled_microbatches_are_counted_once_a_sum() -> None:
    sizes = [0, 3, 3]
    whole = [[0, 2], [1]]
    assert count_microbatches([(0, 1, "x", whole), (0, 1, "x", whole), (0, 2, "y", whole)], sizes) == Counted(
        2, 0, 0, 0
    )
    assert count_microbatches([(0, 1, "x", [[0], [0, 1]])], sizes) == Counted(1, 1, 1, 0)
    assert count_microbatches([(0, 1, "x", whole), (0, 1, "z", whole)], sizes).disagreements == 1
    assert count_microbatches([(0, 1, "x", [])], sizes) == Counted(0, 0, 0, 0)  # nothing is known of it


def test_the_journal_tells_speed_recovery_and_joining() -> None:
    journal = Journal(num_stages=2)
    for step in range(1, 11):
        for stage in (0, 1):
            journal.committed(f"old-{stage}", stage, step, 1.0, at=float(step) + 0.1 * stage)
    journal.committed("old-0", 0, 11, 1.0, at=20.0)  # the other stage has not committed it
    assert max(journal.swarm_step_times()) == 10
    assert journal.steps_per_second(0.0, 10.0) == 0.9  # the tenth came at 10.1
    journal.struck.append(Struck(5.5, Blow.KILL, "old-0", 0))
    assert journal.recoveries() == [7.1 - 5.5]
    journal.joined["new"] = 8.0
    assert journal.join_times() == []
    journal.committed("new", 1, 10, 1.0, at=10.5)
    assert journal.join_times() == [2.5]


def test_who_lags_behind_its_stage_is_not_level() -> None:
    journal = Journal(num_stages=1)
    for step in range(1, 8):
        journal.committed("ahead", 0, step, None, at=float(step))
    journal.committed("close", 0, 5, None, at=9.0)
    journal.committed("far", 0, 4, None, at=9.0)
    assert [journal.is_level(peer, 0) for peer in ("ahead", "close", "far", "never")] == [True, True, False, False]


def test_percentiles_of_few() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
