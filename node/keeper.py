"""Keeps one worker process serving: starts it, restarts it with back-off, drains it, and leaves nothing of it behind.

Knows neither torch nor hivemind: it must stay small and alive whatever happens in the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from node.errors import WorkerCrashed
from node.events import EXIT_DONE, EXIT_REFUSED, EXIT_RESTART, Error, Event, Worker, WorkerSpec
from node.pipes import forward_events, reading_stdout
from node.processes import BoundedLog, describe_exit, kill_tree, start_child, sweep_orphans
from node.scratch import scratch_folder
from stage_server.concurrency import cancelled

WORKER_COMMAND = (sys.executable, "-m", "node.worker")
DRAIN_TIMEOUT = timedelta(seconds=20)
_POLL_SECONDS = 0.2
_TRIM_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class BackOff:
    """How long to wait after each crash. A value: `after` gives the next one.

    The n-th crash in a row waits first * factor^(n-1), at most `longest`, less a random share of up to `jitter`, so
    that peers felled by one cause do not come back in step. A worker that lived `healthy` starts a new row.
    """

    first: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    longest: timedelta = timedelta(seconds=30)
    jitter: float = 0.5
    healthy: timedelta = timedelta(minutes=1)
    give_up_after: int = 6
    free_restarts: int = 20
    crashes: int = 0
    restarts: int = 0

    def after(
        self, lived: timedelta, *, asked: bool = False, chance: Callable[[], float] = random.random
    ) -> tuple[BackOff, timedelta | None]:
        """The next state and the wait, or None: give up. `asked`: the worker wanted to be restarted, at once.

        A worker that asks over and over within its first minute is taken for a crashing one.
        """
        start = replace(self, crashes=0, restarts=0) if lived >= self.healthy else self
        if asked and start.restarts < self.free_restarts:
            return replace(start, restarts=start.restarts + 1), timedelta(0)
        crashed = replace(start, crashes=start.crashes + 1)
        if crashed.crashes >= self.give_up_after:
            return crashed, None
        longest = min(self.longest, self.first * self.factor ** (crashed.crashes - 1))
        return crashed, longest * (1.0 - self.jitter * chance())


class Outcome(enum.Enum):
    """How a supervisor's life ended."""

    COMPLETE = "complete"  # the worker finished by itself
    DRAINED = "drained"  # asked to stop, and it left in good order
    KILLED = "killed"  # asked to stop, and it had to be forced
    REFUSED = "refused"  # the worker said why it will not work, see `error`


@dataclass(frozen=True, slots=True)
class Ended:
    outcome: Outcome
    error: Error | None = None


@dataclass(slots=True)
class Household:
    """The children of this process, so that whoever sweeps up after one worker spares the others."""

    strangers: frozenset[int] = frozenset()
    """Pids of children that were there before any worker."""
    workers: set[int] = field(default_factory=set)
    """Pids of the workers that live."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How workers are kept."""

    command: Sequence[str] = WORKER_COMMAND
    drain_timeout: timedelta = DRAIN_TIMEOUT
    back_off: BackOff = field(default_factory=BackOff)


class Keeper:
    """Runs workers, one after another, until they are complete, refused, or someone asks to stop."""

    def __init__(
        self,
        folder: Path,
        spec: Callable[[], WorkerSpec],
        on_event: Callable[[Event], None],
        household: Household,
        habits: Habits,
    ) -> None:
        """`folder`: where the log goes. `spec`: what the next worker is told."""
        self.log = BoundedLog(folder / "worker.log")
        self._spec = spec
        self._on_event = on_event
        self._household = household
        self._habits = habits
        self._stops = 0
        self._stopping = asyncio.Event()
        self._forced = False
        self._error: Error | None = None

    def stop(self) -> None:
        """Once: drain. Twice: kill. Safe from a signal handler of the loop."""
        self._stops += 1
        self._stopping.set()

    async def run(self) -> Ended:
        """Keeps workers until the end. Call in the main thread: workers die with the thread that started them.

        Raises WorkerCrashed (too often in a short time), OSError (the worker cannot be started).
        """
        back_off = self._habits.back_off
        while True:
            started = time.monotonic()
            with scratch_folder() as scratch:
                pid, code = await self._one_life(scratch)
            self._on_event(Worker(state="exited", pid=pid, detail=describe_exit(code)))
            if code == EXIT_DONE:
                return Ended(Outcome.DRAINED if self._stops else Outcome.COMPLETE)
            if self._stops:
                return Ended(Outcome.KILLED if self._forced else Outcome.DRAINED)
            if code == EXIT_REFUSED:
                return Ended(Outcome.REFUSED, self._error)
            lived = timedelta(seconds=time.monotonic() - started)
            back_off, wait = back_off.after(lived, asked=code == EXIT_RESTART)
            if wait is None:
                raise WorkerCrashed(self._obituary(back_off.crashes, code))
            seconds = wait.total_seconds()
            self._on_event(Worker(state="restarting", pid=pid, detail=describe_exit(code), in_seconds=seconds))
            await self._pause(seconds)
            if self._stops:
                return Ended(Outcome.DRAINED)

    async def _one_life(self, scratch: Path) -> tuple[int, int]:
        """Starts a worker and stays with it. Returns its pid and return code; nothing of its tree is left."""
        environment = {"GRPC_ENABLE_FORK_SUPPORT": "0", "TMPDIR": str(scratch)}
        child = start_child(self._habits.command, log=self.log, stdin=True, environment=environment)
        self._household.workers.add(child.pid)
        try:
            self._on_event(Worker(state="started", pid=child.pid, detail=f"log: {self.log.path}"))
            async with reading_stdout(child) as reader:
                listening = asyncio.create_task(forward_events(reader, self._heard, self._logged))
                try:
                    self._send_spec(child)
                    code = await self._until_exit(child, listening)
                    self._sweep(child)  # also lets go of the pipe, so that its end is seen
                    await asyncio.wait([listening], timeout=_LAST_WORDS_SECONDS)
                    if listening.done():
                        listening.result()
                    return child.pid, code
                finally:
                    await cancelled(listening)
        finally:
            self._sweep(child)
            self._household.workers.discard(child.pid)

    def _send_spec(self, child: subprocess.Popen[bytes]) -> None:
        """A worker that is dead already is seen by whoever waits for it."""
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(self._spec().model_dump_json().encode() + b"\n")
            child.stdin.flush()

    def _heard(self, event: Event) -> None:
        if isinstance(event, Error):
            self._error = event
        self._on_event(event)

    def _logged(self, text: str) -> None:
        self.log.write(f"supervisor: {text}")

    async def _until_exit(self, child: subprocess.Popen[bytes], listening: asyncio.Task[None]) -> int:
        """Polls, which works everywhere and needs no child watcher; drains and kills when asked to."""
        kill_at: float | None = None
        trim_at = 0.0
        while (code := child.poll()) is None:
            if self._stops and kill_at is None:
                child.terminate()
                kill_at = time.monotonic() + self._habits.drain_timeout.total_seconds()
            late = kill_at is not None and time.monotonic() >= kill_at
            if not self._forced and (self._stops > 1 or late):
                self._forced = True
                kill_tree(child.pid)
            if listening.done() and (error := listening.exception()):
                raise error
            if time.monotonic() >= trim_at:
                self.log.trim()
                trim_at = time.monotonic() + _TRIM_SECONDS
            await asyncio.sleep(_POLL_SECONDS)
        return code

    def _sweep(self, child: subprocess.Popen[bytes]) -> None:
        """Whatever happened: the worker and all that it started are gone and reaped."""
        if child.poll() is None:
            kill_tree(child.pid)
            child.wait()
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        others = self._household.workers - {child.pid}
        if names := sweep_orphans(keep=self._household.strangers | others):
            self._logged(f"ended what the worker left behind: {', '.join(names)}")

    async def _pause(self, seconds: float) -> None:
        """Or until someone asks to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _obituary(self, crashes: int, code: int) -> str:
        lines = [line for line in self.log.tail(20) if line.strip()]
        last = f"; last line: {lines[-1].strip()}" if lines else ""
        return f"the worker died {crashes} times in a row ({describe_exit(code)}); log: {self.log.path}{last}"
