"""A serving peer's place in the directory: its entry kept fresh, its next hop kept known, its leave taken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from resbm_pb import records_pb2

from coordinator.assignment import resolve_reservation
from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import Epoch, epoch_of
from coordinator.errors import DirectoryLost, StageUnavailable
from coordinator.routing import choose_next_hop, choose_next_hops
from coordinator.swarm import PEER_RENEWAL, Swarm
from coordinator.ticket import Ticket
from node import invitation
from node.acquaintances import remember, ways_in
from node.custody import Custodian
from node.epochs import EpochWatch
from node.replication.group import ReplicaGroup
from node.reporting import EventReporter
from node.service_rate import ServiceRate
from node.swarm_view import SwarmView, contribution
from node.tcp_links import LinkWatch
from stage_server.concurrency import cancelled
from stage_server.peer import StagePeer
from stage_server.totals import Result
from stage_server.work import Side

log = logging.getLogger(__name__)

SEEKING = timedelta(milliseconds=400)  # between looks at the directory while the downstream link is missing
WATCHING = timedelta(seconds=3)  # between looks while it is there
CALLING_FIRST = timedelta(seconds=5)  # between calls to peers met before, while nobody is to be seen; longer each time
CALLING_LAST = timedelta(minutes=1)
TRYING = timedelta(seconds=30)  # for a peer of the next stage to be reached, before another may have its place
_UNMEASURED: Mapping[str, float] = {}


@contextlib.asynccontextmanager
async def claiming(swarm: Swarm, entry: PeerEntry) -> AsyncIterator[None]:
    """Keeps a claim alive while something takes longer than it would live."""
    renewing = asyncio.create_task(_renew(swarm, entry))
    try:
        yield
    finally:
        await cancelled(renewing)


async def _renew(swarm: Swarm, entry: PeerEntry) -> None:
    while True:
        await asyncio.sleep(PEER_RENEWAL.total_seconds())
        try:
            await swarm.publish_peer(entry)
        except DirectoryLost as error:
            log.warning("the claim is not renewed: %s", error)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a peer has besides where stages are shared."""

    group: ReplicaGroup
    epochs: EpochWatch
    custodian: Custodian
    checkpoints: Callable[[], tuple[int, ...]]
    """Steps of those that the directory is told of."""


class Presence:
    """Tells the swarm of one peer, and the peer of the swarm."""

    def __init__(
        self,
        swarm: Swarm,
        entry: PeerEntry,
        peer: StagePeer,
        reporter: EventReporter,
        *,
        links: LinkWatch,
        state_folder: Path,
        ticket: Ticket,
        shared: Shared | None = None,
    ) -> None:
        """`entry`: the peer's place as settled; its changing fields are filled in."""
        self._state_folder, self._ticket = state_folder, ticket
        self._swarm = swarm
        self._entry = entry
        self._peer = peer
        self._reporter = reporter
        self._links = links
        self._rate = ServiceRate(entry.throughput)
        self._shared = shared
        self._current: str | None = None  # peer id of the next hop
        self._tried_since: dict[str, float] = {}  # monotonic seconds, by peer of the next stage that is to be dialled
        self._call_at = 0.0  # monotonic seconds
        self._call_pause = CALLING_FIRST
        self._state_changed = asyncio.Event()  # since the directory was looked at
        self.beside: int | None = None
        """A stage that this peer has claimed too, because it is about to move there."""

    @property
    def run_id(self) -> str:
        """The run that the peer takes part in."""
        return self._entry.run_id

    async def announce(self) -> None:
        """Publishes the entry as it is now. Raises DirectoryLost."""
        ledger = self._peer.ledger
        link = self._links.newest.get(Side.DOWNSTREAM)
        fresh = replace(
            self._entry,
            state=self._state(),
            throughput=self._throughput(),
            committed_step=ledger.committed,
            durable_step=ledger.durable,
            queue_depth=ledger.queue_depth,
            round_trip_seconds=link.round_trip_seconds if link else 0.0,
            link_bytes_per_second=link.bytes_per_second if link else 0.0,
            **asdict(self._reporter.figures()),
        )
        await self._swarm.publish_peer(self._with_states(fresh), beside=self.beside)

    def _with_states(self, entry: PeerEntry) -> PeerEntry:
        """And where the run could go back to, as far as it is up to this peer."""
        if self._shared is None:
            return entry
        epoch, kept = self._shared.epochs.epoch, self._shared.custodian.kept
        return replace(
            entry,
            epoch=epoch.number,
            epoch_step=epoch.step,
            checkpoints=self._shared.checkpoints(),
            copied_stage=kept[0] if kept else None,
            copied_step=kept[1] if kept else 0,
        )

    def _throughput(self) -> float:
        """Where peers share stages their rates decide who does how much, so they are followed."""
        if self._shared is None:
            return self._entry.throughput
        totals = self._peer.totals
        rate = self._rate.follow(totals.microbatches[Result.TRAINED], totals.compute_seconds)
        self._shared.group.throughput = rate
        return rate

    def _state(self) -> records_pb2.PeerState.ValueType:
        if self._peer.draining and not self._reporter.complete:
            return DRAINING
        if self._shared is not None and not self._shared.group.serving:
            return RESERVED  # it takes over another replica's state
        return COMPLETE if self._reporter.complete else SERVING

    async def keep(self) -> None:
        """Renews the entry for ever, at once when its state changes. Raises DirectoryLost when the directory died."""
        while True:
            try:
                async with asyncio.timeout(PEER_RENEWAL.total_seconds()):
                    await self._reporter.state_changed.wait()
                    self._reporter.state_changed.clear()
                    self._state_changed.set()
            except TimeoutError:
                pass
            await self._unless_dead(self.announce)

    async def follow(self) -> None:
        """Keeps the swarm and the peer's next hop known for ever.

        Raises:
            DirectoryLost: the directory died.
            StageUnavailable: another peer holds this stage by right.
            EpochBegins: the run goes back.
        """
        while True:
            await self._unless_dead(self._look)
            linked = self._peer.neighbours.links_open[Side.DOWNSTREAM] or self._peer.ledger.is_last
            seeks = not linked and (self._shared is None or self._shared.group.serving)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout((SEEKING if seeks else WATCHING).total_seconds()):
                    await self._state_changed.wait()
            self._state_changed.clear()

    async def leave(self, towards: Epoch | None = None) -> None:
        """Takes the entry out, so that nobody waits for this peer. Where the directory died, it expires by itself.

        Args:
            towards: the epoch that this peer starts again in: the entry stays and says so, for others to follow.
        """
        try:
            if towards is None:
                await self._swarm.withdraw_peer()
            else:
                number, step = towards.number, towards.step
                entry = replace(self._entry, state=RESERVED, epoch=number, epoch_step=step, committed_step=step)
                await self._swarm.publish_peer(entry)
        except DirectoryLost as error:
            log.warning("the entry stays until it expires: %s", error)

    async def _look(self) -> None:
        ledger, linked = self._peer.ledger, self._peer.neighbours.links_open[Side.DOWNSTREAM]
        snapshot = await self._swarm.snapshot(self._entry.run_id, ledger.num_stages)
        others = [entry for entry in snapshot.all_peers() if entry.peer_id != self._entry.peer_id]
        if others:
            self._call_pause = CALLING_FIRST
        elif time.monotonic() >= self._call_at:
            await self._call_others()
        remember(self._state_folder, (address for entry in others for address in entry.bootstrap))
        invitation.keep_fresh(self._state_folder, invitation.of_swarm(self._ticket, snapshot, self._entry.peer_id))
        metrics = self._reporter.metrics
        metrics.set_swarm(SwarmView.of(snapshot), contribution(snapshot, self._entry.peer_id))
        self._check_claim(snapshot)
        if self._shared is not None:
            self._shared.epochs.look(snapshot, serving=self._shared.group.serving)
            self._follow_all(snapshot, self._shared)
        elif not ledger.is_last:
            self._follow_one(snapshot, self._current if linked else None)  # a hop that has just failed is chosen anew

    async def _call_others(self) -> None:
        """Nobody is to be seen: either this peer is alone, or its directory has lost all others."""
        self._call_at = time.monotonic() + self._call_pause.total_seconds()
        self._call_pause = min(2 * self._call_pause, CALLING_LAST)
        addresses = ways_in(self._ticket.bootstrap, self._state_folder)
        answered = await self._swarm.call(addresses)
        log.debug("nobody else is to be seen: called %d addresses, %d answered", len(addresses), answered)

    def _follow_one(self, snapshot: DirectorySnapshot, current: str | None) -> None:
        hop = choose_next_hop(snapshot, self._entry.stage + 1, current, _UNMEASURED, random.Random(), now=time.time())
        if hop is not None:
            self._current = hop.peer_id
            self._peer.set_next_hop(hop.endpoints[0])

    def _follow_all(self, snapshot: DirectorySnapshot, shared: Shared) -> None:
        """Every peer of the next stage may be sent to, and every replica of this stage takes part: of this epoch."""
        me, stage, now, group = self._entry.peer_id, self._entry.stage, time.time(), shared.group
        snapshot = snapshot.where(lambda entry: epoch_of(entry) == shared.epochs.epoch)
        replicas = [entry for entry in snapshot.at(stage) if entry.peer_id != me and entry.is_live(now)]
        group.listed({entry.peer_id: entry.endpoints[0] for entry in replicas})
        neighbours = self._peer.neighbours
        # Who takes over a state has nothing to send yet, and would only keep others from dropping what they retain.
        if not self._peer.ledger.is_last and (group.serving or neighbours.next_hops):
            hops = choose_next_hops(snapshot, stage + 1, self._known_hops(), random.Random(), now=now)
            neighbours.set_next_hops({entry.peer_id: entry.endpoints[0] for entry in hops})

    def _known_hops(self) -> frozenset[str]:
        """Peers of the next stage that are linked, or have not been tried for long."""
        neighbours, now = self._peer.neighbours, time.monotonic()
        since = self._tried_since
        self._tried_since = {peer: since.get(peer, now) for peer in neighbours.next_hops}
        new = {peer for peer, at in self._tried_since.items() if now - at < TRYING.total_seconds()}
        return frozenset(neighbours.linked(Side.DOWNSTREAM) | new)

    def _check_claim(self, snapshot: DirectorySnapshot) -> None:
        """Two peers that claimed one stage within a slow directory's blind moment: the later claim gives way."""
        if self._shared is not None:
            return
        me, stage = self._entry.peer_id, self._entry.stage
        if snapshot.find(me) is not None and not resolve_reservation(snapshot, me, stage, now=time.time()):
            raise StageUnavailable(f"another peer has the earlier claim to stage {stage}")

    async def _unless_dead(self, operation: Callable[[], Awaitable[None]]) -> None:
        """One failed request is passed over, the next one follows; a dead directory is not."""
        try:
            await operation()
        except DirectoryLost as error:
            if not self._swarm.is_alive():
                raise
            log.warning("directory: %s", error)
