"""A pipeline in virtual time: real ledgers and the real credit window, with computing and links that only take time.

A discrete-event simulation, so that what latency costs can be tested to the millisecond and never depends on the
machine. Links are as fast as they are asked to be; what they add is delay.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from stage_server.ledger import StageLedger
from stage_server.plan import Plan
from stage_server.window import CreditWindow
from stage_server.work import Backward, Checkpoint, Commit, Forward, Forwarded, Returned, Side


@dataclass
class Pipeline:
    """What is simulated. All times in seconds."""

    num_stages: int = 4
    steps: int = 6
    microbatches: int = 32
    forward_seconds: float = 0.010
    backward_seconds: float = 0.020
    commit_seconds: float = 0.005
    jitter: float = 0.0  # standard deviation of computing times, as a share of them
    round_trip_of_step: Callable[[int], float] = lambda step: 0.0  # of each link, while stage 0 works on that step
    seed: int = 0


@dataclass
class History:
    """What the first stage saw: when each microbatch was back, by step, and how large the window was."""

    done_at: dict[int, list[float]] = field(default_factory=dict)
    committed_at: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    windows: dict[int, list[int]] = field(default_factory=dict)

    def step_seconds(self, step: int) -> float:
        return self.committed_at[step] - self.committed_at[step - 1]

    def steady_interval(self, step: int) -> float:
        """Seconds between completions, from the first of the step to the last: without the fill before it."""
        times = self.done_at[step]
        return (times[-1] - times[0]) / (len(times) - 1)

    def flush_share(self, step: int) -> float:
        """Share of the step that filling, draining and committing take beyond the steady pace."""
        return 1.0 - self.steady_interval(step) * len(self.done_at[step]) / self.step_seconds(step)


def simulate(pipeline: Pipeline) -> History:
    """Trains all steps."""
    return _Simulation(pipeline).run()


class _Simulation:
    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        plan = Plan(pipeline.steps, pipeline.microbatches, evaluation_microbatches=0, evaluate_every=0)
        stages = range(pipeline.num_stages)
        self._ledgers = [
            StageLedger(plan, stage=s, num_stages=pipeline.num_stages, checkpoints=(), checkpoint_every=10**6)
            for s in stages
        ]
        self._busy = [False for _ in stages]
        self._window = CreditWindow(pipeline.num_stages)
        self._random = random.Random(pipeline.seed)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._sent_at: dict[object, float] = {}
        self._history = History()

    def run(self) -> History:
        for stage in range(self._pipeline.num_stages):
            self._start(stage)
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        return self._history

    def _after(self, seconds: float, happen: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happen))

    def _start(self, stage: int) -> None:
        """Whatever is most urgent, if the stage is free."""
        task = None if self._busy[stage] else self._ledgers[stage].next_task()
        if task is None:
            return
        self._busy[stage] = True
        self._after(self._seconds(stage, task), lambda: self._done(stage, task))

    def _seconds(self, stage: int, task: object) -> float:
        p = self._pipeline
        match task:
            case Forward():
                whole = p.forward_seconds + (p.backward_seconds if self._ledgers[stage].is_last else 0.0)
            case Backward():
                whole = p.backward_seconds
            case Commit():
                whole = p.commit_seconds
            case _:
                return 0.0
        return whole * max(0.1, self._random.gauss(1.0, p.jitter))

    def _done(self, stage: int, task: object) -> None:
        ledger, outbound = self._ledgers[stage], list[Forwarded | Returned]()
        match task:
            case Forward(name) if ledger.is_last:
                outbound = ledger.finished(name, 1.0, None)
            case Forward(name):
                outbound = ledger.forwarded(name, name)
                self._sent_at[stage, name] = self._now
            case Backward(name):
                outbound = ledger.finished(name, 1.0, name)
                if ledger.is_first:
                    self._back(name.step, timedelta(seconds=self._now - self._sent_at[stage, name]))
            case Commit(step):
                ledger.committed_step(step)
                self._report(stage)
                if ledger.is_first:
                    self._history.committed_at[step] = self._now
                    self._window.step_ended()
            case Checkpoint(step):
                ledger.checkpointed(step)
        for item in outbound:
            self._send(stage, item)
        self._busy[stage] = False
        self._start(stage)

    def _back(self, step: int, round_trip: timedelta) -> None:
        self._history.done_at.setdefault(step, []).append(self._now)
        self._window.completed(timedelta(seconds=self._now), round_trip)
        self._ledgers[0].window = self._window.size
        self._history.windows.setdefault(step, []).append(self._window.size)

    @property
    def _delay(self) -> float:
        return self._pipeline.round_trip_of_step(self._ledgers[0].step) / 2

    def _send(self, stage: int, item: Forwarded | Returned) -> None:
        to = stage + 1 if isinstance(item, Forwarded) else stage - 1
        self._after(self._delay, lambda: self._arrive(to, item))

    def _report(self, stage: int) -> None:
        """Tells both neighbours of the commit."""
        committed = self._ledgers[stage].committed
        for to, side in ((stage - 1, Side.DOWNSTREAM), (stage + 1, Side.UPSTREAM)):
            if 0 <= to < self._pipeline.num_stages:
                self._after(self._delay, partial(self._ledgers[to].receive_status, side, committed, None))

    def _arrive(self, stage: int, item: Forwarded | Returned) -> None:
        ledger = self._ledgers[stage]
        if isinstance(item, Forwarded):
            ledger.receive_latents(item.name, item.body)
        else:
            ledger.receive_gradients(item.name, item.loss, item.name)
        self._start(stage)
