"""The ledger of one stage: what it has received, computed, sent and committed, and what is to be done next.

A pure state machine: it knows no network, no tensor and no clock. Payloads are opaque to it, which is why the same
class is tested with arithmetic toys under hundreds of fault plans and runs the real swarm.

The promise (DESIGN, section 5): each microbatch's gradient enters each stage's update exactly once, however often
frames are duplicated, reordered, delayed or lost, and whoever dies. It rests on four rules:

1. Everything is named by (step, kind, index). What is here already is ignored when it comes again; what is done
   already is answered again from what is retained.
2. What was sent is retained until every stage of the run has a checkpoint of that step or a later one (the *floor*,
   a step at which all stages write one, so that whoever goes back lands there).
   Until then a stage that restarts from its checkpoint can be given again all that it needs.
3. Backward goes before forward (1F1B). Where one peer serves each stage, backward runs in index order and forward in
   plan order, so that floating-point sums have one order.
4. Weights change only at a commit, and a step commits only when every one of its microbatches is done.

Where a stage may have several replicas (`shared`), each does a part of a step's microbatches, and neighbours are many:

5. A frame has one addressee at a time (its *route*, `routes.py`); when that peer is gone, every frame that it was sent
   goes to another, finished or not, as long as the stage there has not committed the step (`orphans`).
6. When a step commits is not this ledger's to say: replicas agree on it (`agreed`), and until then everything that the
   gradient sum is made of is kept, so that it can be made again for any share of the step (`share`).
7. A microbatch may be asked for when its step is committed here already: its sender's predecessor died before it had
   the gradient. It is computed once more with the weights of before (*late*), and counts for nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stage_server.errors import NeighbourStateLost, ProtocolViolation, RewindNeeded, WrongStep
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.late import LateWork
from stage_server.marks import SideMarks
from stage_server.plan import Plan
from stage_server.routes import Routes, SoleRoute
from stage_server.work import (
    SOLE,
    Backward,
    Checkpoint,
    Commit,
    Declined,
    Forward,
    Forwarded,
    Outbound,
    Returned,
    Side,
    Task,
)


@dataclass(slots=True)
class _StepWork:
    """Progress within the step being worked on."""

    forwarded: set[MicrobatchId] = field(default_factory=set)  # or computed whole, on the last stage
    counted: set[MicrobatchId] = field(default_factory=set)  # what the gradient sum holds
    done: set[MicrobatchId] = field(default_factory=set)
    losses: dict[MicrobatchId, float] = field(default_factory=dict)


class StageLedger:
    """See the module's text. Methods never block and never talk; they return what is to be sent."""

    def __init__(
        self,
        plan: Plan,
        *,
        stage: int,
        num_stages: int,
        checkpoints: Sequence[int],
        checkpoint_every: int,
        shared: bool = False,
    ) -> None:
        """`checkpoints`: steps on disk, ascending; the stage starts from the last (none: from the initial weights)."""
        self.plan = plan
        self.stage = stage
        self.num_stages = num_stages
        self.shared = shared
        self.committed = checkpoints[-1] if checkpoints else 0
        self.durable: int | None = checkpoints[-1] if checkpoints else None
        self.checkpoint_every = checkpoint_every
        self._mark = max((step for step in checkpoints if self._is_mark(step)), default=None)
        self.window = num_stages  # microbatches that the first stage keeps in flight; the caller adjusts it
        self.pick: Callable[[Sequence[MicrobatchId]], MicrobatchId | None] = first_of
        """Which of the step's microbatches that this first stage has not begun is to be begun next; None: none."""
        self.frozen = False  # what the gradient sum holds is being agreed on, and must not change
        self.paused = False  # the weights are about to be replaced: nothing is computed with them
        self.first_step_held = self.committed + 1  # frames of this step and later ones can be sent again
        self._oldest_restorable = checkpoints[0] if checkpoints else 0  # nobody can go back to before this step
        self._dropped_to = -1  # frames of this step and earlier ones are gone
        self._alone = True
        self._agreed = 0
        self._has_earlier_weights = False
        self._work = _StepWork()
        self._earlier_losses: Mapping[MicrobatchId, float] = {}
        self._late = LateWork()
        self._inputs: dict[MicrobatchId, Any] = {}
        self._returns: dict[MicrobatchId, Returned] = {}
        self._retained: dict[Side, dict[MicrobatchId, Forwarded | Returned]] = {side: {} for side in Side}
        self._exists = {Side.UPSTREAM: stage > 0, Side.DOWNSTREAM: stage < num_stages - 1}
        self._marks = {side: SideMarks() for side in Side}
        self.routes = Routes() if shared else SoleRoute(SOLE)

    # -- what is so ---------------------------------------------------------------------------------------------

    @property
    def step(self) -> StepIndex:
        """The step being worked on."""
        return StepIndex(self.committed + 1)

    @property
    def is_first(self) -> bool:
        return not self._exists[Side.UPSTREAM]

    @property
    def is_last(self) -> bool:
        return not self._exists[Side.DOWNSTREAM]

    @property
    def complete(self) -> bool:
        """Every step is committed and checkpointed, and the final evaluation is done."""
        closing = self.plan.microbatches(self.plan.steps + 1)
        closed = not closing or (
            self._agreed > self.plan.steps if self.shared else len(self._work.done) == len(closing)
        )
        return self.committed == self.plan.steps == self.durable and closed

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
        waiting = sum(name not in self._work.forwarded and name not in self._work.done for name in self._inputs)
        return waiting + sum(name not in self._work.done for name in self._returns) + len(self._late)

    @property
    def floor(self) -> int | None:
        """The newest step that every stage is known to have a checkpoint of; None: unknown.

        Only checkpoints at the steps where all stages write one count, not those of a drain: a stage that has to go
        back lands on a checkpoint of its own, and that must not lie before what the others keep.
        """
        marks = [self._mark, *(self._marks[side].durable for side in Side if self._exists[side])]
        known = [mark for mark in marks if mark is not None]
        return min(known) if len(known) == len(marks) else None

    @property
    def num_retained(self) -> int:
        """Frames kept for neighbours that may need them again."""
        return sum(len(frames) for frames in self._retained.values())

    @property
    def counted(self) -> frozenset[MicrobatchId]:
        """Training microbatches of the present step that the gradient sum holds."""
        return frozenset(self._work.counted)

    @property
    def done(self) -> frozenset[MicrobatchId]:
        """Microbatches of the present step that are computed here and answered."""
        return frozenset(self._work.done)

    @property
    def begun(self) -> frozenset[MicrobatchId]:
        """Microbatches of the present step that were forwarded here."""
        return frozenset(self._work.forwarded)

    @property
    def promised(self) -> frozenset[MicrobatchId]:
        """Of those begun here, what this peer can bring to an end: others need not begin it."""
        return self.begun if self._is_heard_beyond else self.done

    @property
    def _is_heard_beyond(self) -> bool:
        """Whether what is forwarded reaches anybody, where others could do it in this peer's place."""
        return not self.shared or self.is_last or len(self._marks[Side.DOWNSTREAM]) > 0

    @property
    def own_losses(self) -> Mapping[MicrobatchId, float]:
        """Losses of the present step's microbatches that are done here, nats per token."""
        return {name: self._work.losses[name] for name in self._work.done}

    @property
    def earlier_losses(self) -> Mapping[MicrobatchId, float]:
        """Losses of all microbatches of the step before, as far as they are known here."""
        return self._earlier_losses

    def losses(self, kind: MicrobatchKind) -> list[float]:
        """Losses of the present step's microbatches that are done, in index order, nats per token."""
        return [loss for name, loss in sorted(self._work.losses.items()) if name.kind is kind]

    # -- what to do next ----------------------------------------------------------------------------------------

    def next_task(self) -> Task | None:
        """The most urgent thing to compute now; None: wait for a neighbour (or the run is complete)."""
        if self.paused:
            return None
        if self._checkpoint_due():
            return Checkpoint(StepIndex(self.committed))
        return self._next_late() or self._next_backward() or self._next_commit() or self._next_forward()

    def _checkpoint_due(self) -> bool:
        return self._is_mark(self.committed) and self.unsaved

    def _is_mark(self, step: int) -> bool:
        """Whether every stage writes a checkpoint of this step."""
        return step % self.checkpoint_every == 0 or step == self.plan.steps

    def _next_late(self) -> Task | None:
        answered = self._late.next_answered()
        if answered is not None:
            return Backward(answered[0], answered[1].body, late=True)
        waiting = self._late.next_forward()
        return None if waiting is None else Forward(*waiting, late=True)

    def _next_backward(self) -> Task | None:
        if self.is_last or self.frozen or not self.plan.commits(self.step):
            return None
        if not self.shared:
            if len(self._work.counted) == self.plan.microbatches_per_step:
                return None
            name = MicrobatchId(self.step, MicrobatchKind.TRAIN, len(self._work.counted))
            returned = self._returns.get(name)
            return Backward(name, returned.body) if returned and name in self._work.forwarded else None
        pending = (n for n in self._work.forwarded if n.kind is MicrobatchKind.TRAIN and n not in self._work.done)
        # Alone, a peer waits for the first of those begun: where all are alone these come in index order.
        first = min((n for n in pending if self._alone or n in self._returns), default=None)
        return Backward(first, self._returns[first].body) if first is not None and first in self._returns else None

    def _next_commit(self) -> Task | None:
        if not self.plan.commits(self.step):
            return None
        if self.shared:
            return Commit(self.step) if self._agreed == self.step else None
        all_done = len(self._work.done) == len(self.plan.microbatches(self.step))
        return Commit(self.step) if all_done else None

    def _next_forward(self) -> Task | None:
        order = self.plan.microbatches(self.step)
        if len(self._work.forwarded) == len(order) or (self.is_last and self.frozen):
            return None
        if self.is_first:
            if self.in_flight >= self.window or not self._is_heard_beyond:
                return None
            picked = self.pick([name for name in order if name not in self._work.forwarded])
            return None if picked is None else Forward(picked, None)
        if not self.shared:
            name = order[len(self._work.forwarded)]
            return Forward(name, self._inputs[name]) if name in self._inputs else None
        ready = (name for name in order if name in self._inputs and name not in self._work.forwarded)
        first = next(ready, None)
        return None if first is None else Forward(first, self._inputs[first])

    # -- what was computed --------------------------------------------------------------------------------------

    def forwarded(self, name: MicrobatchId, body: Any) -> list[Forwarded | Returned]:
        """A stage other than the last has computed forward. Returns what goes out: latents down, maybe a result up."""
        frame = Forwarded(name, body)
        self._retained[Side.DOWNSTREAM][name] = frame
        if name.step <= self.committed:
            self._late.forwarded(name)
        else:
            self._work.forwarded.add(name)
        return [frame, *self._relay_result(name)]

    def finished(self, name: MicrobatchId, loss: float, body: Any) -> list[Forwarded | Returned]:
        """The microbatch is done here: backward is computed, or on the last stage all of it. Returns what goes up."""
        frame = Returned(name, loss, body)
        if name.step <= self.committed:
            self._late.finished(name)
        else:
            self._note_done(name, loss)
        if self.is_first:
            return []
        self._retained[Side.UPSTREAM][name] = frame
        return [frame]

    def _note_done(self, name: MicrobatchId, loss: float) -> None:
        if self.is_last:
            self._work.forwarded.add(name)
        if name.kind is MicrobatchKind.TRAIN:
            self._work.counted.add(name)
        self._work.done.add(name)
        self._work.losses[name] = loss
        if not self.shared:  # else the gradient sum may have to be made again
            self._inputs.pop(name, None)
            self._returns.pop(name, None)

    def committed_step(self, step: StepIndex) -> None:
        """The optimizer step is taken: the weights are those of `step` now."""
        if self.shared:
            self._begin_late()
        self._has_earlier_weights = True
        self._earlier_losses = self._work.losses
        self._enter(step)

    def _enter(self, step: int) -> None:
        self.committed = step
        self.frozen = False
        self._work = _StepWork()
        for received in (self._inputs, self._returns):
            for name in [name for name in received if name.step <= step]:
                del received[name]

    def _begin_late(self) -> None:
        unfinished = {
            name: payload
            for name, payload in self._inputs.items()
            if name.step == self.step and name not in self._work.done
        }
        self._late.begin(unfinished, self._returns)

    def checkpointed(self, step: StepIndex) -> None:
        """A complete checkpoint of `step` is on disk."""
        self.durable = step
        if self._is_mark(step):
            self._mark = step
        self._drop_below_floor()

    @property
    def is_alone(self) -> bool:
        """Whether this peer is the only one of its stage, as far as it was told."""
        return self._alone

    # -- replicas -----------------------------------------------------------------------------------------------

    def alone(self, alone: bool) -> None:
        """Whether this peer is the only one of its stage."""
        self._alone = alone

    def inputs_of(self, names: Iterable[MicrobatchId]) -> list[tuple[MicrobatchId, Any, Any]]:
        """(name, input, gradient) of microbatches that are done here, to compute them once more, in index order.

        The input is None on the first stage, the gradient on the last.
        """
        returned = {name: self._returns[name].body for name in names if name in self._returns}
        return [(name, self._inputs.get(name), returned.get(name)) for name in sorted(names)]

    def share(self, names: Iterable[MicrobatchId]) -> None:
        """The gradient sum holds exactly these now."""
        self._work.counted = set(names)

    def learn_losses(self, losses: Mapping[MicrobatchId, float]) -> None:
        """Losses of microbatches of the present step that other replicas have done."""
        self._work.losses |= {name: loss for name, loss in losses.items() if name.step == self.step}

    def agreed(self, step: int) -> None:
        """The replicas are agreed on the present step's gradient, and it is in the sum. Its commit is due.

        The closing step has none: it is over.
        """
        self._agreed = max(self._agreed, step)

    def adopted(self, step: int, *, durable: int, has_earlier_weights: bool) -> None:
        """Weights and optimizer state are those that replicas hold at this step; on disk are those of `durable`."""
        self._late = LateWork()
        self._earlier_losses = {}
        self._has_earlier_weights = has_earlier_weights
        self._enter(step)
        self.durable = durable
        # It never goes back to before this state, so it needs no more than those who have a checkpoint of the mark.
        self._mark = durable if self._is_mark(durable) else durable - durable % self.checkpoint_every

    # -- what came in -------------------------------------------------------------------------------------------

    def receive_latents(self, name: MicrobatchId, payload: Any, peer: str = SOLE) -> list[Outbound]:
        """Latents from upstream. Returns answers that are due to this sender now. Raises WrongStep."""
        self._check(name, Side.UPSTREAM, peer)
        self.routes.asked(name, peer)
        answer = self._retained[Side.UPSTREAM].get(name)
        if answer is not None:
            return [answer]
        if name.step > self.committed:
            self._inputs.setdefault(name, payload)
        elif self.shared and name.step == self.committed and self._has_earlier_weights:
            self._late.receive_latents(name, payload)
        elif self.shared:
            return [Declined(name)]
        return []

    def receive_gradients(
        self, name: MicrobatchId, loss: float, payload: Any, peer: str = SOLE
    ) -> list[Forwarded | Returned]:
        """Gradients or a result from downstream. Returns a result to relay upstream. Raises WrongStep."""
        self._check(name, Side.DOWNSTREAM, peer)
        if name.step <= self.committed:
            self._late.receive_return(name, Returned(name, loss, payload))
        elif name not in self._work.done:
            self._returns.setdefault(name, Returned(name, loss, payload))
        return self._relay_result(name)

    def _relay_result(self, name: MicrobatchId) -> list[Forwarded | Returned]:
        """An evaluation has no backward: once forwarded and answered, its loss goes up as it came."""
        if name.kind is not MicrobatchKind.EVALUATE:
            return []
        if name.step <= self.committed:
            returned = self._late.answered(name)
        else:
            mine = name.step == self.step and name in self._work.forwarded and name not in self._work.done
            returned = self._returns.get(name) if mine else None
        return [] if returned is None else self.finished(name, returned.loss, returned.body)

    def _check(self, name: MicrobatchId, side: Side, peer: str) -> None:
        if not self.plan.contains(name):
            raise WrongStep(f"the run has no {name}")
        # Its newest commit may not be known here yet, hence 2; a frame may overtake the status that reports it.
        committed = self._marks[side].of(peer).committed
        if name.step > committed + 2:
            raise WrongStep(f"{name} from a neighbour that has committed {committed} steps")
        # A restarted stage is given several steps at once, but never more than lie between three checkpoints.
        if name.step > self.committed + 2 * self.checkpoint_every + 2:
            raise WrongStep(f"{name} is too far ahead of step {self.step} here")

    # -- neighbours ---------------------------------------------------------------------------------------------

    def holdings(self, side: Side, peer: str = SOLE) -> list[MicrobatchId]:
        """Microbatches that this stage has from that neighbour and need not be sent again."""
        if side is Side.DOWNSTREAM:
            return sorted({*self._returns, *self._work.done})
        if not self.shared:
            return sorted({*self._inputs, *self._work.done})
        answered = (name for name in self._retained[Side.UPSTREAM] if name.step >= self.committed)
        known = {*self._inputs, *self._work.done, *answered}
        return sorted(name for name in known if peer in self.routes.askers(name))

    def opened(
        self, side: Side, committed: int, held: Iterable[MicrobatchId], peer: str = SOLE
    ) -> list[Forwarded | Returned]:
        """A link to a neighbour is open. Returns the retained frames it lacks, in order.

        Raises RewindNeeded when it lacks frames that this stage cannot make again from where it stands, and
        NeighbourStateLost when no stage keeps frames that old any more: then the neighbour's state is gone.
        """
        self._check_marks(committed, None)
        if not self.shared:
            self._check_restorable(side, committed)
        self._marks[side].opened(peer, committed)
        skip = set(held)
        frames = self._retained[side]
        return [
            frames[name]
            for name in sorted(frames, key=_plan_order)
            if name not in skip and self._is_for(name, side, peer) and self.wants(side, name, peer)
        ]

    def _check_restorable(self, side: Side, committed: int) -> None:
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

    def _is_for(self, name: MicrobatchId, side: Side, peer: str) -> bool:
        return self.routes.to(name) == peer if side is Side.DOWNSTREAM else peer in self.routes.askers(name)

    def closed(self, side: Side, peer: str = SOLE) -> None:
        """The link to a neighbour is gone."""
        if self.shared:
            self._marks[side].forget(peer)
        else:
            self._marks[side].doubt(peer)

    def wants(self, side: Side, name: MicrobatchId, peer: str = SOLE) -> bool:
        """Whether a frame is of any use to that neighbour: it has not committed its step yet, or the answer lacks."""
        mark = self._marks[side].of(peer)
        if name.step > mark.committed:
            return True
        if not self.shared:
            return False
        if side is Side.UPSTREAM:
            return name.step == mark.committed  # late there
        return self._awaits(name) or name.step > mark.settled_at_least

    def _awaits(self, name: MicrobatchId) -> bool:
        """Forwarded here, and the next stage has not answered."""
        if name.step <= self.committed:
            return self._late.awaits(name)
        return name in self._work.forwarded and name not in self._returns and name not in self._work.done

    def outstanding(self) -> Mapping[str, int]:
        """By peer of the next stage: microbatches that it has been sent and has not answered."""
        late = (name for name in self.routes if self._late.awaits(name))
        waiting = (name for name in self._work.forwarded if self._awaits(name))
        return Counter(peer for name in (*waiting, *late) if (peer := self.routes.to(name)) is not None)

    def orphans(self) -> list[Forwarded | Returned]:
        """Frames that somebody in the next stage needs and that nobody is addressed with, in order.

        Finished or not: the sum that a gone peer had added them to is gone with it, unless its stage has committed; and
        what it had sent on is gone too, unless all stages beyond have.
        """
        settled = min((mark.settled_at_least for mark in self._marks[Side.DOWNSTREAM]), default=0)
        frames = self._retained[Side.DOWNSTREAM]
        needed = (name for name in frames if name.step > settled or self._awaits(name))
        return [frames[name] for name in sorted(needed, key=_plan_order) if name not in self.routes]

    def status(self, side: Side) -> tuple[int, int | None]:
        """(committed step, durable step of all stages on this side of the link), to tell the neighbour on `side`."""
        other = side.other
        if not self._exists[other]:
            return self.committed, self._mark
        durable = self._marks[other].durable
        if self._mark is None or durable is None:
            return self.committed, None
        return self.committed, min(self._mark, durable)

    def settled(self, side: Side) -> int:
        """The newest step that this stage and all beyond it have committed, to tell the neighbour on `side`."""
        beyond = self._marks[side.other] if self._exists[side.other] else ()
        return min((self.committed, *(mark.settled_at_least for mark in beyond)))

    def receive_status(
        self, side: Side, committed: int, durable: int | None, peer: str = SOLE, *, settled: int | None = None
    ) -> bool:
        """A neighbour's newest status. Returns True when what is to be told to the other neighbour changed.

        Older statuses must not be passed in after newer ones: the floor would rest on what is no longer so.
        Raises ProtocolViolation for steps that the run has not.
        """
        self._check_marks(committed, durable)
        other = side.other
        before = self.status(other), self.settled(other)
        self._marks[side].told(peer, committed, durable, settled)
        self._drop_below_floor()
        return (self.status(other), self.settled(other)) != before

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
        # Of the newest committed step some may still be late: their frames go when the next one is committed.
        floor = min(floor, self.committed - 1) if self.shared else floor
        if floor <= self._dropped_to:
            return
        self._dropped_to = floor
        self.routes.forget_to(floor)
        for frames in self._retained.values():
            for name in [name for name in frames if name.step <= floor]:
                del frames[name]


def first_of(names: Sequence[MicrobatchId]) -> MicrobatchId | None:
    """The first, which is the order of a stage that is served by one peer."""
    return names[0] if names else None


def _plan_order(name: MicrobatchId) -> tuple[int, bool, int]:
    return name.step, name.kind is MicrobatchKind.TRAIN, name.index
