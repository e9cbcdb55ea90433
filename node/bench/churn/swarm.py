"""The processes of a churned swarm: `resbm-node coordinator` and `resbm-node join`, as anyone would start them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from node.bench.churn.journal import Journal, Struck
from node.bench.churn.schedule import Blow
from node.demo import COMMAND, Child
from node.events import Assigned, Evaluation, Event, StageStep, TicketPrinted, Worker
from node.processes import kill_tree
from node.replication.record import EVERY_VARIABLE, FOLDER_VARIABLE

HOST = "127.0.0.1"
TICKET_WITHIN = 60.0  # seconds
LEAVING = 15.0


class ChurnSwarm:
    """Starts, strikes and ends peers, and writes down what they tell."""

    def __init__(self, run_file: Path, num_stages: int, folder: Path, *, record_every: int) -> None:
        self.journal = Journal(num_stages)
        self.records = folder / "records"
        self._run_file, self._folder = run_file, folder
        self._ticket: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._coordinator: Child | None = None
        self._peers: dict[str, Child] = {}
        self._stage: dict[str, int] = {}
        self._stopped: dict[str, list[psutil.Process]] = {}
        self._listeners: set[asyncio.Task[int]] = set()
        self._number = 0
        os.environ[FOLDER_VARIABLE] = str(self.records)
        os.environ[EVERY_VARIABLE] = str(record_every)

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """The coordinator, until it has printed its ticket."""
        command = [*COMMAND, "coordinator", "--run", str(self._run_file), "--host", HOST, "--json"]
        command += ["--state-dir", str(self._folder / "coordinator")]
        self._coordinator = Child("coordinator", command, self._folder)
        self._listen("coordinator", self._coordinator)
        async with asyncio.timeout(TICKET_WITHIN):
            await self._ticket

    async def join(self, *, late: bool) -> str:
        """One more peer. `late`: the swarm runs already, so that the time it takes to take part is of interest."""
        self._number += 1
        name = f"peer-{self._number}"
        command = [*COMMAND, "join", await self._ticket, "--stage", "auto", "--host", HOST, "--json", "--device", "cpu"]
        command += ["--threads", "1", "--state-dir", str(self._folder / name)]
        self._peers[name] = Child(name, command, self._folder)
        self._listen(name, self._peers[name])
        if late:
            self.journal.joined[name] = time.monotonic()
        return name

    def end_coordinator(self) -> None:
        """SIGKILL, and it never comes back."""
        if self._coordinator is not None:
            kill_tree(self._coordinator.process.pid)

    @property
    def serving(self) -> Mapping[str, int]:
        """Stage by peer, of those that have committed something and are not stopped."""
        committed = self.journal.first_commit
        return {n: s for n, s in self._stage.items() if n in self._peers and n in committed and n not in self._stopped}

    @property
    def pids(self) -> Sequence[int]:
        """Of all peers' supervisors."""
        return [child.process.pid for child in self._peers.values()]

    async def close(self) -> None:
        """Everybody leaves; nothing of them is left."""
        for name in list(self._stopped):
            self.go_on(name)
        children = [*self._peers.values(), *([self._coordinator] if self._coordinator else [])]
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + LEAVING
        while time.monotonic() < deadline and _any_lives(children):  # noqa: ASYNC110 - processes have no events
            await asyncio.sleep(0.05)
        for child in children:
            kill_tree(child.process.pid)
        await asyncio.gather(*self._listeners, return_exceptions=True)

    # -- blows --------------------------------------------------------------------------------------------------

    def strike(self, blow: Blow, name: str) -> None:
        """It happens to this peer, to all of its processes at once."""
        self.journal.struck.append(Struck(time.monotonic(), blow, name, self._stage[name]))
        child = self._peers[name]
        if blow is Blow.KILL:
            del self._peers[name]
            kill_tree(child.process.pid)
            return
        root = psutil.Process(child.process.pid)
        processes = [root, *root.children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        self._stopped[name] = processes

    def go_on(self, name: str) -> None:
        """SIGCONT to a stopped peer."""
        for process in self._stopped.pop(name, []):
            if process.is_running():
                process.send_signal(signal.SIGCONT)

    # -- what they tell -----------------------------------------------------------------------------------------

    def _listen(self, name: str, child: Child) -> None:
        task = asyncio.create_task(child.listen(lambda event: self._observe(name, event)))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    def _observe(self, name: str, event: Event) -> None:
        match event:
            case TicketPrinted() if not self._ticket.done():
                self._ticket.set_result(event.ticket)
            case Assigned():
                self._stage[name] = event.stage
            case StageStep():
                self.journal.committed(name, event.stage, event.step, event.loss, time.monotonic())
            case Evaluation():
                self.journal.evaluations.setdefault(event.step, event.loss)
            case Worker(state="restarting"):
                self.journal.restarts += 1


def _any_lives(children: Sequence[Child]) -> bool:
    return any(child.process.poll() is None for child in children)
