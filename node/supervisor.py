"""Keeps a machine's workers serving: the first one, and one more for each further stage; leaves no process behind.

Which stages those are the first worker finds out (`Cover` events): it sees the directory. Knows neither torch nor
hivemind: it must stay small and alive whatever happens in the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil

from node.cores import threads_of_a_stage
from node.errors import NodeError, StateFolderBusy, WorkerCrashed
from node.events import Check, Cover, Error, Event, Worker, WorkerSpec
from node.folders import beside_folder
from node.keeper import DRAIN_TIMEOUT, WORKER_COMMAND, BackOff, Ended, Habits, Household, Keeper, Outcome
from node.processes import become_subreaper

AFTER_FAILURE = timedelta(minutes=5)
"""How long a stage is left alone whose worker was refused, or crashed too often."""

PORT_STRIDE = 10
"""With --port P the worker for stage s, beside the first, listens at P + 10 (s + 1)."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds the folder for this process alone; the kernel lets go of it however we end. Raises StateFolderBusy."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            raise StateFolderBusy(f"process {owner or '?'} already uses the state folder {folder}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


class Supervisor:
    """Runs a machine's workers until the first one ends for good, or someone asks to stop."""

    def __init__(
        self,
        spec: WorkerSpec,
        on_event: Callable[[Event], None],
        *,
        on_beside: Callable[[int, Event], None] | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        drain_timeout: timedelta = DRAIN_TIMEOUT,
        back_off: BackOff | None = None,
    ) -> None:
        """`on_beside`: who is told, with the stage, what the workers beside the first one say; default: the same."""
        self._spec = spec
        self._on_event = on_event
        self._on_beside = on_beside or (lambda _, event: self._on_event(event))
        self._household = Household()
        self._habits = Habits(command, drain_timeout, back_off or BackOff())
        self._first = self._keeper(spec.state_folder, self._first_spec, self._heard)
        self._beside: dict[int, Keeper] = {}
        self._not_before: dict[int, float] = {}  # by stage, monotonic seconds
        self._ends: list[Outcome] = []  # of workers beside the first
        self._group: asyncio.TaskGroup | None = None
        self._stops = 0
        self.log = self._first.log

    def stop(self) -> None:
        """Once: drain. Twice: kill. Safe from a signal handler of the loop."""
        self._stops += 1
        for keeper in (self._first, *self._beside.values()):
            keeper.stop()

    async def run(self) -> Ended:
        """Supervises until the end. Call in the main thread: workers die with the thread that started them.

        Raises StateFolderBusy, WorkerCrashed (too often in a short time), OSError (the worker cannot be started).
        """
        become_subreaper()
        self._household.strangers = frozenset(child.pid for child in psutil.Process().children())
        with locked_folder(self._spec.state_folder), stop_on_signals(self.stop):
            return await self._supervise()

    async def _supervise(self) -> Ended:
        """The machine leaves as a whole: when the first worker is gone, the others drain."""
        failure: NodeError | OSError | None = None
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                ended = await self._first.run()
            except (NodeError, OSError) as error:
                failure = error
            self._group = None
            if not self._stops:
                self.stop()
        if failure is not None:
            raise failure
        killed = ended.outcome is Outcome.DRAINED and Outcome.KILLED in self._ends
        return Ended(Outcome.KILLED) if killed else ended

    def _keeper(self, folder: Path, spec: Callable[[], WorkerSpec], on_event: Callable[[Event], None]) -> Keeper:
        return Keeper(folder, spec, on_event, self._household, self._habits)

    def _first_spec(self) -> WorkerSpec:
        return self._spec.model_copy(update={"num_beside": len(self._beside)})

    def _heard(self, event: Event) -> None:
        self._on_event(event)
        if isinstance(event, Cover):
            self._cover(event)

    # -- beside the first worker --------------------------------------------------------------------------------

    def _cover(self, cover: Cover) -> None:
        """One more worker, unless there is one, or was one that failed just now."""
        stage = cover.stage
        pause = time.monotonic() < self._not_before.get(stage, 0.0)
        if self._group is None or self._stops or stage in self._beside or pause:
            return
        spec = _beside_spec(self._spec, cover, num_workers=2 + len(self._beside))
        keeper = self._keeper(spec.state_folder, lambda: spec, partial(self._heard_beside, stage))
        self._beside[stage] = keeper
        self._group.create_task(self._keep_beside(stage, keeper))

    async def _keep_beside(self, stage: int, keeper: Keeper) -> None:
        """Until it has left, or failed: that costs this stage, not the others."""
        try:
            ended = await keeper.run()
            self._ends.append(ended.outcome)
            failed = ended.outcome is Outcome.REFUSED
        except (NodeError, OSError) as error:
            failed = True
            crash = error if isinstance(error, NodeError) else WorkerCrashed(f"the worker is not started: {error}")
            self._heard_beside(stage, Error(code=int(crash.code), cause=crash.cause, remedy=crash.remedy))
        finally:
            del self._beside[stage]
        if failed:
            self._not_before[stage] = time.monotonic() + AFTER_FAILURE.total_seconds()

    def _heard_beside(self, stage: int, event: Event) -> None:
        if isinstance(event, Check | Worker | Error):  # those that do not name a stage themselves
            event = event.model_copy(update={"stage": stage})
        self._on_beside(stage, event)


def _beside_spec(first: WorkerSpec, cover: Cover, num_workers: int) -> WorkerSpec:
    """What a worker beside the first one is told: it has an identity, a folder, ports and threads of its own."""
    folder = beside_folder(first.state_folder, cover.stage)
    changes = {
        "state_folder": folder,
        "identity_file": folder / "identity.key",
        "stage": cover.stage,
        "also": (),
        "max_stages": 1,
        "beside": cover.beside,
        "port": _port_beside(first.port, cover.stage),
        "dht_port": _port_beside(first.dht_port, cover.stage),
        "metrics_port": None if first.metrics_port is None else _port_beside(first.metrics_port, cover.stage),
        "threads": first.threads or threads_of_a_stage(num_workers),
    }
    return first.model_copy(update=changes)


def _port_beside(port: int, stage: int) -> int:
    """Of the worker for that stage, so that a person can open it in a firewall; 0 (any) stays 0."""
    beside = port + PORT_STRIDE * (stage + 1) if port else 0
    return beside if beside < 65536 else 0


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM ask to stop; the handlers of before come back at the end."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
