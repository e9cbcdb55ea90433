"""A serving peer's place in the directory: its entry kept fresh, its next hop kept known, its leave taken."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from coordinator.assignment import resolve_reservation
from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry
from coordinator.errors import DirectoryLost, StageUnavailable
from coordinator.routing import choose_next_hop
from coordinator.swarm import PEER_RENEWAL, Swarm
from node.acquaintances import remember
from node.reporting import EventReporter
from node.swarm_view import SwarmView, contribution
from node.tcp_links import LinkWatch
from stage_server.ledger import Side
from stage_server.peer import StagePeer

log = logging.getLogger(__name__)

SEEKING = timedelta(milliseconds=400)  # between looks at the directory while the downstream link is missing
WATCHING = timedelta(seconds=3)  # between looks while it is there
_UNMEASURED: Mapping[str, float] = {}


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
    ) -> None:
        """`entry`: the peer's place as settled; its changing fields are filled in."""
        self._state_folder = state_folder
        self._swarm = swarm
        self._entry = entry
        self._peer = peer
        self._reporter = reporter
        self._links = links
        self._current: str | None = None  # peer id of the next hop

    async def announce(self) -> None:
        """Publishes the entry as it is now. Raises DirectoryLost."""
        ledger = self._peer.ledger
        link = self._links.newest.get(Side.DOWNSTREAM)
        fresh = replace(
            self._entry,
            state=COMPLETE if self._reporter.complete else SERVING,
            committed_step=ledger.committed,
            durable_step=ledger.durable,
            queue_depth=ledger.queue_depth,
            round_trip_seconds=link.round_trip_seconds if link else 0.0,
            link_bytes_per_second=link.bytes_per_second if link else 0.0,
            **asdict(self._reporter.figures()),
        )
        await self._swarm.publish_peer(fresh)

    async def keep(self) -> None:
        """Renews the entry for ever, at once when its state changes. Raises DirectoryLost when the directory died."""
        while True:
            try:
                async with asyncio.timeout(PEER_RENEWAL.total_seconds()):
                    await self._reporter.state_changed.wait()
                    self._reporter.state_changed.clear()
            except TimeoutError:
                pass
            await self._unless_dead(self.announce)

    async def follow(self) -> None:
        """Keeps the swarm and the peer's next hop known for ever.

        Raises:
            DirectoryLost: the directory died.
            StageUnavailable: another peer holds this stage by right.
        """
        while True:
            await self._unless_dead(self._look)
            linked = self._peer.neighbours.links_open[Side.DOWNSTREAM] or self._peer.ledger.is_last
            await asyncio.sleep((WATCHING if linked else SEEKING).total_seconds())

    async def leave(self) -> None:
        """Takes the entry out, so that nobody waits for this peer. Where the directory died, it expires by itself."""
        try:
            await self._swarm.withdraw_peer()
        except DirectoryLost as error:
            log.warning("the entry stays until it expires: %s", error)

    async def _look(self) -> None:
        ledger, linked = self._peer.ledger, self._peer.neighbours.links_open[Side.DOWNSTREAM]
        snapshot = await self._swarm.snapshot(self._entry.run_id, ledger.num_stages)
        remember(
            self._state_folder,
            (a for e in snapshot.all_peers() if e.peer_id != self._entry.peer_id for a in e.bootstrap),
        )
        metrics = self._reporter.metrics
        metrics.set_swarm(SwarmView.of(snapshot), contribution(snapshot, self._entry.peer_id))
        self._check_claim(snapshot)
        current = self._current if linked else None  # a hop that has just failed is chosen anew
        if ledger.is_last:
            return
        hop = choose_next_hop(snapshot, self._entry.stage + 1, current, _UNMEASURED, random.Random(), now=time.time())
        if hop is not None:
            self._current = hop.peer_id
            self._peer.set_next_hop(hop.endpoints[0])

    def _check_claim(self, snapshot: DirectorySnapshot) -> None:
        """Two peers that claimed one stage within a slow directory's blind moment: the later claim gives way."""
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
