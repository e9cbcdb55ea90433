"""The processes of a churned swarm: `resbm-node coordinator` and `resbm-node join`, as anyone would start them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from node import invitation
from node.bench.churn.journal import Journal, Struck
from node.bench.churn.schedule import Blow
from node.demo import COMMAND, COORDINATOR, Child, Place
from node.events import Assigned, Check, Evaluation, Event, Moving, StageStep, TicketPrinted, Worker
from node.lab.namespaces import INTERFACE, NamespaceLab
from node.processes import kill_tree
from node.replication.record import EVERY_VARIABLE, FOLDER_VARIABLE

TICKET_WITHIN = 60.0  # seconds
MEASURED_WITHIN = 120.0
LEAVING = 15.0


def peer_name(number: int) -> str:
    """Of the peer that joins as so many-th, from 1."""
    return f"peer-{number}"


class ChurnSwarm:
    """Starts, strikes and ends peers, and writes down what they tell."""

    def __init__(self, run_file: Path, num_stages: int, folder: Path, place: Place, *, record_every: int) -> None:
        self.journal = Journal(num_stages)
        self.records = folder / "records"
        self._run_file, self._folder, self._place = run_file, folder, place
        self._ticket: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._coordinator: Child | None = None
        self._started: list[Child] = []  # the coordinator and all peers that there ever were
        self._peers: dict[str, Child] = {}  # those that were neither killed nor asked to leave
        self._measured: set[str] = set()
        self._stage: dict[str, int] = {}
        self._stopped: dict[str, list[psutil.Process]] = {}
        self._cut: set[str] = set()
        self._listeners: set[asyncio.Task[int]] = set()
        self._number = 0
        os.environ[FOLDER_VARIABLE] = str(self.records)
        os.environ[EVERY_VARIABLE] = str(record_every)

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """The coordinator, until it has printed its ticket."""
        command = [*COMMAND, "coordinator", "--run", str(self._run_file), "--json"]
        command += ["--host", self._place.address(COORDINATOR), "--state-dir", str(self._folder / COORDINATOR)]
        self._coordinator = Child(COORDINATOR, self._place.command(COORDINATOR, command), self._folder)
        self._started.append(self._coordinator)
        self._listen(COORDINATOR, self._coordinator)
        async with asyncio.timeout(TICKET_WITHIN):
            await self._ticket

    async def join(self, *, late: bool, stage: str = "auto") -> str:
        """One more peer. `late`: the swarm runs already, so that the time it takes to take part is of interest."""
        self._number += 1
        name = peer_name(self._number)
        command = [*COMMAND, "join", await self._current_ticket(), "--stage", stage, "--max-stages", "1", "--json"]
        command += ["--device", "cpu", "--host", self._place.address(name), "--threads", "1"]
        command += ["--state-dir", str(self._folder / name)]
        self._peers[name] = Child(name, self._place.command(name, command), self._folder)
        self._started.append(self._peers[name])
        self._listen(name, self._peers[name])
        if late:
            self.journal.joined[name] = time.monotonic()
        return name

    async def _current_ticket(self) -> str:
        """The coordinator's; when that is gone, what `resbm-node ticket` prints on a machine that takes part."""
        if self._coordinator is not None:
            return await self._ticket
        kept = (invitation.read(self._folder / name) for name in self.serving)
        return next(filter(None, kept), await self._ticket)

    async def until_measured(self, name: str) -> None:
        """Until the peer has measured its machine: of several that do so at once, each finds it slow."""
        async with asyncio.timeout(MEASURED_WITHIN):
            while name not in self._measured:  # noqa: ASYNC110 - told by another process
                await asyncio.sleep(0.1)

    def end_coordinator(self) -> None:
        """SIGKILL, and it never comes back."""
        if self._coordinator is not None:
            kill_tree(self._coordinator.process.pid)
            self._coordinator = None

    @property
    def serving(self) -> Mapping[str, int]:
        """Stage by peer, of those that are level with their stage, neither stopped nor cut off."""
        away = self._stopped.keys() | self._cut
        here = {n: s for n, s in self._stage.items() if n in self._peers and n not in away}
        return {name: stage for name, stage in here.items() if self.journal.is_level(name, stage)}

    @property
    def num_running(self) -> int:
        """Peers that have not ended."""
        return sum(child.process.poll() is None for child in self._started if child is not self._coordinator)

    @property
    def pids(self) -> Mapping[str, int]:
        """First process by peer, of those that run."""
        return {n: child.process.pid for n, child in self._peers.items() if n not in self._stopped}

    async def close(self) -> None:
        """Everybody leaves; nothing of them is left."""
        for name in [*self._stopped, *self._cut]:
            self.go_on(name)
        for child in self._started:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + LEAVING
        while time.monotonic() < deadline and _any_lives(self._started):  # noqa: ASYNC110 - processes have no events
            await asyncio.sleep(0.05)
        for child in self._started:
            kill_tree(child.process.pid)
        await asyncio.gather(*self._listeners, return_exceptions=True)

    # -- blows --------------------------------------------------------------------------------------------------

    def strike(self, blow: Blow, name: str) -> None:
        """It happens to this peer, to all of its processes at once."""
        self.journal.struck.append(Struck(time.monotonic(), blow, name, self._stage[name], self.num_running))
        child = self._peers[name]
        if blow is Blow.KILL:
            del self._peers[name]
            kill_tree(child.process.pid)
            return
        if blow is Blow.CUT:
            self._link(name, "down")
            self._cut.add(name)
            return
        root = psutil.Process(child.process.pid)
        processes = [root, *root.children(recursive=True)]
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        self._stopped[name] = processes

    def go_on(self, name: str) -> None:
        """A stopped peer runs again, a cut one has its network back."""
        if name in self._cut:
            self._cut.discard(name)
            self._link(name, "up")
        for process in self._stopped.pop(name, []):
            if process.is_running():
                process.send_signal(signal.SIGCONT)

    def is_needed(self, name: str) -> bool:
        """Whether nobody else serves its stage."""
        stage = self._stage.get(name)
        return stage is not None and not any(other != name and at == stage for other, at in self.serving.items())

    def ask_to_leave(self, name: str) -> None:
        """As a person does with Ctrl+C: it drains. Nothing happens to one that is struck or gone."""
        if name in self._peers and name not in self._stopped and name not in self._cut:
            self._peers.pop(name).process.terminate()

    def _link(self, name: str, state: str) -> None:
        if not isinstance(self._place, NamespaceLab):
            raise ValueError("links can be cut in network namespaces only")
        self._place.tools(name).run(f"ip link set {INTERFACE} {state}")

    # -- what they tell -----------------------------------------------------------------------------------------

    def _listen(self, name: str, child: Child) -> None:
        task = asyncio.create_task(child.listen(lambda event: self._observe(name, event)))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    def _observe(self, name: str, event: Event) -> None:
        match event:
            case TicketPrinted() if not self._ticket.done():
                self._ticket.set_result(event.ticket)
            case Check(name="speed"):
                self._measured.add(name)
            case Assigned():
                self._measured.add(name)
                self._stage[name] = event.stage
            case Moving():
                self._stage.pop(name, None)  # the stage is as good as without it
            case StageStep():
                self.journal.committed(name, event.stage, event.step, event.loss, time.monotonic())
            case Evaluation():
                self.journal.evaluations.setdefault(event.step, event.loss)
            case Worker():
                self.journal.restarts += event.state == "restarting"
                if event.state != "started":
                    self._stage.pop(name, None)  # it serves nothing until its next worker has a place


def _any_lives(children: Sequence[Child]) -> bool:
    return any(child.process.poll() is None for child in children)
