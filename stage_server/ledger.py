"""The ledger of one stage: what it has received, computed, sent and committed, and what is to be done next.

A pure state machine: it knows no network, no tensor and no clock. Payloads are opaque to it, which is why the same
class is tested with arithmetic toys under thousands of fault plans and runs the real swarm.

The promise (DESIGN, section 5): each microbatch's gradient enters each stage's update exactly once, in index order,
however often frames are duplicated, reordered, delayed or lost, and whoever dies. It rests on four rules:

1. Everything is named by (step, kind, index). What is here already is ignored when it comes again; what is done
   already is answered again from what is retained.
2. What was sent is retained until every stage of the run has a checkpoint of that step or a later one (the *floor*,
   a step at which all stages write one, so that whoever goes back lands there).
   Until then a stage that restarts from its checkpoint can be given again all that it needs.
3. Backward runs in index order and forward in plan order, so that floating-point sums have one order. Within that,
   backward goes before forward (1F1B).
4. Weights change only at a commit, and a step commits only when every one of its microbatches is done.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stage_server.errors import NeighbourStateLost, ProtocolViolation, RewindNeeded, WrongStep
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.plan import Plan


class Side(enum.StrEnum):
    """The two neighbours of a stage."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A microbatch's payload on its way to the next stage."""

    name: MicrobatchId
    body: Any


@dataclass(frozen=True, slots=True)
class Returned:
    """A microbatch's payload on its way to the previous stage: gradient and loss, or for evaluation the loss alone."""

    name: MicrobatchId
    loss: float
    body: Any


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute forward. `payload` is what upstream sent; None on the first stage, which reads the data itself."""

    name: MicrobatchId
    payload: Any


@dataclass(frozen=True, slots=True)
class Backward:
    """Compute backward from the gradient that downstream sent."""

    name: MicrobatchId
    payload: Any


@dataclass(frozen=True, slots=True)
class Commit:
    """All microbatches of the step are done: take the optimizer step."""

    step: StepIndex


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write the committed state to disk."""

    step: StepIndex


Task = Forward | Backward | Commit | Checkpoint


@dataclass(slots=True)
class _Neighbour:
    """What is known of the stage on one side. `durable` speaks for all stages on that side; None: unknown."""

    exists: bool
    committed: int = 0
    durable: int | None = None


@dataclass(slots=True)
class _StepWork:
    """Progress within the step being worked on."""

    forwarded: set[MicrobatchId] = field(default_factory=set)  # or computed whole, on the last stage
    num_backwarded: int = 0  # likewise among the training microbatches
    done: set[MicrobatchId] = field(default_factory=set)
    losses: dict[MicrobatchId, float] = field(default_factory=dict)


class StageLedger:
    """See the module's text. Methods never block and never talk; they return what is to be sent."""

    def __init__(
        self, plan: Plan, *, stage: int, num_stages: int, checkpoints: Sequence[int], checkpoint_every: int
    ) -> None:
        """`checkpoints`: steps on disk, ascending; the stage starts from the last (none: from the initial weights)."""
        self.plan = plan
        self.stage = stage
        self.num_stages = num_stages
        self.committed = checkpoints[-1] if checkpoints else 0
        self.durable: int | None = checkpoints[-1] if checkpoints else None
        self.checkpoint_every = checkpoint_every
        self._mark = max((step for step in checkpoints if self._is_mark(step)), default=None)
        self.window = num_stages  # microbatches that the first stage keeps in flight; the caller adjusts it
        self.first_step_held = self.committed + 1  # frames of this step and later ones can be sent again
        self._oldest_restorable = checkpoints[0] if checkpoints else 0  # nobody can go back to before this step
        self._work = _StepWork()
        self._inputs: dict[MicrobatchId, Any] = {}
        self._returns: dict[MicrobatchId, Returned] = {}
        self._retained: dict[Side, dict[MicrobatchId, Forwarded | Returned]] = {side: {} for side in Side}
        self._neighbours = {
            Side.UPSTREAM: _Neighbour(exists=stage > 0),
            Side.DOWNSTREAM: _Neighbour(exists=stage < num_stages - 1),
        }

    # -- what is so ---------------------------------------------------------------------------------------------

    @property
    def step(self) -> StepIndex:
        """The step being worked on."""
        return StepIndex(self.committed + 1)

    @property
    def is_first(self) -> bool:
        return not self._neighbours[Side.UPSTREAM].exists

    @property
    def is_last(self) -> bool:
        return not self._neighbours[Side.DOWNSTREAM].exists

    @property
    def complete(self) -> bool:
        """Every step is committed and checkpointed, and the final evaluation is done."""
        closing = self.plan.microbatches(self.plan.steps + 1)
        return self.committed == self.plan.steps == self.durable and len(self._work.done) == len(closing)

    @property
    def unsaved(self) -> bool:
        """Whether there is something committed (or the initial weights) that no checkpoint holds."""
        return self.durable is None or self.durable < self.committed

    @property
    def in_flight(self) -> int:
        """Microbatches forwarded and not done yet."""
        return len(self._work.forwarded) - len(self._work.done)

    @property
    def queue_depth(self) -> int:
        """Microbatches whose input is here and that wait to be computed."""
        return len(self._inputs) + len(self._returns)

    @property
    def floor(self) -> int | None:
        """The newest step that every stage is known to have a checkpoint of; None: unknown.

        Only checkpoints at the steps where all stages write one count, not those of a drain: a stage that has to go
        back lands on a checkpoint of its own, and that must not lie before what the others keep.
        """
        marks = [self._mark, *(n.durable for n in self._neighbours.values() if n.exists)]
        known = [mark for mark in marks if mark is not None]
        return min(known) if len(known) == len(marks) else None

    @property
    def num_retained(self) -> int:
        """Frames kept for neighbours that may need them again."""
        return sum(len(frames) for frames in self._retained.values())

    def losses(self, kind: MicrobatchKind) -> list[float]:
        """Losses of the present step's microbatches that are done, in index order, nats per token."""
        return [loss for name, loss in sorted(self._work.losses.items()) if name.kind is kind]

    # -- what to do next ----------------------------------------------------------------------------------------

    def next_task(self) -> Task | None:
        """The most urgent thing to compute now; None: wait for a neighbour (or the run is complete)."""
        if self._checkpoint_due():
            return Checkpoint(StepIndex(self.committed))
        return self._next_backward() or self._next_commit() or self._next_forward()

    def _checkpoint_due(self) -> bool:
        return self._is_mark(self.committed) and self.unsaved

    def _is_mark(self, step: int) -> bool:
        """Whether every stage writes a checkpoint of this step."""
        return step % self.checkpoint_every == 0 or step == self.plan.steps

    def _next_backward(self) -> Task | None:
        if self.is_last or not self.plan.commits(self.step):
            return None
        if self._work.num_backwarded == self.plan.microbatches_per_step:
            return None
        name = MicrobatchId(self.step, MicrobatchKind.TRAIN, self._work.num_backwarded)
        returned = self._returns.get(name)
        return Backward(name, returned.body) if returned and name in self._work.forwarded else None

    def _next_commit(self) -> Task | None:
        all_done = len(self._work.done) == len(self.plan.microbatches(self.step))
        return Commit(self.step) if all_done and self.plan.commits(self.step) else None

    def _next_forward(self) -> Task | None:
        order = self.plan.microbatches(self.step)
        if len(self._work.forwarded) == len(order):
            return None
        name = order[len(self._work.forwarded)]
        if self.is_first:
            return Forward(name, None) if self.in_flight < self.window else None
        payload = self._inputs.get(name)
        return None if payload is None else Forward(name, payload)

    # -- what was computed --------------------------------------------------------------------------------------

    def forwarded(self, name: MicrobatchId, body: Any) -> list[Forwarded | Returned]:
        """A stage other than the last has computed forward. Returns what goes out: latents down, maybe a result up."""
        frame = Forwarded(name, body)
        self._work.forwarded.add(name)
        self._retained[Side.DOWNSTREAM][name] = frame
        return [frame, *self._relay_result(name)]

    def finished(self, name: MicrobatchId, loss: float, body: Any) -> list[Forwarded | Returned]:
        """The microbatch is done here: backward is computed, or on the last stage all of it. Returns what goes up."""
        if self.is_last:
            self._work.forwarded.add(name)
        if name.kind is MicrobatchKind.TRAIN:
            self._work.num_backwarded += 1
        self._work.done.add(name)
        self._work.losses[name] = loss
        self._inputs.pop(name, None)
        self._returns.pop(name, None)
        if self.is_first:
            return []
        frame = Returned(name, loss, body)
        self._retained[Side.UPSTREAM][name] = frame
        return [frame]

    def committed_step(self, step: StepIndex) -> None:
        """The optimizer step is taken: the weights are those of `step` now."""
        self.committed = step
        self._work = _StepWork()

    def checkpointed(self, step: StepIndex) -> None:
        """A complete checkpoint of `step` is on disk."""
        self.durable = step
        if self._is_mark(step):
            self._mark = step
        self._drop_below_floor()

    # -- what came in -------------------------------------------------------------------------------------------

    def receive_latents(self, name: MicrobatchId, payload: Any) -> list[Forwarded | Returned]:
        """Latents from upstream. Returns answers that are due again for a duplicate. Raises WrongStep."""
        self._check(name, Side.UPSTREAM)
        if name.step <= self.committed or name in self._work.done:
            answer = self._retained[Side.UPSTREAM].get(name)
            return [answer] if answer else []
        self._inputs.setdefault(name, payload)
        return []

    def receive_gradients(self, name: MicrobatchId, loss: float, payload: Any) -> list[Forwarded | Returned]:
        """Gradients or a result from downstream. Returns a result to relay upstream. Raises WrongStep."""
        self._check(name, Side.DOWNSTREAM)
        if name.step <= self.committed or name in self._work.done:
            return []
        self._returns.setdefault(name, Returned(name, loss, payload))
        return self._relay_result(name)

    def _relay_result(self, name: MicrobatchId) -> list[Forwarded | Returned]:
        """An evaluation has no backward: once forwarded and answered, its loss goes up as it came."""
        returned = self._returns.get(name)
        if name.kind is not MicrobatchKind.EVALUATE or returned is None:
            return []
        if name.step != self.step or name not in self._work.forwarded:
            return []
        return self.finished(name, returned.loss, returned.body)

    def _check(self, name: MicrobatchId, side: Side) -> None:
        if not self.plan.contains(name):
            raise WrongStep(f"the run has no {name}")
        # Its newest commit may not be known here yet, hence 2; a frame may overtake the status that reports it.
        committed = self._neighbours[side].committed
        if name.step > committed + 2:
            raise WrongStep(f"{name} from a neighbour that has committed {committed} steps")
        # A restarted stage is given several steps at once, but never more than lie between three checkpoints.
        if name.step > self.committed + 2 * self.checkpoint_every + 2:
            raise WrongStep(f"{name} is too far ahead of step {self.step} here")

    # -- neighbours ---------------------------------------------------------------------------------------------

    def holdings(self, side: Side) -> list[MicrobatchId]:
        """Microbatches of uncommitted steps that this stage has from that neighbour and need not be sent again."""
        waiting: Iterable[MicrobatchId] = self._inputs if side is Side.UPSTREAM else self._returns
        return sorted({*waiting, *self._work.done})

    def opened(self, side: Side, committed: int, held: Iterable[MicrobatchId]) -> list[Forwarded | Returned]:
        """A link to a neighbour is open. Returns the retained frames it lacks, in order.

        Raises RewindNeeded when it lacks frames that this stage cannot make again from where it stands, and
        NeighbourStateLost when no stage keeps frames that old any more: then the neighbour's state is gone.
        """
        self._check_marks(committed, None)
        if committed < self._oldest_restorable:
            raise NeighbourStateLost(
                f"the {side} stage stands at step {committed}; nobody keeps anything from before "
                f"step {self._oldest_restorable}"
            )
        if committed + 1 < self.first_step_held:
            raise RewindNeeded(
                f"the {side} stage stands at step {committed} and needs frames from before step {self.first_step_held}",
                to_step=committed,
            )
        # What it had on disk before may be gone since: it says so in its first status.
        self._neighbours[side] = _Neighbour(exists=True, committed=committed)
        skip = set(held)
        frames = self._retained[side]
        return [frames[name] for name in sorted(frames, key=_plan_order) if name.step > committed and name not in skip]

    def closed(self, side: Side) -> None:
        """The link to a neighbour is gone. It may go back to an older checkpoint now, so no floor rests on its word."""
        self._neighbours[side].durable = None

    def wants(self, side: Side, name: MicrobatchId) -> bool:
        """Whether a frame is of any use to that neighbour: it has not committed its step yet."""
        return name.step > self._neighbours[side].committed

    def status(self, side: Side) -> tuple[int, int | None]:
        """(committed step, durable step of all stages on this side of the link), to tell the neighbour on `side`."""
        other = self._neighbours[Side.DOWNSTREAM if side is Side.UPSTREAM else Side.UPSTREAM]
        if not other.exists:
            return self.committed, self._mark
        if self._mark is None or other.durable is None:
            return self.committed, None
        return self.committed, min(self._mark, other.durable)

    def receive_status(self, side: Side, committed: int, durable: int | None) -> bool:
        """A neighbour's newest status. Returns True when what is to be told to the other neighbour changed.

        Older statuses must not be passed in after newer ones: the floor would rest on what is no longer so.
        Raises ProtocolViolation for steps that the run has not.
        """
        self._check_marks(committed, durable)
        neighbour = self._neighbours[side]
        before = self.status(_other(side))
        neighbour.committed = max(neighbour.committed, committed)
        neighbour.durable = durable  # may fall: a stage on that side went back to an older checkpoint
        self._drop_below_floor()
        return self.status(_other(side)) != before

    def _check_marks(self, committed: int, durable: int | None) -> None:
        if committed > self.plan.steps:
            raise ProtocolViolation(f"the neighbour claims step {committed} of a run of {self.plan.steps}")
        if durable is not None and durable > committed:
            raise ProtocolViolation(f"the neighbour claims a checkpoint of step {durable} at step {committed}")

    def _drop_below_floor(self) -> None:
        floor = self.floor
        if floor is None:
            return
        self.first_step_held = max(self.first_step_held, floor + 1)
        self._oldest_restorable = max(self._oldest_restorable, floor)
        for frames in self._retained.values():
            for name in [name for name in frames if name.step <= floor]:
                del frames[name]


def _other(side: Side) -> Side:
    return Side.DOWNSTREAM if side is Side.UPSTREAM else Side.UPSTREAM


def _plan_order(name: MicrobatchId) -> tuple[int, bool, int]:
    return name.step, name.kind is MicrobatchKind.TRAIN, name.index
