"""The credit window follows what is measured: the round trip over the pace of completions, with some slack."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pipeline_simulation import History, Pipeline, simulate

from stage_server.window import NO_PACE, CreditWindow, Pace, PaceMeter


class Feed:
    """Gives a window completions at a steady pace, in milliseconds."""

    def __init__(self, num_stages: int) -> None:
        self.window = CreditWindow(num_stages)
        self._now_ms = 0.0

    def completions(self, round_trip_ms: float, interval_ms: float, times: int = 20) -> int:
        for _ in range(times):
            self._now_ms += interval_ms
            self.window.completed(timedelta(milliseconds=self._now_ms), timedelta(milliseconds=round_trip_ms))
        return self.window.size

    def step_ends(self, pause_ms: float = 0.0) -> None:
        self.window.step_ended()
        self._now_ms += pause_ms


def test_it_starts_with_one_microbatch_a_stage() -> None:
    assert CreditWindow(4).size == 4


def test_it_grows_to_what_the_round_trip_needs_and_a_quarter() -> None:
    assert Feed(2).completions(round_trip_ms=400, interval_ms=10) == 51


def test_a_short_round_trip_leaves_one_microbatch_a_stage() -> None:
    assert Feed(4).completions(round_trip_ms=5, interval_ms=10) == 4


def test_a_few_samples_change_nothing() -> None:
    feed = Feed(2)
    assert feed.completions(1000, 1, times=4) == 2
    assert feed.completions(1000, 1, times=1) == 1251


@pytest.mark.parametrize("microbatches", [8, 500])
def test_queueing_does_not_feed_itself(microbatches: int) -> None:
    """A window too large makes round trips long. The shortest of a step counts, however long the step."""
    feed = Feed(2)
    for _ in range(3):
        before = feed.completions(100, 10, times=1)
        assert feed.completions(900, 10, times=microbatches) == max(before, 14)
        feed.step_ends()


def test_it_follows_a_longer_route_within_two_steps_and_a_shorter_one_at_once() -> None:
    feed = Feed(2)
    feed.completions(100, 10, times=8)
    feed.step_ends()
    assert feed.completions(200, 10, times=8) == 14
    feed.step_ends()
    assert feed.completions(200, 10, times=8) == 26
    assert feed.completions(80, 10, times=1) == 11


def test_two_that_arrive_together_do_not_look_like_a_fast_pipe() -> None:
    feed = Feed(2)
    for _ in range(10):
        feed.completions(100, 10, times=2)
        feed.completions(100, 0, times=1)
    assert feed.window.size == 14


def test_the_pause_between_steps_is_no_interval() -> None:
    feed = Feed(3)
    for _ in range(20):
        feed.completions(1000, 10, times=1)
        feed.step_ends(pause_ms=5000)
    assert feed.window.size == 3


@given(
    num_stages=st.integers(1, 16),
    samples=st.lists(st.tuples(st.floats(0, 1e5), st.none() | st.floats(0, 1e5)), max_size=100),
)
def test_it_is_never_less_than_the_number_of_stages_and_always_finite(
    num_stages: int, samples: list[tuple[float, float | None]]
) -> None:
    feed = Feed(num_stages)
    for round_trip, interval in samples:
        if interval is None:
            feed.step_ends()
        else:
            feed.completions(round_trip, interval, times=1)
        assert num_stages <= feed.window.size <= 1.25 * 1e5 / 1e-3 + num_stages + 1


# -- the pace inside a step ---------------------------------------------------------------------------------------


def test_the_pace_is_that_between_the_fill_and_the_drain() -> None:
    """Three in flight: one is done every second while there are more, then all at once."""
    meter = PaceMeter()
    for _ in range(3):
        meter.forwarded()
    for at in (10.0, 11.0, 12.0):
        meter.done(at)
        meter.forwarded()
    for _ in range(3):
        meter.done(12.1)
    assert meter.pace == Pace(microbatches=2, seconds=2.0)


def test_a_step_that_is_in_flight_as_a_whole_has_no_pace() -> None:
    meter = PaceMeter()
    meter.forwarded()
    meter.forwarded()
    meter.done(1.0)
    meter.done(2.0)
    assert meter.pace == NO_PACE


# -- what it is for: a whole pipeline in virtual time -------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 5])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("round_trip", [0.1, 0.2])
def test_round_trips_cost_a_pipeline_nothing_inside_a_step(round_trip: float, jitter: float, num_stages: int) -> None:
    """The pace between a step's first and last completion stays 0.95 of that without any latency."""
    pipeline = Pipeline(num_stages=num_stages, jitter=jitter)
    near, far = simulate(pipeline), simulate(replace(pipeline, round_trip_of_step=lambda _: round_trip))
    assert _pace(far) >= 0.95 * _pace(near)


def _pace(history: History) -> float:
    """Microbatches a second inside the last steps."""
    return 1 / sum(history.steady_interval(step) for step in (3, 4, 5, 6))


def test_a_commit_costs_one_traversal_of_the_pipeline_and_no_more() -> None:
    """Down with the first microbatch and up with its gradient: three links' round trips and the stages' own work."""
    pipeline = Pipeline(round_trip_of_step=lambda _: 0.1)
    history = simulate(pipeline)
    flush_seconds = history.step_seconds(6) - history.steady_interval(6) * pipeline.microbatches
    work = (pipeline.forward_seconds + pipeline.backward_seconds) * pipeline.num_stages + pipeline.commit_seconds
    assert flush_seconds <= 3 * 0.1 + work


def test_the_flush_is_shared_by_more_microbatches() -> None:
    shares = [
        simulate(Pipeline(microbatches=microbatches, round_trip_of_step=lambda _: 0.1)).flush_share(6)
        for microbatches in (8, 16, 32, 64)
    ]
    assert shares == sorted(shares, reverse=True) and shares[-1] < shares[0] / 3


def test_a_route_that_grows_longer_is_followed_in_two_steps() -> None:
    history = simulate(Pipeline(steps=8, round_trip_of_step=lambda step: 0.0 if step < 4 else 0.1))
    calm = simulate(Pipeline(steps=8)).steady_interval(8)
    for step in (6, 7, 8):
        assert history.steady_interval(step) <= calm / 0.95
