"""One ledger by itself: what it does next, what it answers, what it keeps, what it refuses."""

from __future__ import annotations

import pytest

from stage_server.errors import NeighbourStateLost, ProtocolViolation, RewindNeeded, WrongStep
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import Backward, Checkpoint, Commit, Forward, Forwarded, Returned, Side, StageLedger, Task
from stage_server.plan import Plan

UP, DOWN = Side.UPSTREAM, Side.DOWNSTREAM
UINT64_MAX = 2**64 - 1
PLAN = Plan(steps=4, microbatches_per_step=3, evaluation_microbatches=0, evaluate_every=0)
EVALUATING = Plan(steps=2, microbatches_per_step=2, evaluation_microbatches=2, evaluate_every=1)
FIRST, MIDDLE, LAST = 0, 1, 2


def train(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def evaluate(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.EVALUATE, index)


def ledger(
    stage: int, *, plan: Plan = PLAN, stages: int = 3, checkpoints: tuple[int, ...] = (0,), every: int = 100
) -> StageLedger:
    return StageLedger(plan, stage=stage, num_stages=stages, checkpoints=checkpoints, checkpoint_every=every)


def compute(ledger: StageLedger) -> tuple[Task | None, list[Forwarded | Returned]]:
    """Does the next task with a toy: losses are 1.0, bodies say where they come from."""
    task = ledger.next_task()
    match task:
        case Forward(name, _) if ledger.is_last:
            return task, ledger.finished(name, 1.0, f"gradient {name}")
        case Forward(name, _):
            return task, ledger.forwarded(name, f"latents {name}")
        case Backward(name, _):
            return task, ledger.finished(name, 1.0, f"gradient {name}")
        case Commit(step):
            ledger.committed_step(step)
        case Checkpoint(step):
            ledger.checkpointed(step)
    return task, []


def work(ledger: StageLedger) -> list[Task]:
    """Everything that can be done without the neighbours."""
    tasks = []
    while True:
        task, _ = compute(ledger)
        if task is None:
            return tasks
        tasks.append(task)


def through_step(ledger: StageLedger, step: int) -> None:
    """Plays both neighbours for one training step."""
    for index in range(PLAN.microbatches_per_step):
        if not ledger.is_first:
            ledger.receive_latents(train(step, index), "x")
        work(ledger)
        if not ledger.is_last:
            ledger.receive_gradients(train(step, index), 1.0, "g")
        work(ledger)
    assert ledger.committed == step


def names(frames: list[Forwarded | Returned]) -> list[MicrobatchId]:
    return [frame.name for frame in frames]


def state(ledger: StageLedger) -> str:
    """All of it, to show that a refusal changed nothing."""
    return repr({name: getattr(ledger, name) for name in sorted(vars(ledger))})


# -- order ------------------------------------------------------------------------------------------------------


def test_the_first_stage_keeps_its_window_in_flight() -> None:
    first = ledger(FIRST)
    first.window = 2
    assert work(first) == [Forward(train(1, 0), None), Forward(train(1, 1), None)]
    assert first.in_flight == 2
    first.receive_gradients(train(1, 0), 1.0, "g")
    assert work(first) == [Backward(train(1, 0), "g"), Forward(train(1, 2), None)]


def test_the_window_starts_with_one_microbatch_a_stage() -> None:
    assert ledger(FIRST, stages=3).window == 3


def test_backward_goes_before_forward() -> None:
    middle = ledger(MIDDLE)
    middle.receive_latents(train(1, 0), "x0")
    compute(middle)
    middle.receive_latents(train(1, 1), "x1")
    middle.receive_gradients(train(1, 0), 1.0, "g0")
    assert middle.next_task() == Backward(train(1, 0), "g0")
    compute(middle)
    assert middle.next_task() == Forward(train(1, 1), "x1")


def test_forward_goes_in_plan_order_whatever_comes_first() -> None:
    middle = ledger(MIDDLE)
    middle.receive_latents(train(1, 2), "x2")
    middle.receive_latents(train(1, 1), "x1")
    assert middle.next_task() is None
    assert middle.queue_depth == 2
    middle.receive_latents(train(1, 0), "x0")
    assert work(middle) == [Forward(train(1, i), f"x{i}") for i in range(3)]


def test_backward_goes_in_index_order_whatever_comes_first() -> None:
    middle = ledger(MIDDLE)
    for index in range(3):
        middle.receive_latents(train(1, index), "x")
    work(middle)
    for index in (2, 1):
        middle.receive_gradients(train(1, index), 1.0, f"g{index}")
        assert middle.next_task() is None
    middle.receive_gradients(train(1, 0), 1.0, "g0")
    assert work(middle) == [*(Backward(train(1, i), f"g{i}") for i in range(3)), Commit(StepIndex(1))]


def test_gradients_wait_for_the_forward_that_they_belong_to() -> None:
    """After a restart downstream's gradients may be here before the forward is made again."""
    middle = ledger(MIDDLE)
    middle.receive_gradients(train(1, 0), 1.0, "g")
    assert middle.next_task() is None
    middle.receive_latents(train(1, 0), "x")
    assert work(middle) == [Forward(train(1, 0), "x"), Backward(train(1, 0), "g")]


def test_the_next_step_waits_for_the_commit() -> None:
    middle = ledger(MIDDLE)
    middle.receive_status(UP, 0, 0)
    middle.receive_latents(train(2, 0), "early")
    for index in range(3):
        middle.receive_latents(train(1, index), "x")
    assert work(middle) == [Forward(train(1, i), "x") for i in range(3)]
    for index in range(3):
        middle.receive_gradients(train(1, index), 2.0 + index, "g")
    tasks = work(middle)
    assert tasks[-2:] == [Commit(StepIndex(1)), Forward(train(2, 0), "early")]


def test_losses_are_told_in_index_order_until_the_commit() -> None:
    last = ledger(LAST, stages=3)
    for index in range(3):
        last.receive_latents(train(1, index), "x")
        name = last.next_task().name  # type: ignore[union-attr]
        last.finished(name, float(10 - index), None)
    assert last.losses(MicrobatchKind.TRAIN) == [10.0, 9.0, 8.0]
    last.committed_step(StepIndex(1))
    assert last.losses(MicrobatchKind.TRAIN) == []


def test_one_stage_alone_does_it_all() -> None:
    alone = ledger(0, plan=EVALUATING, stages=1, checkpoints=(), every=1)
    assert work(alone) == [
        Checkpoint(StepIndex(0)),
        *(Forward(evaluate(1, i), None) for i in range(2)),
        *(Forward(train(1, i), None) for i in range(2)),
        Commit(StepIndex(1)),
        Checkpoint(StepIndex(1)),
        *(Forward(evaluate(2, i), None) for i in range(2)),
        *(Forward(train(2, i), None) for i in range(2)),
        Commit(StepIndex(2)),
        Checkpoint(StepIndex(2)),
        *(Forward(evaluate(3, i), None) for i in range(2)),
    ]
    assert alone.complete
    assert alone.num_retained == 0
    assert alone.floor == 2


# -- duplicates -------------------------------------------------------------------------------------------------


def test_a_duplicate_that_waits_is_ignored() -> None:
    middle = ledger(MIDDLE)
    middle.receive_latents(train(1, 0), "original")
    assert middle.receive_latents(train(1, 0), "again") == []
    assert work(middle) == [Forward(train(1, 0), "original")]
    assert middle.receive_latents(train(1, 0), "again") == []
    assert middle.next_task() is None


def test_a_duplicate_of_what_is_done_is_answered_from_what_is_retained() -> None:
    middle = ledger(MIDDLE)
    middle.receive_latents(train(1, 0), "x")
    compute(middle)
    middle.receive_gradients(train(1, 0), 1.0, "g")
    _, sent = compute(middle)
    assert middle.receive_latents(train(1, 0), "x") == sent == [Returned(train(1, 0), 1.0, f"gradient {train(1, 0)}")]
    assert middle.receive_gradients(train(1, 0), 1.0, "g") == []
    assert middle.next_task() is None


def test_a_duplicate_of_a_committed_step_is_answered_until_nobody_can_need_it() -> None:
    last = ledger(LAST, every=1)
    through_step(last, 1)
    assert names(last.receive_latents(train(1, 2), "x")) == [train(1, 2)]
    last.receive_status(UP, 1, 1)
    assert last.receive_latents(train(1, 2), "x") == []


def test_a_late_gradient_of_a_committed_step_is_ignored() -> None:
    middle = ledger(MIDDLE)
    through_step(middle, 1)
    before = state(middle)
    assert middle.receive_gradients(train(1, 0), 9.0, "late") == []
    assert state(middle) == before


# -- evaluation -------------------------------------------------------------------------------------------------


def test_an_evaluation_has_no_backward_and_its_result_is_relayed() -> None:
    middle = ledger(MIDDLE, plan=EVALUATING)
    middle.receive_latents(evaluate(1, 0), "x")
    assert compute(middle)[0] == Forward(evaluate(1, 0), "x")
    assert middle.receive_gradients(evaluate(1, 0), 3.5, "result") == [Returned(evaluate(1, 0), 3.5, "result")]
    assert middle.losses(MicrobatchKind.EVALUATE) == [3.5]
    assert middle.next_task() is None


def test_a_result_that_came_before_the_forward_is_relayed_with_it() -> None:
    middle = ledger(MIDDLE, plan=EVALUATING)
    assert middle.receive_gradients(evaluate(1, 0), 3.5, "result") == []
    middle.receive_latents(evaluate(1, 0), "x")
    _, out = compute(middle)
    assert out == [
        Forwarded(evaluate(1, 0), f"latents {evaluate(1, 0)}"),
        Returned(evaluate(1, 0), 3.5, "result"),
    ]


def test_the_first_stage_relays_to_nobody() -> None:
    first = ledger(FIRST, plan=EVALUATING)
    compute(first)
    assert first.receive_gradients(evaluate(1, 0), 3.5, "result") == []
    assert first.losses(MicrobatchKind.EVALUATE) == [3.5]


def test_a_run_is_complete_only_when_saved_and_evaluated() -> None:
    last = ledger(1, plan=EVALUATING, stages=2)
    for step in (1, 2):
        for name in EVALUATING.microbatches(step):
            last.receive_status(UP, step - 1, 0)
            last.receive_latents(name, "x")
        work(last)
    assert last.committed == 2
    assert not last.complete
    for index in range(2):
        last.receive_latents(evaluate(3, index), "x")
    work(last)
    assert last.complete


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
