"""Serving another stage when the swarm needs this machine more there: decided, claimed, looked at again, then moved.

A move is a drain and a restart: the peer stays for the step it is in, leaves, and its next worker settles at the new
stage and takes over a state there. Until the claim at the new stage has been seen by all, nothing has happened.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.assignment import MachineProfile
from coordinator.directory import RESERVED, DirectorySnapshot, PeerEntry
from coordinator.epochs import epoch_of, fallback_step
from coordinator.errors import DirectoryLost
from coordinator.placement import StageCosts
from coordinator.rebalancing import Move, Policy, decide_move, is_move_right, next_look, plan_moves
from coordinator.settlement import SETTLE_JITTER, SETTLE_WAIT
from coordinator.swarm import RECENT, Swarm
from node.presence import Presence
from node.replication.group import ReplicaGroup

log = logging.getLogger(__name__)

PLACE_FILE = "place.json"


class MovedAway(Exception):
    """This peer has left its stage for another one: its worker is to be started again."""


@dataclass(frozen=True, slots=True)
class LastMove:
    """Where a peer went, and when."""

    stage: int
    at: float  # Unix time in seconds


def remember_move(folder: Path, move: LastMove) -> None:
    """Written before the peer leaves, so that its next worker knows where to go. `folder`: the run's."""
    (folder / PLACE_FILE).write_text(json.dumps({"stage": move.stage, "at": move.at}))


def recall_move(folder: Path) -> LastMove | None:
    """None for a peer that has not moved, or whose note cannot be read."""
    try:
        note = json.loads((folder / PLACE_FILE).read_text())
        return LastMove(int(note["stage"]), float(note["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Mover:
    """Looks now and then whether this peer should move."""

    def __init__(
        self,
        *,
        swarm: Swarm,
        presence: Presence,
        group: ReplicaGroup,
        entry: PeerEntry,
        machine: MachineProfile,
        folder: Path,
        policy: Policy | None = None,
    ) -> None:
        """`folder`: the run's, in the state folder."""
        self._swarm, self._presence, self._group, self._entry = swarm, presence, group, entry
        self._machine, self._folder, self._policy = machine, folder, policy or Policy()
        self._num_stages = len(machine.fits)
        self._costs = StageCosts.alike(self._num_stages)
        self._chance = random.Random()

    async def wanted(self) -> Move:
        """Waits, for ever if need be, until this peer has claimed a place where it is needed more."""
        while True:
            await asyncio.sleep(next_look(self._policy, self._chance).total_seconds())
            if not self._can_be_spared(since=0.0):
                continue
            try:
                move = await self._decide()
                if move is not None and await self._claim(move):
                    return move
            except DirectoryLost as error:
                log.warning("no move: %s", error)

    def _can_be_spared(self, *, since: float) -> bool:
        """Whether another replica has all that this one has, by its own word, and has been heard since then.

        The directory knows that of nobody: who is asleep, or cut off, is in it for as long as its entry lives.
        `since`: monotonic seconds.
        """
        return self._group.serving and bool(self._group.level(since=since))

    async def _decide(self) -> Move | None:
        snapshot = await self._swarm.snapshot(self._entry.run_id, self._num_stages, RECENT)
        if self._is_needed_to_go_back(snapshot):
            return None
        now = time.time()
        plan = plan_moves(snapshot, self._costs, self._policy, now=now)
        last = recall_move(self._folder)
        moved_at = -math.inf if last is None else last.at
        return decide_move(plan, snapshot, self._machine, self._costs, self._policy, now=now, last_moved_at=moved_at)

    def _is_needed_to_go_back(self, snapshot: DirectorySnapshot) -> bool:
        """Whether the run, should a stage be lost, would have to go back further without this peer.

        Who has come lately has the newest state alone; older ones, which all stages have, go with those who leave.
        """
        me = next((entry for entry in snapshot.all_peers() if entry.peer_id == self._entry.peer_id), self._entry)
        epoch = epoch_of(me)
        without = snapshot.where(lambda entry: entry.peer_id != me.peer_id)
        return fallback_step(without, epoch) < fallback_step(snapshot, epoch)

    async def _claim(self, move: Move) -> bool:
        """Reserves the place, waits until others see it, and looks again."""
        claim = replace(
            self._entry, stage=move.target, state=RESERVED, reserved_at=time.time(),
            throughput=self._machine.rates[move.target],
        )  # fmt: skip
        self._presence.beside = move.target
        claimed_at = time.monotonic()
        await self._swarm.publish_beside(claim)
        jitter = self._chance.uniform(0, SETTLE_JITTER.total_seconds())
        await asyncio.sleep(SETTLE_WAIT.total_seconds() + jitter)
        snapshot = await self._swarm.snapshot(self._entry.run_id, self._num_stages)
        right = is_move_right(move, snapshot, self._machine, self._costs, self._policy, now=time.time())
        if right and self._can_be_spared(since=claimed_at):
            remember_move(self._folder, LastMove(move.target, time.time()))
            return True
        self._presence.beside = None
        await self._swarm.release(self._entry.run_id, move.target)
        return False
