"""A whole swarm on this machine: a coordinator and one peer per stage, as the separate processes they always are.

The demo starts what anyone would start by hand (`resbm-node coordinator`, `resbm-node join TICKET --stage auto`),
listens to their JSON lines, and at the end asks every peer for its weights. It owns all their lives: none outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psutil

from node.cores import threads_of_a_stage
from node.demo_folder import demo_folder
from node.demo_peers import PeerFailed, PeerView
from node.demo_view import DemoView
from node.events import Complete, Evaluation, Event, Live, StageStep, Summary, TicketPrinted
from node.pipes import forward_events, reading_stdout
from node.processes import BoundedLog, become_subreaper, describe_exit, kill_tree, start_child, sweep_orphans
from node.progress import StepAggregator
from node.supervisor import stop_on_signals
from node.tasks import first_of

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.data import Corpus
    from node.demo_result import Weights

T = TypeVar("T")

COMMAND = (sys.executable, "-m", "node.cli")
COORDINATOR = "coordinator"
LEAVING = timedelta(seconds=10)
"""How long peers may take to leave in good order at the end; then they are killed."""
_REDRAW_SECONDS = 0.5


def peer_names(num_stages: int) -> list[str]:
    """Of a demo's peers; who serves which stage they settle among themselves."""
    return [f"peer-{number}" for number in range(1, num_stages + 1)]


class Interrupted(Exception):
    """Someone asked to stop before the run was complete."""


@dataclass(frozen=True, slots=True)
class Fault:
    """SIGKILL to the worker of `stage` in the middle of `step`: for tests, and to show that it changes nothing."""

    stage: int
    step: int


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a demo is told beside its run."""

    threads: int = 0  # torch threads of each peer; 0: the cores shared out among them
    device: str = "auto"
    keep: bool = False  # keep the run's folder
    faults: tuple[Fault, ...] = ()


class Place(Protocol):
    """Where the demo's processes live. Names are `COORDINATOR` and those of the peers, peer-1 and so on."""

    def address(self, name: str) -> str:
        """The IP address on which that process listens."""

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that starts it there."""


class Loopback:
    """All of them on this machine's loopback address."""

    def address(self, name: str) -> str:
        return "127.0.0.1"

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        return list(argv)


class Child:
    """A process of the demo, its log, and the listener to its events."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self.log = BoundedLog(folder / f"{name}.log")
        # SIGTERM, not SIGKILL, if we die: it then ends its own worker and all that the worker started.
        self.process: subprocess.Popen[bytes] = start_child(command, log=self.log, death_signal=signal.SIGTERM)

    async def listen(self, on_event: Callable[[Event], None]) -> int:
        """Passes events on until the process ends; returns its return code."""
        async with reading_stdout(self.process) as reader:
            await forward_events(reader, on_event, self.log.write)
        while (code := self.process.poll()) is None:  # noqa: ASYNC110 - a process has no event to wait for
            await asyncio.sleep(0.02)
        return code


class Demo:
    """One demo in one folder. `run` trains to the end; `stop_children` must follow, however it ended."""

    def __init__(
        self, config: RunConfig, folder: Path, options: DemoOptions, view: DemoView, place: Place | None = None
    ) -> None:
        self.config = config
        self.folder = folder
        self.options = options
        self.view = view
        self.place = place or Loopback()
        self.steps = StepAggregator(config.stages)
        self.evaluations: dict[int, float] = {}
        self.peers = [PeerView(name) for name in peer_names(config.stages)]
        self._children: list[Child] = []
        self._listeners: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ticket: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._complete = asyncio.Event()
        self._faults = list(options.faults)
        self._stops = 0
        self._leaving = False
        self._stopping = asyncio.Event()
        self._not_ours = frozenset(child.pid for child in psutil.Process().children())

    def peers_by_stage(self) -> list[PeerView]:
        return sorted(self.peers, key=lambda peer: -1 if peer.stage is None else peer.stage)

    @property
    def restarts(self) -> int:
        return sum(peer.restarts for peer in self.peers)

    def stop(self) -> None:
        """Once: leave in good order. Twice: at once."""
        self._stops += 1
        self._stopping.set()

    async def until_complete(self) -> None:
        """Trains the run. Raises PeerFailed or Interrupted."""
        await self.unless_stopped(self._train())

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Work with the peers there. Raises what it raises, PeerFailed or Interrupted."""
        task = asyncio.create_task(work)
        # Shielded: the failure is to be heard of more than once.
        await first_of(task, asyncio.shield(self._failure), self._stopping.wait(), self._redraw())
        if task.cancelled():
            raise Interrupted
        return task.result()

    async def _train(self) -> None:
        self._start(COORDINATOR, self._coordinator_command(), self._on_coordinator_event)
        ticket = await self._ticket
        for peer in self.peers:
            self._start(peer.name, self._join_command(peer.name, ticket), self._on_peer_event(peer))
        self.view.peers(self.peers)
        await self._complete.wait()

    async def _redraw(self) -> None:
        """The time left goes down between steps, too."""
        while True:
            await asyncio.sleep(_REDRAW_SECONDS)
            self.view.tick(time.monotonic())

    def _coordinator_command(self) -> list[str]:
        from node.config import dump_toml

        run_file = self.folder / "run.toml"
        run_file.write_text(dump_toml(self.config))
        place = ["--host", self.place.address(COORDINATOR), "--state-dir", str(self.folder / COORDINATOR)]
        return [*COMMAND, "coordinator", "--run", str(run_file), *place, "--json"]

    def _join_command(self, name: str, ticket: str) -> list[str]:
        options = {
            "--stage": "auto",
            "--max-stages": 1,  # a peer for each stage is on its way
            "--state-dir": self.folder / name,
            "--host": self.place.address(name),
            "--metrics-port": 0,
            "--device": self.options.device,
            "--threads": self.options.threads or threads_of_a_stage(self.config.stages),
            "--drain-seconds": LEAVING.total_seconds() / 2,
        }
        return [*COMMAND, "join", ticket, *(str(part) for pair in options.items() for part in pair), "--json"]

    def _start(self, name: str, command: Sequence[str], on_event: Callable[[Event], None]) -> None:
        child = Child(name, self.place.command(name, command), self.folder)
        self._children.append(child)
        self._listeners.append(asyncio.create_task(self._follow(child, on_event)))

    async def _follow(self, child: Child, on_event: Callable[[Event], None]) -> None:
        """Nobody may leave before the end: whoever does fails the demo."""
        try:
            code = await child.listen(on_event)
            self._fail(self._obituary(child, code))
        except Exception as error:  # noqa: BLE001 - not swallowed: the demo raises it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The first failure counts; what happens on the way out is none."""
        if not self._leaving and not self._failure.done():
            self._failure.set_exception(error)

    def _obituary(self, child: Child, code: int) -> PeerFailed:
        peer = next((peer for peer in self.peers if peer.name == child.name), None)
        worker_log = BoundedLog(self.folder / child.name / "worker.log")
        log = worker_log if worker_log.tail(1) else child.log
        return PeerFailed.of(child.name, peer, describe_exit(code), log)

    # -- events -------------------------------------------------------------------------------------------------

    def _on_coordinator_event(self, event: Event) -> None:
        if isinstance(event, TicketPrinted) and not self._ticket.done():
            self._ticket.set_result(event.ticket)

    def _on_peer_event(self, peer: PeerView) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            peer.observe(event)
            self.view.peers(self.peers)
            match event:
                case Live():
                    self._on_live(event)
                case StageStep():
                    self._on_stage_step(event)
                case Evaluation():
                    self._on_evaluation(event)
                case Complete():
                    if all(other.complete for other in self.peers):
                        self._complete.set()
            self._inject_faults(peer, event)

        return on_event

    def _on_live(self, event: Live) -> None:
        if all(peer.is_live for peer in self.peers) and self.steps.num_steps == 0:
            self.steps.cut(time.monotonic())

    def _on_stage_step(self, event: StageStep) -> None:
        for step in self.steps.add(event, time.monotonic()):
            self.view.step(step, self.steps)

    def _on_evaluation(self, event: Evaluation) -> None:
        """Each stage may tell it, and a restarted one again: the first counts."""
        if event.step in self.evaluations:
            return
        self.evaluations[event.step] = event.loss
        self.view.evaluation(event)
        if event.step == self.steps.num_steps:
            self.steps.cut(time.monotonic())

    def _inject_faults(self, peer: PeerView, event: Event) -> None:
        """The step before has just ended on that stage: this one is under way."""
        step = event.step + 1 if isinstance(event, StageStep) else 1 if isinstance(event, Live) else None
        fault = next((f for f in self._faults if (f.stage, f.step) == (peer.stage, step)), None)
        if fault is not None and peer.worker_pid is not None:
            self._faults.remove(fault)
            self.view.note(f"kill -9 {peer.worker_pid}: the worker of stage {fault.stage}, in step {fault.step}")
            os.kill(peer.worker_pid, signal.SIGKILL)

    # -- the end ------------------------------------------------------------------------------------------------

    async def stop_children(self) -> None:
        """Peers first, the coordinator last, so that they can say goodbye. No process is left."""
        self._leaving = True
        if self._failure.done():
            self._failure.exception()  # heard of already, or nobody asks any more
        await self._leave([child for child in self._children if child.name != COORDINATOR])
        await self._leave(self._children)
        sweep_orphans(keep=self._not_ours)
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)

    async def _leave(self, children: Sequence[Child]) -> None:
        """SIGTERM and some time; SIGKILL when that is over or someone is in a hurry (a second Ctrl+C)."""
        running = [child.process for child in children if child.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + LEAVING.total_seconds()
        while any(process.poll() is None for process in running):
            if time.monotonic() > deadline or self._stops > 1:
                for process in running:
                    kill_tree(process.pid)
            await asyncio.sleep(0.05)


def run_demo(config: RunConfig, options: DemoOptions, view: DemoView) -> Summary:
    """Trains a run with a swarm on this machine and tells `view` all about it. Call it in the main thread.

    Raises:
        PeerFailed: a process gave up; its log is kept.
        Interrupted: someone asked to stop.
        DataUnreadable, MachineUnfit: the text is not there.
    """
    from node.data import load_corpus

    become_subreaper()
    corpus = load_corpus(config, view.preparing)  # the peers then find it in the cache
    view.begin(corpus)
    with demo_folder(keep=options.keep) as folder:
        return asyncio.run(_run(config, folder, options, view, corpus))


async def _run(config: RunConfig, folder: Path, options: DemoOptions, view: DemoView, corpus: Corpus) -> Summary:
    demo = Demo(config, folder, options, view)
    with stop_on_signals(demo.stop):
        try:
            await demo.until_complete()
            demo.view.note("every step is committed; the peers hand out their weights")
            from node.demo_result import gather_weights  # torch and gRPC: not before the last fork

            endpoints = [peer.live.endpoint for peer in demo.peers_by_stage() if peer.live]
            weights = await demo.unless_stopped(gather_weights(endpoints, demo.config.run_id, demo.folder / "weights"))
        finally:
            await demo.stop_children()
    return _conclude(demo, corpus, weights)


def _conclude(demo: Demo, corpus: Corpus, weights: Weights) -> Summary:
    """Puts the model together and sums up."""
    from node.demo_result import digest_of, write_sample

    steps, view = demo.steps, demo.view
    summary = Summary(
        val_loss_before=demo.evaluations.get(0),
        val_loss=demo.evaluations.get(demo.config.plan.steps),
        wire_compression=steps.wire_compression,
        tokens_per_second=steps.tokens_per_second,
        weights_digest=digest_of(weights),
        unigram_entropy=corpus.unigram_entropy,
        steps=steps.num_steps,
        stages=demo.config.stages,
        restarts=demo.restarts,
    )
    view.summary(summary, steps, write_sample(demo.config, weights, corpus) if view.wants_sample else "")
    return summary
