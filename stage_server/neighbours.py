"""The links of one peer to its neighbours: dialled, served, reopened, and every frame put on the right one.

Where each stage is served by one peer there is one link a side, and whoever opens a newer one takes its place. Where
stages are shared there is a link to each peer of the next stage that is known, and from each of the stage before.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

from resbm_pb import stage_pb2

from stage_server.concurrency import cancelled
from stage_server.errors import FrameError, LinkLost, ProtocolViolation, RewindNeeded, StateLost
from stage_server.ids import MicrobatchId, MicrobatchKind
from stage_server.ledger import StageLedger
from stage_server.links import Dialer, Frame, FrameStream, GoodbyeReason, LinkIdentity, LinkSession
from stage_server.next_peer import ServiceTimes, choose_next
from stage_server.reports import LinkReport
from stage_server.totals import Totals
from stage_server.work import SOLE, Declined, Forwarded, Outbound, Side

REDIAL_FIRST = timedelta(milliseconds=50)
REDIAL_LONGEST = timedelta(seconds=2)
GOODBYE_LIMIT = timedelta(seconds=2)
OVERDUE = timedelta(seconds=30)
"""For each stage beyond: who owes answers for so long and has given none is asked for nothing while others can be."""
AVOIDED = timedelta(minutes=1)
_WATCH = timedelta(seconds=0.5)


class NeighbourHost(Protocol):
    """What the links ask of the peer they belong to."""

    identity: LinkIdentity
    ledger: StageLedger
    totals: Totals

    def link_opened(self, side: Side, committed: int, held: Sequence[MicrobatchId]) -> None:
        """A neighbour has said where it stands."""

    def frame_received(self, side: Side, frame: Frame, peer: str) -> None:
        """Latents or gradients came in. Raises FrameError to refuse them and end the link."""

    def woken(self) -> None:
        """Something may have become possible."""

    def told(self, report: LinkReport) -> None:
        """A link opened, closed, or is about to."""


class Neighbours:
    """See the module's text. All methods on one event loop."""

    def __init__(self, host: NeighbourHost, dialer: Dialer) -> None:
        self._host = host
        self._ledger = host.ledger
        self._dialer = dialer
        self._sessions: dict[tuple[Side, str], LinkSession] = {}
        self._hops: dict[str, str] = {}  # endpoint by peer
        self._hops_changed = asyncio.Event()
        self._services = ServiceTimes()
        self._avoided: dict[str, float] = {}  # until when, monotonic seconds, by peer
        self._last: str | None = None
        self._chance = random.Random()

    # -- what is so ---------------------------------------------------------------------------------------------

    @property
    def links_open(self) -> dict[Side, bool]:
        """By side, whether there is any link."""
        return {side: any(known is side for known, _ in self._sessions) for side in Side}

    def linked(self, side: Side) -> frozenset[str]:
        """The peers of that side to whom there is a link."""
        return frozenset(peer for known, peer in self._sessions if known is side)

    @property
    def next_hops(self) -> Mapping[str, str]:
        """Where the peers of the next stage are dialled, by peer."""
        return self._hops

    # -- hops ---------------------------------------------------------------------------------------------------

    def set_next_hops(self, hops: Mapping[str, str]) -> None:
        """The peers of the next stage, and where each is to be dialled from now on."""
        if hops != self._hops:
            self._hops = dict(hops)
            self._hops_changed.set()

    async def keep_downstream(self) -> None:
        """Keeps a link to every peer of the next stage, for ever. Raises what ends this peer."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                self._hops_changed.clear()
                for peer in self._hops.keys() - tasks.keys():
                    tasks[peer] = asyncio.create_task(self._keep(peer))
                for peer in tasks.keys() - self._hops.keys():
                    await cancelled(tasks.pop(peer))
                    self._services.forget(peer)
                    self._leave(peer)
                self._leave_silent()
                woken = asyncio.create_task(self._hops_changed.wait())
                try:
                    timeout = _WATCH.total_seconds() if self._ledger.shared else None
                    await asyncio.wait({woken, *tasks.values()}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await cancelled(woken)
                for task in [task for task in tasks.values() if task.done()]:
                    task.result()
        finally:
            await cancelled(*tasks.values())

    async def _keep(self, peer: str) -> None:
        pause = REDIAL_FIRST
        while (endpoint := self._hops.get(peer)) is not None:
            try:
                stream = await self._dialer.dial(endpoint)
                opened_at = time.monotonic()
                try:
                    await self.run_session(stream, Side.DOWNSTREAM, peer)
                finally:
                    if time.monotonic() - opened_at > REDIAL_LONGEST.total_seconds():
                        pause = REDIAL_FIRST
            except (LinkLost, FrameError):
                await asyncio.sleep(pause.total_seconds() * random.uniform(0.7, 1.3))
                pause = min(2 * pause, REDIAL_LONGEST)

    def _leave_silent(self) -> None:
        """Who has not spoken or answered for long, or has no link, is left as soon as somebody else can be asked."""
        if not self._ledger.shared:
            return
        now = time.monotonic()
        # What stands still in a stage beyond keeps all before it waiting: who is nearest to it finds out first.
        patience = OVERDUE.total_seconds() * (self._ledger.num_stages - 1 - self._ledger.stage)
        overdue = self._services.overdue(self._ledger.outstanding(), now, patience)
        self._avoided = {peer: until for peer, until in self._avoided.items() if until > now}
        self._avoided |= dict.fromkeys(overdue, now + AVOIDED.total_seconds())
        if answering := self._answering():
            for peer in self._ledger.routes.addressees() - answering:
                self._leave(peer)

    def _answering(self) -> set[str]:
        """Peers of the next stage that are linked, speak, and answer; where none is, those that speak."""
        speaking = {
            peer
            for (side, peer), session in self._sessions.items()
            if side is Side.DOWNSTREAM and not session.is_suspect
        }
        return (speaking - self._avoided.keys()) or speaking

    def _leave(self, peer: str) -> None:
        self._ledger.routes.leave(peer)
        self.send_orphans()

    # -- sessions -----------------------------------------------------------------------------------------------

    async def serve(self, stream: FrameStream) -> None:
        """Runs a link that an upstream peer has opened, until it ends. Raises RewindNeeded alone."""
        try:
            await self.run_session(stream, Side.UPSTREAM)
        except RewindNeeded:
            raise
        except (LinkLost, FrameError, StateLost):
            return  # reported by run_session; anybody can dial, so no caller's word ends this peer

    async def run_session(self, stream: FrameStream, side: Side, peer: str = SOLE) -> None:
        """One link's life. `peer`: who is expected at the other end; on the upstream side it says so itself."""
        end = _LinkEnd(self, self._host, side, peer if self._ledger.shared else SOLE)
        session = end.session = LinkSession(stream, side, end)
        detail = "closed"
        try:
            await session.run()
        except FrameError as error:
            self._host.totals.frames_refused += 1
            detail = str(error)
            raise
        except LinkLost as error:
            detail = error.cause
            raise
        finally:
            if self._sessions.get((side, end.peer)) is session:
                del self._sessions[side, end.peer]
                self._ledger.closed(side, end.peer)
                self._leave_silent()
                self.report()
                self._host.told(LinkReport(side, open=False, detail=detail))

    def opened(self, end: _LinkEnd, told: LinkIdentity, committed: int, held: Iterable[MicrobatchId]) -> list[Outbound]:
        """The handshake of a session is done: it takes the place of an older one with the same peer."""
        if self._ledger.shared:
            if end.side is Side.DOWNSTREAM and end.peer != told.peer_id:
                raise ProtocolViolation(f"peer {told.peer_id} answers where {end.peer} was dialled")
            end.peer = told.peer_id
        held, key = list(held), (end.side, end.peer)
        backlog: list[Outbound] = [*self._ledger.opened(end.side, committed, held, end.peer)]
        self._host.link_opened(end.side, committed, held)
        before = self._sessions.get(key)
        self._sessions[key] = end.session
        if before is not None:
            before.supersede()
        detail = f"{told.peer_id}, {len(backlog)} microbatches to send again"
        self._host.told(LinkReport(end.side, open=True, detail=detail))
        asyncio.get_running_loop().call_soon(self.send_orphans)
        self._host.woken()
        return backlog

    def report(self) -> None:
        """Tells every neighbour soon how this stage stands."""
        for session in self._sessions.values():
            session.report()

    def report_to(self, side: Side) -> None:
        """Tells the neighbours of one side."""
        for (known, _), session in self._sessions.items():
            if known is side:
                session.report()

    async def say_goodbye(self, reason: GoodbyeReason) -> None:
        """To all neighbours, after everything that is on its way to them."""
        sessions = list(self._sessions.values())
        await asyncio.gather(*(session.say_goodbye(reason, GOODBYE_LIMIT) for session in sessions))

    # -- sending ------------------------------------------------------------------------------------------------

    def send(self, items: Iterable[Outbound], only: str | None = None) -> None:
        """Puts each item on the link of whoever needs it; `only` of those who asked, where one asked just now."""
        for item in items:
            if isinstance(item, Forwarded):
                self._send_down(item)
                continue
            for peer in self._ledger.routes.askers(item.name) if only is None else (only,):
                session = self._sessions.get((Side.UPSTREAM, peer))
                if session and (isinstance(item, Declined) or self._ledger.wants(Side.UPSTREAM, item.name, peer)):
                    session.send(item)

    def send_orphans(self) -> None:
        """Finds an addressee for what has none."""
        if self._ledger.shared and self._answering():
            self.send(self._ledger.orphans())

    def _send_down(self, item: Forwarded) -> None:
        name = item.name
        peer = self._ledger.routes.to(name)
        if peer is None:
            candidates = [peer for peer in self._answering() if self._ledger.routes.may_ask(name, peer)]
            peer = choose_next(candidates, self._ledger.outstanding(), self._services.seconds, self._last, self._chance)
            if peer is None:
                return  # an orphan, until somebody is there
            self._ledger.routes.send_to(name, peer)
            self._last = peer
        session = self._sessions.get((Side.DOWNSTREAM, peer))
        if session and self._ledger.wants(Side.DOWNSTREAM, name, peer):
            session.send(item)
            if self._ledger.shared and name.kind is MicrobatchKind.TRAIN:
                others = self._ledger.outstanding().get(peer, 1) - 1
                self._services.sent(name, peer, time.monotonic(), max(0, others))

    def answered(self, name: MicrobatchId, peer: str) -> None:
        """A peer of the next stage has answered."""
        self._avoided.pop(peer, None)
        self._services.returned(name, peer, time.monotonic())

    def step_ended(self, step: int) -> None:
        """The step is committed."""
        self._services.forget_before(step)


class _LinkEnd:
    """What one session sees of this peer: it knows whom it speaks with. Implements LinkHost."""

    session: LinkSession

    def __init__(self, neighbours: Neighbours, host: NeighbourHost, side: Side, peer: str) -> None:
        self._neighbours, self._host, self._ledger = neighbours, host, host.ledger
        self.identity, self.side, self.peer = host.identity, side, peer

    def holdings(self) -> tuple[int, list[MicrobatchId]]:
        return self._ledger.committed, self._ledger.holdings(self.side, self.peer)

    def link_opened(self, peer: LinkIdentity, committed: int, held: Iterable[MicrobatchId]) -> list[Outbound]:
        return self._neighbours.opened(self, peer, committed, held)

    def link_received(self, frame: Frame) -> None:
        self._host.frame_received(self.side, frame, self.peer)

    def link_status(self) -> tuple[int, int | None, int]:
        return *self._ledger.status(self.side), self._ledger.settled(self.side)

    def link_received_status(self, committed: int, durable: int | None, settled: int) -> None:
        if self._ledger.receive_status(self.side, committed, durable, self.peer, settled=settled):
            self._neighbours.report_to(self.side.other)
        self._neighbours.send_orphans()
        self._host.woken()

    def link_declined(self, names: Iterable[MicrobatchId]) -> None:
        for name in names:
            self._ledger.routes.declined(name, self.peer)
        self._neighbours.send_orphans()

    def link_goodbye(self, reason: GoodbyeReason) -> None:
        self._host.told(LinkReport(self.side, open=True, detail=f"leaves: {stage_pb2.Goodbye.Reason.Name(reason)}"))

    def count_sent(self, num_bytes: int, items: Sequence[Outbound]) -> None:
        totals = self._host.totals
        totals.sent_bytes[self.side] += num_bytes
        now = time.monotonic()
        for item in items:
            if self.side is Side.DOWNSTREAM and item.name.kind is MicrobatchKind.TRAIN:
                totals.hops.sent(item.name, now)

    def count_received(self, num_bytes: int) -> None:
        self._host.totals.received_bytes[self.side] += num_bytes
