"""Steps come out in order and exactly once, whatever stages repeat and in whatever order they report."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.events import LinkTraffic, StageStep, Step
from node.progress import StepAggregator


def report(stage: int, step: int, num_stages: int, *, replayed: bool = False) -> StageStep:
    """As a worker makes it; a replay differs in everything that time and the network decide."""
    last = stage == num_stages - 1
    link = LinkTraffic(dense_bytes=1000, wire_bytes_forward=6 + replayed, wire_bytes_backward=4)
    return StageStep(
        stage=stage,
        step=step,
        loss=float(step) if last else None,
        tokens=64,
        seconds=9.0 if replayed else 1.0,
        microbatches=4,
        compute_seconds=0.5,
        wait_seconds=0.25,
        gradient_norm=1.0,
        link=None if last else link,
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[StageStep]]:
    """Each stage's steps in order, going back at random places as a restarted worker does, mixed with each other's."""
    num_stages, num_steps = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    streams = []
    for stage in range(num_stages):
        steps, seen = list(range(1, num_steps + 1)), set()
        for _ in range(draw(st.integers(0, 3))):
            if num_steps:
                back_to, at = draw(st.integers(1, num_steps)), draw(st.integers(1, num_steps))
                end = steps.index(at) + 1 if at in steps else len(steps)
                steps = steps[:end] + list(range(min(back_to, at), at + 1)) + steps[end:]
        stream = []
        for step in steps:
            stream.append(report(stage, step, num_stages, replayed=step in seen))
            seen.add(step)
        streams.append(stream)
    order = [stage for stage, stream in enumerate(streams) for _ in stream]
    random.Random(draw(st.integers())).shuffle(order)
    positions = [iter(stream) for stream in streams]
    return num_stages, num_steps, [next(positions[stage]) for stage in order]


@given(histories())
def test_every_step_comes_once_in_order_and_replays_count_nothing(history: tuple[int, int, list[StageStep]]) -> None:
    num_stages, num_steps, reports = history
    aggregator = StepAggregator(num_stages)
    aggregator.cut(0.0)
    steps = [step for now, event in enumerate(reports) for step in aggregator.add(event, float(now))]
    links = num_stages - 1
    assert [step.step for step in steps] == list(range(1, num_steps + 1))
    assert [step.loss for step in steps] == [float(number) for number in range(1, num_steps + 1)]
    assert [step.tokens for step in steps] == [64 * number for number in range(1, num_steps + 1)]
    assert all((step.dense_bytes, step.wire_bytes) == (1000 * links, 10 * links) for step in steps)
    assert all(totals.microbatches == 4 * num_steps for totals in aggregator.stages)
    assert aggregator.num_steps == num_steps
    assert aggregator.wire_compression == (100.0 if links and num_steps else None)
    if steps:
        assert sum(step.seconds for step in steps) == pytest.approx(aggregator.seconds)


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    aggregator = StepAggregator(2)
    aggregator.cut(10.0)
    times = {(0, 1): 11.0, (1, 1): 12.0, (0, 2): 12.5, (1, 2): 15.0}
    steps = [step for (stage, step), now in times.items() for step in aggregator.add(report(stage, step, 2), now)]
    assert [step.seconds for step in steps] == [2.0, 3.0]
    assert aggregator.tokens_per_second == 128 / 5.0


def test_time_that_belongs_to_no_step_is_left_out() -> None:
    aggregator = StepAggregator(1)
    aggregator.cut(0.0)
    aggregator.cut(100.0)  # validation ran until now
    assert aggregator.add(report(0, 1, 1), 101.0)[0].seconds == 1.0


def test_what_no_stage_of_the_run_says_is_passed_over() -> None:
    aggregator = StepAggregator(1)
    assert aggregator.add(report(3, 1, 4), 1.0) == []
    assert aggregator.num_steps == 0


def test_nothing_yet_is_no_speed_and_no_compression() -> None:
    assert StepAggregator(4).tokens_per_second == 0.0
    assert StepAggregator(4).wire_compression is None


def test_a_last_stage_without_a_loss_is_a_fault() -> None:
    with pytest.raises(ValueError, match="no loss of step 1"):
        StepAggregator(1).add(report(0, 1, 1).model_copy(update={"loss": None}), 1.0)


def test_steps_are_made_of_stage_steps_only_when_all_have_reported() -> None:
    aggregator = StepAggregator(2)
    aggregator.cut(0.0)
    assert aggregator.add(report(0, 1, 2), 1.0) == []
    expected = Step(step=1, loss=1.0, tokens=64, seconds=2.0, dense_bytes=1000, wire_bytes=10)
    assert aggregator.add(report(1, 1, 2), 2.0) == [expected]
