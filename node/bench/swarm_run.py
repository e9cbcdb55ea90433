"""One measured run of a swarm on this machine: the demo's own processes, watched over their steady steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node.bench.cpu_account import CpuAccount, Sample, between, sample
from node.demo import Demo, DemoOptions, Interrupted
from node.demo_folder import demo_folder
from node.demo_peers import PeerView
from node.events import Evaluation, MemoryUse, Step, Summary, WorkTime
from node.processes import become_subreaper
from node.progress import StageTotals, StepAggregator
from node.supervisor import stop_on_signals

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.data import Corpus

StepsDone = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StageShare:
    """One stage's time over the steady steps."""

    seconds: float  # wall
    compute_seconds: float  # wall, as the event loop sees it: from handing a task over to having its result
    wait_seconds: float  # wall, for neighbours
    microbatches: int
    work: Mapping[str, WorkTime]


@dataclass(frozen=True, slots=True)
class SwarmRun:
    """What one run showed."""

    tokens_per_second: float
    step_seconds: Sequence[float]  # of the steady steps
    wire_compression: float | None
    stages: Sequence[StageShare]
    memory: Sequence[MemoryUse]
    cpu: CpuAccount


def run_swarm(config: RunConfig, *, warm_up: int, threads: int, on_step: StepsDone) -> SwarmRun:
    """Trains the run; all steps after the first `warm_up` are measured. Call it in the main thread.

    Raises:
        PeerFailed: a process gave up.
        KeyboardInterrupt: someone asked to stop.
    """
    become_subreaper()
    view = _SteadyView(config, warm_up, on_step)
    options = DemoOptions(threads=threads, device="cpu")
    try:
        with demo_folder(keep=False) as folder:
            asyncio.run(_train(config, folder, options, view))
    except Interrupted:
        raise KeyboardInterrupt from None
    return view.result()


async def _train(config: RunConfig, folder: Path, options: DemoOptions, view: _SteadyView) -> None:
    demo = Demo(config, folder, options, view)
    with stop_on_signals(demo.stop):
        try:
            await demo.until_complete()
            view.memory = [peer.memory for peer in demo.peers_by_stage() if peer.memory is not None]
        finally:
            await demo.stop_children()


class _SteadyView:
    """Watches a demo and takes its measure between two steps. Implements DemoView."""

    wants_sample = False

    def __init__(self, config: RunConfig, warm_up: int, on_step: StepsDone) -> None:
        self.memory: list[MemoryUse] = []
        self._config = config
        self._warm_up = warm_up
        self._on_step = on_step
        self._peers: Sequence[PeerView] = ()
        self._steps: list[Step] = []
        self._samples: list[Sample] = []
        self._totals: list[list[StageTotals]] = []

    def peers(self, peers: Sequence[PeerView]) -> None:
        self._peers = peers

    def step(self, step: Step, totals: StepAggregator) -> None:
        if step.step in (self._warm_up, self._config.plan.steps):
            self._samples.append(sample(peer.worker_pid for peer in self._peers if peer.worker_pid))
            self._totals.append(list(totals.stages))
        if step.step > self._warm_up:
            self._steps.append(step)
        self._on_step(step.step)

    def preparing(self, text: str, fraction: float) -> None: ...
    def begin(self, corpus: Corpus) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def tick(self, now: float) -> None: ...
    def note(self, text: str) -> None: ...
    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None: ...
    def close(self) -> None: ...

    def result(self) -> SwarmRun:
        """Of a run that is over."""
        plan = self._config.plan
        tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
        seconds = [step.seconds for step in self._steps]
        wire_bytes = sum(step.wire_bytes for step in self._steps)
        first, last = self._totals
        return SwarmRun(
            tokens_per_second=len(seconds) * tokens_per_step / sum(seconds),
            step_seconds=seconds,
            wire_compression=sum(step.dense_bytes for step in self._steps) / wire_bytes if wire_bytes else None,
            stages=[_share(before, after) for before, after in zip(first, last, strict=True)],
            memory=self.memory,
            cpu=between(*self._samples),
        )


def _share(before: StageTotals, after: StageTotals) -> StageShare:
    none = WorkTime(seconds=0.0, cpu_seconds=0.0)
    return StageShare(
        seconds=after.seconds - before.seconds,
        compute_seconds=after.compute_seconds - before.compute_seconds,
        wait_seconds=after.wait_seconds - before.wait_seconds,
        microbatches=after.microbatches - before.microbatches,
        work={kind: _minus(time, before.work.get(kind, none)) for kind, time in after.work.items()},
    )


def _minus(after: WorkTime, before: WorkTime) -> WorkTime:
    return WorkTime(seconds=after.seconds - before.seconds, cpu_seconds=after.cpu_seconds - before.cpu_seconds)
