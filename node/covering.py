"""Serving further stages while machines are fewer than stages: asking for one more worker, and leaving as one.

The first worker of a machine looks at the directory and asks its supervisor for workers (`Covering`); each of those is
a peer of its own, and leaves by itself when it is not needed any more (`until_relieved`). Decided in
coordinator/coverage.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from coordinator import coverage
from coordinator.coverage import Gaps, Policy, plan_cover, relief_of
from coordinator.directory import DirectorySnapshot, PeerEntry
from coordinator.errors import DirectoryLost
from coordinator.swarm import RECENT
from node.events import Beside, Cover, Coverage, Event
from node.swarm_view import pause, unserved

log = logging.getLogger(__name__)

LOOK = timedelta(seconds=2)
ASK_AGAIN = timedelta(seconds=30)
"""A worker that was asked for is not in the directory before it has started."""


class Directory(Protocol):
    """What is needed of a swarm."""

    async def snapshot(self, run_id: str, num_stages: int, max_age: timedelta) -> DirectorySnapshot: ...


class Replicas(Protocol):
    """What is needed of a replica group."""

    @property
    def serving(self) -> bool: ...

    def level(self) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine would serve."""

    also: tuple[int, ...] = ()
    """Stages that a person asked for beside the first, as far as there is memory for them."""
    stands_in: bool = False
    """Whether it takes stages that nobody serves; how many at most, its entry says."""


class Covering:
    """The first worker's part."""

    def __init__(
        self,
        swarm: Directory,
        entry: PeerEntry,
        num_stages: int,
        *,
        room: Room,
        tell: Callable[[Event], None],
        policy: Policy | None = None,
    ) -> None:
        """`entry`: of the first worker. `tell`: the supervisor."""
        self._swarm, self._entry, self._num_stages, self._room, self._tell = swarm, entry, num_stages, room, tell
        self._policy = policy or Policy()
        self._gaps = Gaps()
        self._unserved: tuple[int, ...] | None = None
        self._asked_at: dict[int, float] = {}  # by stage, Unix time in seconds

    async def run(self) -> None:
        """Looks now and then, for ever."""
        while True:
            try:
                snapshot = await self._swarm.snapshot(self._entry.run_id, self._num_stages, RECENT)
                self.look(snapshot, time.time())
            except DirectoryLost as error:
                log.warning("not looked whether stages are empty: %s", error)
            await asyncio.sleep(LOOK.total_seconds())

    def look(self, snapshot: DirectorySnapshot, now: float) -> None:
        """Says what has changed, and asks for workers. `now`: Unix time in seconds."""
        self._say_coverage(snapshot)
        me = self._entry.peer_id
        own = {entry.stage for entry in snapshot.all_peers() if entry.node == me and entry.is_live(now)}
        for stage in self._room.also:
            if stage not in own:
                self._ask(coverage.Cover(stage, me), "asked for", now)
        self._gaps = self._gaps.after(snapshot, now=now)
        if self._room.stands_in:
            for cover in plan_cover(snapshot, self._gaps, self._policy, now=now):
                if cover.node == me:
                    self._ask(cover, "a busier machine serves it" if cover.claimed_at else "nobody serves it", now)

    def _say_coverage(self, snapshot: DirectorySnapshot) -> None:
        now_unserved = unserved(snapshot)
        if now_unserved != self._unserved:
            self._tell(Coverage(unserved=now_unserved, detail=pause(snapshot)))
        self._unserved = now_unserved

    def _ask(self, cover: coverage.Cover, reason: str, now: float) -> None:
        if now - self._asked_at.get(cover.stage, 0.0) < ASK_AGAIN.total_seconds():
            return
        self._asked_at[cover.stage] = now
        beside = Beside(
            node_id=self._entry.peer_id,
            throughput=self._entry.throughput,
            stand_in=cover.stage not in self._room.also,
            claimed_at=cover.claimed_at,
            bootstrap=self._entry.bootstrap,
        )
        self._tell(Cover(stage=cover.stage, reason=reason, beside=beside))


async def until_relieved(
    swarm: Directory, entry: PeerEntry, num_stages: int, replicas: Replicas, policy: Policy | None = None
) -> str:
    """A stand-in's part: waits, for ever if need be, until somebody else serves its stage. Returns their peer id."""
    policy = policy or Policy()
    relief, since = "", 0.0
    while True:
        await asyncio.sleep(LOOK.total_seconds())
        try:
            snapshot = await swarm.snapshot(entry.run_id, num_stages, RECENT)
        except DirectoryLost as error:
            log.warning("not looked whether this peer may leave: %s", error)
            continue
        now = time.monotonic()
        found = relief_of(snapshot, entry.peer_id, replicas.level() if replicas.serving else None, now=time.time())
        if found is None or found.peer_id != relief:
            relief, since = found.peer_id if found else "", now
        elif now - since >= policy.sure.total_seconds():
            return relief


def policy_of(cover_after_seconds: float) -> Policy:
    """The usual one, with a person's own patience."""
    return replace(Policy(), grace=timedelta(seconds=cover_after_seconds))
