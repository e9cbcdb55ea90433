"""What giving state away may take: a rate that holds for all together, and places that are not stolen midway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_server.state_limits import DownloadSlots, TokenBucket


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=50))
def test_never_more_than_the_rate_and_one_burst(sends: list[tuple[int, float]]) -> None:
    """Whoever waits as told sends no more in any time than rate x time + burst; a send may itself exceed the burst."""
    rate, burst = 1000.0, 2000
    bucket, now, sent = TokenBucket(rate, burst), 0.0, 0
    for num_bytes, pause in sends:
        now += pause
        departure = now + bucket.wait_seconds(num_bytes, now)
        sent += num_bytes
        assert sent <= burst + rate * departure + 1e-6


def test_those_who_send_at_once_wait_one_after_the_other() -> None:
    bucket = TokenBucket(100.0, 50)
    assert [bucket.wait_seconds(50, 7.0) for _ in range(4)] == pytest.approx([0, 0.5, 1, 1.5])


def test_a_pause_earns_one_burst_only() -> None:
    bucket = TokenBucket(100.0, 50)
    bucket.wait_seconds(50, 0.0)
    assert bucket.wait_seconds(150, 1000.0) == pytest.approx(1)


def test_a_place_is_kept_between_calls_and_given_on_later() -> None:
    slots = DownloadSlots(max_downloads=2, max_calls=2, keep_seconds=5)
    assert slots.enter("a", 0)
    assert slots.enter("b", 0)
    assert not slots.enter("c", 0)
    slots.leave("a", 10)
    assert not slots.enter("c", 14)
    assert slots.enter("a", 14)
    slots.leave("a", 14)
    assert slots.enter("c", 19)
    assert not slots.enter("a", 19)


def test_one_downloader_has_few_calls() -> None:
    slots = DownloadSlots(max_downloads=2, max_calls=2, keep_seconds=5)
    assert [slots.enter("a", 0) for _ in range(3)] == [True, True, False]
    slots.leave("a", 1)
    assert slots.enter("a", 1)


def test_an_open_call_keeps_its_place_for_ever() -> None:
    slots = DownloadSlots(max_downloads=1, max_calls=2, keep_seconds=5)
    assert slots.enter("a", 0)
    assert not slots.enter("b", 1e6)
