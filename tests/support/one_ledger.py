"""One ledger whose neighbours and arithmetic a test plays by hand."""

from __future__ import annotations

from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import StageLedger
from stage_server.plan import Plan
from stage_server.work import Backward, Checkpoint, Commit, Forward, Forwarded, Returned, Side, Task

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
    stage: int,
    *,
    plan: Plan = PLAN,
    stages: int = 3,
    checkpoints: tuple[int, ...] = (0,),
    every: int = 100,
    shared: bool = False,
) -> StageLedger:
    return StageLedger(
        plan, stage=stage, num_stages=stages, checkpoints=checkpoints, checkpoint_every=every, shared=shared
    )


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
