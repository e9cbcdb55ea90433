"""Choosing among peers of the next stage: by what they have to do and how fast they do it."""

from __future__ import annotations

import random
from collections import Counter

from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.next_peer import ServiceTimes, choose_next


def train(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def choose(
    outstanding: dict[str, int], seconds: dict[str, float], last: str | None = None, seed: int = 0
) -> str | None:
    return choose_next(list(outstanding), outstanding, seconds, last, random.Random(seed))


def test_nobody_is_chosen_of_nobody() -> None:
    assert choose_next([], {}, {}, None, random.Random(0)) is None


def test_of_two_the_one_that_answers_first_is_chosen() -> None:
    assert choose({"a": 3, "b": 1}, {}) == "b"
    assert choose({"a": 1, "b": 1}, {"a": 1.0, "b": 4.0}) == "a"
    assert choose({"a": 3, "b": 0}, {"a": 1.0, "b": 5.0}) == "a"  # four seconds against five


def test_equals_are_told_apart_by_who_was_sent_to_last() -> None:
    assert {choose({"a": 1, "b": 1}, {}, last="b", seed=seed) for seed in range(9)} == {"b"}


def test_a_peer_never_measured_is_tried() -> None:
    assert choose({"old": 1, "new": 0}, {"old": 0.5}) == "new"


def test_peers_of_different_speed_are_all_kept_busy() -> None:
    """Each finishes at its own pace; what is sent to each follows it."""
    pace = {"slow": 1, "middle": 2, "fast": 4}
    outstanding = dict.fromkeys(pace, 0)
    sent: Counter[str] = Counter()
    chance = random.Random(1)
    for tick in range(4000):
        for peer, per_tick in pace.items():
            outstanding[peer] = max(0, outstanding[peer] - (per_tick if tick % 4 == 0 else 0))
        if sum(outstanding.values()) < 12:
            chosen = choose_next(list(pace), outstanding, {p: 1 / v for p, v in pace.items()}, None, chance)
            assert chosen is not None
            outstanding[chosen] += 1
            sent[chosen] += 1
    total = sent.total()
    for peer, per_tick in pace.items():
        assert abs(sent[peer] / total - per_tick / 7) < 0.08


def test_service_time_is_the_hop_over_the_queue_it_stood_in() -> None:
    times = ServiceTimes()
    times.sent(train(1, 0), "a", now=10.0, outstanding=3)
    times.returned(train(1, 0), "b", now=11.0)  # somebody else's answer
    assert times.seconds == {}
    times.returned(train(1, 0), "a", now=12.0)
    assert times.seconds == {"a": 0.5}
    times.returned(train(1, 0), "a", now=99.0)  # a duplicate
    assert times.seconds == {"a": 0.5}
    times.sent(train(1, 1), "a", now=20.0, outstanding=0)
    times.returned(train(1, 1), "a", now=21.0)
    assert 0.5 < times.seconds["a"] < 1.0


def test_what_is_never_answered_is_forgotten_with_its_step() -> None:
    times = ServiceTimes()
    times.sent(train(1, 0), "a", now=0.0, outstanding=0)
    times.forget_before(2)
    times.returned(train(1, 0), "a", now=1.0)
    assert times.seconds == {}


def test_who_owes_answers_and_gives_none_for_long_is_overdue() -> None:
    times = ServiceTimes()
    times.sent(train(1, 0), "a", now=0.0, outstanding=0)
    times.sent(train(1, 1), "b", now=0.0, outstanding=0)
    assert times.overdue({"a": 1, "b": 1}, now=1000.0, least_seconds=10.0) == set()  # nothing was measured yet
    times.returned(train(1, 1), "b", now=1.0)
    assert times.overdue({"a": 1}, now=10.0, least_seconds=10.0) == set()
    assert times.overdue({"a": 1}, now=30.0, least_seconds=10.0) == set()  # twenty times a second, for it and one more
    assert times.overdue({"a": 1}, now=41.0, least_seconds=10.0) == {"a"}
    assert times.overdue({}, now=41.0, least_seconds=10.0) == set()  # somebody else has answered in its place
    times.sent(train(1, 2), "a", now=1.0, outstanding=1)
    times.returned(train(1, 2), "a", now=40.0)  # slow, but it works
    assert times.overdue({"a": 1}, now=41.0, least_seconds=10.0) == set()


def test_who_is_gone_is_no_measure() -> None:
    times = ServiceTimes()
    times.sent(train(1, 0), "a", now=0.0, outstanding=0)
    times.returned(train(1, 0), "a", now=1.0)
    times.forget("a")
    times.forget("never there")
    assert times.seconds == {}
