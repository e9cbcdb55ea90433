"""The systems under test as running things: started in the lab, watched step by step, stopped for good."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node.bench.wan.plan import System
from node.demo import COORDINATOR, Demo, DemoOptions, peer_names
from node.demo_folder import demo_folder
from node.demo_peers import PeerFailed, PeerView
from node.errors import LabFailed
from node.events import Evaluation, Event, StageStep, Step, Summary
from node.pipes import forward_events, reading_stdout
from node.processes import BoundedLog, describe_exit, kill_tree, start_child
from node.progress import StageTotals, StepAggregator
from node.tasks import first_of
from stage_server.concurrency import cancelled

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.data import Corpus
    from node.lab.namespaces import NamespaceLab

START_SECONDS = 180.0
"""A system that has not done its first step by then has failed."""
TORCH_PORT = 29500  # in a namespace of its own, so it is free


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A step is done on all stages."""

    at: float  # monotonic seconds
    step: int
    stages: Sequence[StageTotals]


class Steps:
    """The steps of a running system as they end. Only the newest is kept: what nobody waited for is history."""

    def __init__(self) -> None:
        self._newest: StepEnd | None = None
        self._changed = asyncio.Event()

    def push(self, step: int, stages: Sequence[StageTotals]) -> None:
        self._newest = StepEnd(time.monotonic(), step, tuple(stages))
        self._changed.set()

    async def next(self) -> StepEnd:
        """The next step that ends."""
        self._changed.clear()
        await self._changed.wait()
        return self.newest

    @property
    def newest(self) -> StepEnd:
        """The last step that ended; of a system that has trained at least one."""
        if self._newest is None:
            raise ValueError("no step has ended yet")
        return self._newest


@dataclass
class Running:
    """A system at work. `names`: lab peers by stage; `workers`: process ids of those that compute, by stage."""

    steps: Steps
    failed: asyncio.Future[None]
    names: Callable[[], Sequence[str]]
    workers: Callable[[], Sequence[int]]


def lab_names(num_stages: int) -> list[str]:
    """Of the lab's peers: the coordinator has a place of its own, so that its traffic is on nobody's link."""
    return [COORDINATOR, *peer_names(num_stages)]


def start(system: System, config: RunConfig, lab: NamespaceLab) -> AbstractAsyncContextManager[Running]:
    """Starts a system in the lab and stops it at the end. Raises PeerFailed or LabFailed when it does not come up."""
    return _torch(config, lab) if system is System.TORCH else _swarm(config, lab)


# -- ours -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _swarm(config: RunConfig, lab: NamespaceLab) -> AsyncIterator[Running]:
    steps = Steps()
    with demo_folder(keep=False) as folder:
        demo = Demo(config, folder, DemoOptions(threads=1, device="cpu"), _StepsView(steps), lab)
        training = asyncio.ensure_future(demo.until_complete())
        try:
            running = Running(
                steps,
                training,
                lambda: [peer.name for peer in demo.peers_by_stage()],
                lambda: [peer.worker_pid for peer in demo.peers_by_stage() if peer.worker_pid],
            )
            await _first_step(running, "the swarm")
            yield running
        finally:
            await cancelled(training)
            await demo.stop_children()


class _StepsView:
    """Passes steps on. Implements DemoView."""

    wants_sample = False

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def step(self, step: Step, totals: StepAggregator) -> None:
        self._steps.push(step.step, totals.stages)

    def preparing(self, text: str, fraction: float) -> None: ...
    def begin(self, corpus: Corpus) -> None: ...
    def peers(self, peers: Sequence[PeerView]) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def tick(self, now: float) -> None: ...
    def note(self, text: str) -> None: ...
    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None: ...
    def close(self) -> None: ...


# -- torch's ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _torch(config: RunConfig, lab: NamespaceLab) -> AsyncIterator[Running]:
    names = peer_names(config.stages)
    with demo_folder(keep=False) as folder:
        pipeline = _TorchPipeline(config, lab, names, folder)
        working = asyncio.ensure_future(pipeline.run())
        try:
            running = Running(pipeline.steps, working, lambda: names, lambda: pipeline.pids)
            await _first_step(running, "torch's pipeline")
            yield running
        finally:
            await cancelled(working)


class _TorchPipeline:
    """Its ranks as processes. They never end by themselves, so whoever does has failed."""

    def __init__(self, config: RunConfig, lab: NamespaceLab, names: Sequence[str], folder: Path) -> None:
        self.steps = Steps()
        self.pids: list[int] = []
        self._config, self._lab, self._names, self._folder = config, lab, names, folder
        self._aggregator = StepAggregator(config.stages)

    async def run(self) -> None:
        """Until cancelled; nothing is left then. Raises PeerFailed."""
        await first_of(*(self._run_rank(stage, name) for stage, name in enumerate(self._names)))

    async def _run_rank(self, stage: int, name: str) -> None:
        log = BoundedLog(self._folder / f"{name}.log")
        child = start_child(self._command(stage, name), log=log, death_signal=signal.SIGKILL)
        self.pids.append(child.pid)
        try:
            async with reading_stdout(child) as reader:
                await forward_events(reader, self._heard, log.write)
            while (code := child.poll()) is None:  # noqa: ASYNC110 - a process has no event to wait for
                await asyncio.sleep(0.02)
            raise PeerFailed.of(f"rank {stage} of torch's pipeline", None, describe_exit(code), log)
        finally:
            kill_tree(child.pid)
            child.wait()

    def _heard(self, event: Event) -> None:
        if isinstance(event, StageStep):
            for step in self._aggregator.add(event, time.monotonic()):
                self.steps.push(step.step, self._aggregator.stages)

    def _command(self, stage: int, name: str) -> list[str]:
        spec = {
            "config": self._config.model_dump(mode="json"),
            "stage": stage,
            "address": self._lab.address(name),
            "first_address": self._lab.address(self._names[0]),
            "port": TORCH_PORT,
        }
        argv = [sys.executable, "-m", "node.bench.wan.torch_stage", json.dumps(spec)]
        return self._lab.command(name, argv)


async def _first_step(running: Running, what: str) -> None:
    """Waits until it trains. Raises PeerFailed, LabFailed."""
    try:
        async with asyncio.timeout(START_SECONDS):
            await first_of(running.steps.next(), asyncio.shield(running.failed))
    except TimeoutError:
        raise LabFailed(f"{what} has not done a step within {START_SECONDS:.0f} s of its start") from None
