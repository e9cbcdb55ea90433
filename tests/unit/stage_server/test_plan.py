"""What belongs to a run and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_server.config import PlanConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.plan import Plan

TRAIN, EVALUATE = MicrobatchKind.TRAIN, MicrobatchKind.EVALUATE
PLAN = Plan(steps=5, microbatches_per_step=3, evaluation_microbatches=2, evaluate_every=2)
PLANS = st.builds(
    Plan,
    steps=st.integers(1, 9),
    microbatches_per_step=st.integers(1, 4),
    evaluation_microbatches=st.integers(0, 3),
    evaluate_every=st.integers(0, 4),
)


def names(plan: Plan, step: int) -> list[str]:
    return [f"{name.kind.name[0]}{name.index}" for name in plan.microbatches(step)]


def test_evaluation_comes_first_and_the_closing_step_trains_nothing() -> None:
    assert names(PLAN, 1) == ["E0", "E1", "T0", "T1", "T2"]
    assert names(PLAN, 2) == ["T0", "T1", "T2"]
    assert names(PLAN, 6) == ["E0", "E1"]
    assert [step for step in range(1, 7) if PLAN.evaluates(step)] == [1, 3, 5, 6]
    assert [step for step in range(1, 7) if PLAN.commits(step)] == [1, 2, 3, 4, 5]
    assert PLAN.last_step == 6


def test_without_an_interval_only_the_ends_are_evaluated() -> None:
    plan = Plan.of(PlanConfig(steps=5, evaluate_every=0, evaluation_microbatches=1))
    assert [step for step in range(1, 7) if plan.evaluates(step)] == [1, 6]


def test_without_evaluation_there_is_no_closing_step() -> None:
    plan = Plan(steps=5, microbatches_per_step=3, evaluation_microbatches=0, evaluate_every=2)
    assert not any(plan.evaluates(step) for step in range(8))
    assert plan.last_step == 5
    assert plan.microbatches(6) == ()


@given(plan=PLANS)
def test_every_microbatch_of_the_run_has_one_place(plan: Plan) -> None:
    order = [name for step in range(1, plan.steps + 2) for name in plan.microbatches(step)]
    assert len(set(order)) == len(order)
    assert all(plan.contains(name) for name in order)
    assert sum(name.kind is TRAIN for name in order) == plan.steps * plan.microbatches_per_step
    assert max(name.step for name in order) == plan.last_step


@given(
    plan=PLANS,
    step=st.integers(-1, 12) | st.just(2**64 - 1),
    kind=st.sampled_from(MicrobatchKind),
    index=st.integers(-1, 5) | st.just(2**32 - 1),
)
def test_a_name_is_of_the_run_exactly_if_the_plan_lists_it(
    plan: Plan, step: int, kind: MicrobatchKind, index: int
) -> None:
    name = MicrobatchId(StepIndex(step), kind, index)
    listed = 1 <= step <= plan.steps + 1 and name in plan.microbatches(step)
    assert plan.contains(name) == listed


@pytest.mark.parametrize(
    ("step", "kind", "index"),
    [(0, TRAIN, 0), (6, TRAIN, 0), (7, EVALUATE, 0), (2, EVALUATE, 0), (1, TRAIN, 3), (1, EVALUATE, 2), (1, TRAIN, -1)],
)
def test_what_the_run_has_not(step: int, kind: MicrobatchKind, index: int) -> None:
    assert not PLAN.contains(MicrobatchId(StepIndex(step), kind, index))
