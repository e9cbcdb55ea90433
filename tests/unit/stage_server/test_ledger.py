"""One ledger by itself: what it does next and what it answers."""

from __future__ import annotations

from dataclasses import replace

from support.one_ledger import (
    EVALUATING,
    FIRST,
    LAST,
    MIDDLE,
    PLAN,
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

from stage_server.ids import MicrobatchKind, StepIndex
from stage_server.work import Backward, Checkpoint, Commit, Forward, Forwarded, Returned, Side

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


# -- shared stages ----------------------------------------------------------------------------------------------


def test_a_source_begins_nothing_that_would_reach_nobody() -> None:
    """Others of its stage would leave to it what it says it has begun."""
    first = ledger(FIRST, shared=True)
    assert first.next_task() is None
    first.opened(Side.DOWNSTREAM, 0, [], "next")
    assert first.next_task() == Forward(train(1, 0), None)
    compute(first)
    assert first.promised == {train(1, 0)}
    first.closed(Side.DOWNSTREAM, "next")
    assert first.begun == {train(1, 0)}
    assert first.promised == set()
    assert first.next_task() is None


def test_a_state_that_was_taken_over_lets_others_drop_what_lies_before_its_mark() -> None:
    """Else each newcomer would keep all stages from dropping anything until its own next mark."""
    last = ledger(LAST, plan=replace(PLAN, steps=100), every=4, shared=True)
    last.adopted(6, durable=6, has_earlier_weights=False)
    assert last.status(Side.UPSTREAM) == (6, 4)
    last.adopted(8, durable=8, has_earlier_weights=False)
    assert last.status(Side.UPSTREAM) == (8, 8)
