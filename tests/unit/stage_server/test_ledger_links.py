"""One ledger and its neighbours: what it keeps for them, what it gives them again, what it refuses."""

from __future__ import annotations

import pytest
from support.one_ledger import (
    DOWN,
    EVALUATING,
    FIRST,
    MIDDLE,
    UINT64_MAX,
    UP,
    compute,
    evaluate,
    ledger,
    names,
    state,
    through_step,
    train,
    work,
)

from stage_server.errors import NeighbourStateLost, ProtocolViolation, RewindNeeded, WrongStep
from stage_server.ids import MicrobatchId
from stage_server.plan import Plan
from stage_server.work import Checkpoint, Forward, Side

# -- checkpoints and the floor ----------------------------------------------------------------------------------


def test_checkpoints_are_due_at_the_start_at_every_mark_and_at_the_end() -> None:
    alone = ledger(0, stages=1, checkpoints=(), every=2)
    assert [task.step for task in work(alone) if isinstance(task, Checkpoint)] == [0, 2, 4]
    odd = ledger(0, stages=1, checkpoints=(), every=3)
    assert [task.step for task in work(odd) if isinstance(task, Checkpoint)] == [0, 3, 4]


def test_a_stage_starts_from_its_newest_checkpoint() -> None:
    restarted = ledger(FIRST, checkpoints=(1, 3))
    assert (restarted.committed, restarted.durable, restarted.step) == (3, 3, 4)
    assert not restarted.unsaved
    assert restarted.next_task() == Forward(train(4, 0), None)


def test_the_floor_is_what_all_stages_have_on_disk() -> None:
    middle = ledger(MIDDLE, checkpoints=(2,), every=1)
    assert middle.floor is None
    middle.receive_status(UP, 2, 2)
    assert middle.floor is None  # the other side has not spoken
    middle.receive_status(DOWN, 2, 1)
    assert middle.floor == 1
    middle.receive_status(DOWN, 3, 3)
    assert middle.floor == 2
    middle.receive_status(UP, 2, None)
    assert middle.floor is None


def test_what_is_below_the_floor_is_dropped_and_nothing_else() -> None:
    middle = ledger(MIDDLE, every=2)
    for step in (1, 2):
        through_step(middle, step)
        middle.receive_status(UP, step, 0)
        middle.receive_status(DOWN, step, 0)
    through_step(middle, 3)
    assert middle.num_retained == 18  # three steps, three microbatches, both neighbours
    middle.receive_status(UP, 3, 2)
    assert middle.num_retained == 18
    middle.receive_status(DOWN, 3, 2)
    assert middle.num_retained == 6
    assert middle.first_step_held == 3
    assert names(middle.receive_latents(train(3, 0), "x")) == [train(3, 0)]


def test_a_neighbour_out_of_sight_may_go_back_so_nothing_is_dropped() -> None:
    """Its last word was that it has step 2 on disk. Restarted, it may have to give that up again."""
    middle = ledger(MIDDLE, checkpoints=(0, 2), every=2)
    middle.receive_status(UP, 2, 2)
    middle.receive_status(DOWN, 2, 0)
    middle.closed(UP)
    assert middle.status(DOWN) == (2, None)
    middle.receive_status(DOWN, 2, 2)
    assert middle.floor is None
    with pytest.raises(RewindNeeded):  # and not NeighbourStateLost
        middle.opened(UP, 0, [])


def test_a_checkpoint_of_a_drain_moves_no_floor() -> None:
    """The others write none of that step: whoever goes back to it lands on an older one, of which all must be kept."""
    middle = ledger(MIDDLE, checkpoints=(2, 3), every=2)
    assert middle.durable == 3
    for side in Side:
        middle.receive_status(side, 4, 4)
    assert middle.floor == 2
    assert middle.status(UP) == (3, 2)
    through_step(middle, 4)
    assert middle.floor == 4


def test_marks_are_passed_on_from_one_neighbour_to_the_other() -> None:
    middle = ledger(MIDDLE, checkpoints=(0, 2), every=1)
    assert middle.status(DOWN) == (2, None)
    assert middle.receive_status(UP, 2, 1)
    assert middle.status(DOWN) == (2, 1)
    assert not middle.receive_status(UP, 3, 1)  # nothing new for the other side
    assert middle.receive_status(UP, 3, 3)
    assert middle.status(DOWN) == (2, 2)
    assert ledger(FIRST, checkpoints=(2,), every=1).status(DOWN) == (2, 2)


# -- links ------------------------------------------------------------------------------------------------------


def test_a_reopened_link_gets_what_is_missing_in_plan_order() -> None:
    first = ledger(FIRST, plan=EVALUATING)
    first.window = 9
    work(first)
    order = list(EVALUATING.microbatches(1))
    assert names(first.opened(DOWN, 0, [])) == order
    assert names(first.opened(DOWN, 0, [order[0], order[2]])) == [order[1], order[3]]
    assert names(first.opened(DOWN, 1, [])) == []
    assert not first.wants(DOWN, train(1, 0))
    assert first.wants(DOWN, train(2, 0))


def test_holdings_are_what_waits_and_what_is_done() -> None:
    middle = ledger(MIDDLE)
    for index in range(3):
        middle.receive_latents(train(1, index), "x")
    compute(middle)
    middle.receive_gradients(train(1, 0), 1.0, "g")
    assert middle.holdings(UP) == [train(1, i) for i in range(3)]
    assert middle.holdings(DOWN) == [train(1, 0)]
    compute(middle)
    assert middle.holdings(UP) == [train(1, i) for i in range(3)]
    assert middle.holdings(DOWN) == [train(1, 0)]


def test_a_neighbour_behind_what_is_held_here_makes_this_stage_go_back() -> None:
    restarted = ledger(MIDDLE, checkpoints=(0, 2))
    before = state(restarted)
    with pytest.raises(RewindNeeded) as error:
        restarted.opened(UP, 1, [])
    assert (error.value.code, error.value.to_step) == (404, 1)
    assert state(restarted) == before


def test_a_neighbour_behind_what_anybody_holds_has_lost_its_state() -> None:
    """Going back would need a checkpoint that is pruned: the neighbour is told, this stage goes on."""
    restarted = ledger(MIDDLE, checkpoints=(2, 3))
    before = state(restarted)
    with pytest.raises(NeighbourStateLost) as error:
        restarted.opened(DOWN, 1, [])
    assert error.value.code == 403
    assert state(restarted) == before


def test_the_floor_decides_between_going_back_and_lost() -> None:
    middle = ledger(MIDDLE, every=1)
    through_step(middle, 1)
    assert len(middle.opened(UP, 0, [])) == 3  # still held: nobody has to go back
    middle.receive_status(UP, 1, 1)
    middle.receive_status(DOWN, 1, 1)
    with pytest.raises(NeighbourStateLost):
        middle.opened(UP, 0, [])
    assert middle.opened(UP, 1, []) == []


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        train(0, 0), train(5, 0), train(1, 3), train(UINT64_MAX, 0), train(1, 2**32 - 1), evaluate(1, 0),
        train(3, 0),  # of the run, but the neighbour has committed nothing
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("side", Side)
def test_a_microbatch_that_cannot_be_is_refused(side: Side, name: MicrobatchId) -> None:
    middle = ledger(MIDDLE)
    before = state(middle)
    with pytest.raises(WrongStep) as error:
        if side is UP:
            middle.receive_latents(name, "x")
        else:
            middle.receive_gradients(name, 1.0, "g")
    assert error.value.code == 210
    assert state(middle) == before


def test_a_neighbour_cannot_fill_the_memory_with_far_steps() -> None:
    long = Plan(steps=100, microbatches_per_step=1, evaluation_microbatches=0, evaluate_every=0)
    middle = ledger(MIDDLE, plan=long, every=2)
    middle.receive_status(UP, 90, 0)
    middle.receive_latents(train(6, 0), "x")
    with pytest.raises(WrongStep, match="too far ahead"):
        middle.receive_latents(train(7, 0), "x")


@pytest.mark.parametrize(
    ("committed", "durable"), [(5, None), (UINT64_MAX, None), (5, 0), (1, 2), (4, 5), (UINT64_MAX, UINT64_MAX)]
)
def test_marks_that_cannot_be_are_refused(committed: int, durable: int | None) -> None:
    middle = ledger(MIDDLE)
    before = state(middle)
    with pytest.raises(ProtocolViolation) as error:
        middle.receive_status(DOWN, committed, durable)
    assert error.value.code == 204
    assert state(middle) == before


@pytest.mark.parametrize("committed", [5, UINT64_MAX])
def test_a_step_beyond_the_run_opens_no_link(committed: int) -> None:
    middle = ledger(MIDDLE)
    before = state(middle)
    with pytest.raises(ProtocolViolation):
        middle.opened(DOWN, committed, [])
    assert state(middle) == before
