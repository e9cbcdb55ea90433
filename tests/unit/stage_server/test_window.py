"""The credit window follows what is measured: the round trip over the slowest stage's interval, and one more."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from stage_server.window import CreditWindow


def ms(milliseconds: float) -> timedelta:
    return timedelta(milliseconds=milliseconds)


def fed(window: CreditWindow, round_trip: float, interval: float | None, times: int = 20) -> int:
    for _ in range(times):
        window.completed(ms(round_trip), None if interval is None else ms(interval))
    return window.size


def test_it_starts_with_one_microbatch_a_stage() -> None:
    assert CreditWindow(4).size == 4


def test_it_grows_to_what_the_round_trip_needs() -> None:
    assert fed(CreditWindow(2), round_trip=300, interval=10) == 31


def test_a_short_round_trip_leaves_one_microbatch_a_stage() -> None:
    assert fed(CreditWindow(4), round_trip=5, interval=10) == 4


def test_a_few_samples_change_nothing() -> None:
    window = CreditWindow(2)
    assert fed(window, 1000, 1, times=3) == 2
    assert fed(window, 1000, 1, times=1) == 1001


def test_queueing_does_not_feed_itself() -> None:
    """A window too large makes round trips long; the shortest one seen is what counts, so it does not grow further."""
    window = CreditWindow(2)
    before = fed(window, 100, 10)
    assert fed(window, 900, 10, times=40) == before


def test_it_follows_a_route_that_stays_longer() -> None:
    window = CreditWindow(2)
    fed(window, 100, 10)
    assert fed(window, 200, 10, times=64) == 21


def test_two_that_arrive_together_do_not_look_like_a_fast_pipe() -> None:
    window = CreditWindow(2)
    for count in range(20):
        window.completed(ms(100), ms(0 if count % 3 == 0 else 10))
    assert window.size == 11


def test_the_pause_between_steps_is_no_interval() -> None:
    assert fed(CreditWindow(3), 1000, None) == 3


@given(
    num_stages=st.integers(1, 16),
    samples=st.lists(st.tuples(st.floats(0, 1e5), st.none() | st.floats(0, 1e5)), max_size=100),
)
def test_it_is_never_less_than_the_number_of_stages_and_always_finite(
    num_stages: int, samples: list[tuple[float, float | None]]
) -> None:
    window = CreditWindow(num_stages)
    for round_trip, interval in samples:
        fed(window, round_trip, interval, times=1)
        assert num_stages <= window.size <= 1e5 / 1e-3 + 2
