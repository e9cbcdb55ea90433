"""The swarm as a peer uses it: publish and find runs, publish and see peers, take a place.

swarm = Swarm.start(...)            in the main thread, before gRPC, CUDA and threads
run = await swarm.fetch_run(ticket, run_id_of)
place = await swarm.settle(...)
await swarm.publish_peer(entry)     every PEER_RENEWAL
async for snapshot in swarm.watch(run.run_id, run.num_stages): ...
await swarm.withdraw_peer()
swarm.close()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from google.protobuf.message import Message
from resbm_pb import records_pb2

from coordinator import identity, records
from coordinator.assignment import MachineProfile
from coordinator.dht import START_TIMEOUT, Directory, RequestListener, RequestStats
from coordinator.directory import RESERVED, DirectorySnapshot, PeerEntry, check_values, run_key, stage_key
from coordinator.errors import DirectoryLost, RecordError, RecordInvalid, RunNotFound
from coordinator.listening import Listen
from coordinator.reading import PublishedRun, opened_run, snapshot_of
from coordinator.settlement import Place, Rules, settle
from coordinator.ticket import Ticket, encode_ticket

log = logging.getLogger(__name__)

PEER_LIFETIME = timedelta(seconds=30)
PEER_RENEWAL = timedelta(seconds=10)
"""How often a peer must publish its entry to stay in the directory."""
RUN_LIFETIME = timedelta(hours=23)
"""How long a run is found after its coordinator's last word; any peer may hand the sealed record on until then."""
WATCH_PERIOD = timedelta(seconds=3)
RECENT = WATCH_PERIOD
"""Fresh enough for whoever looks now and then."""


class Swarm:
    """One peer's view of, and voice in, the swarm. Its methods are for one event loop at a time."""

    def __init__(self, directory: Directory, identity_seed: bytes) -> None:
        self._directory = directory
        self._seed = identity_seed
        self._public_key = identity.public_key_of(identity_seed)
        self._peer_id = identity.peer_id_of(self._public_key)
        self._expirations: dict[str, float] = {}
        self._own_keys: set[str] = set()
        self._newest: _Reading | None = None

    @classmethod
    def start(
        cls,
        *,
        identity_seed: bytes,
        listen_host: str,
        announce_host: str,
        port: int,
        bootstrap: Sequence[str],
        folder: Path,
        timeout: timedelta = START_TIMEOUT,
    ) -> Swarm:
        """Joins the swarm at the bootstrap addresses, or starts a new one when there are none. Blocks.

        Raises:
            TicketUnreachable, PortTaken, ClockSkew, DirectoryLost
        """
        directory = Directory.start(
            identity_seed=identity_seed,
            listen=Listen(listen_host, announce_host, port),
            bootstrap=bootstrap,
            folder=folder,
            timeout=timeout,
        )
        return cls(directory, identity_seed)

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def public_key(self) -> bytes:
        """Raw Ed25519 public key, 32 bytes."""
        return self._public_key

    @property
    def dht_request_seconds(self) -> Mapping[str, RequestStats]:
        """By kind of request to the directory ("store", "get", "call"): how many, how long, how many failed."""
        return self._directory.request_stats

    def on_dht_request(self, listener: RequestListener) -> None:
        """Who is told of each request to the directory from now on, on the event loop."""
        self._directory.on_request(listener)

    def addresses(self) -> list[str]:
        """Multiaddresses, with peer id, at which others can join through this peer."""
        return list(self._directory.addresses)

    def ticket(self, run_id: str, publisher: bytes | None = None) -> str:
        """A ticket for the run through this peer; `publisher` is this peer unless another's key is given."""
        return encode_ticket(run_id, self.addresses(), self._public_key if publisher is None else publisher)

    def is_alive(self) -> bool:
        """Whether the directory's processes run. Once False it stays so: leave and start the peer again."""
        return self._directory.is_alive()

    async def call(self, addresses: Collection[str]) -> int:
        """Looks for others at their multiaddresses, for one who sees nobody any more; how many answer.

        Raises:
            DirectoryLost
        """
        return await self._directory.call(addresses)

    def close(self) -> None:
        """Leaves the directory and stops its processes. Blocks up to seconds; safe to call twice."""
        self._directory.close()

    async def publish_run(
        self, *, config_toml: str, run_id: str, name: str, num_stages: int, created_at: float
    ) -> bytes:
        """Signs and publishes a run; returns the sealed record. Repeat it within RUN_LIFETIME to keep the run alive.

        Raises:
            RecordInvalid: the config is too long for the directory (64 KiB).
            DirectoryLost: the directory did not take it.
        """
        message = records_pb2.RunRecord(
            run_id=run_id, config_toml=config_toml, name=name, num_stages=num_stages, created_at=created_at
        )
        return await self._publish(message, records.RUN_DOMAIN, run_key(run_id), RUN_LIFETIME)

    async def republish_run(self, sealed: bytes) -> None:
        """Hands a run's record on unchanged, so that the run is found while its coordinator is away.

        Raises:
            RecordInvalid, RecordForged, RecordExpired: it is no valid run record.
            DirectoryLost
        """
        record = records.parse_envelope(sealed)
        if record.domain != records.RUN_DOMAIN:
            raise RecordInvalid(f"a {record.domain} record is no run")
        records.verify_envelope(record, now=time.time())
        # False here means that the nearest peers hold it already.
        publisher = identity.peer_id_of(record.public_key)
        await self._directory.store(record.key, publisher, sealed, expires_at=record.expiration)

    async def fetch_run(self, ticket: Ticket, run_id_of: Callable[[str], str]) -> PublishedRun:
        """Finds the ticket's run. `run_id_of` computes the run id of a config's text.

        Raises:
            RunNotFound: nobody knows it, or no record of it is the publisher's.
            DirectoryLost
        """
        key = run_key(ticket.run_id)
        found = (await self._directory.get([key])).get(key, {})
        sealed = found.get(identity.peer_id_of(ticket.publisher))
        if sealed is None:
            raise RunNotFound(f"run {ticket.run_id} is not published in this swarm")
        try:
            return opened_run(sealed, ticket, run_id_of, now=time.time())
        except RecordError as error:
            raise RunNotFound(f"run {ticket.run_id} is published, but not validly: {error.cause}") from error

    async def publish_peer(self, entry: PeerEntry, *, beside: int | None = None) -> None:
        """Publishes this peer's entry for the next PEER_LIFETIME. An older entry under another stage is withdrawn.

        Args:
            beside: a stage whose entry stays: the peer is about to move there.

        Raises:
            RecordInvalid: the entry holds values that every reader would refuse.
            DirectoryLost: the directory did not take it.
        """
        kept = {stage_key(entry.run_id, entry.stage)}
        if beside is not None:
            kept.add(stage_key(entry.run_id, beside))
        await self._withdraw(self._own_keys - kept)
        await self.publish_beside(entry)

    async def publish_beside(self, entry: PeerEntry) -> None:
        """As `publish_peer`, and entries under other stages stay: for a claim on the place that one moves to."""
        if entry.peer_id != self._peer_id:
            raise ValueError("a peer publishes itself only")
        record = entry.to_record()
        check_values(record, self._peer_id)
        key = stage_key(entry.run_id, entry.stage)
        self._own_keys.add(key)
        await self._publish(record, records.PEER_DOMAIN, key, PEER_LIFETIME)

    async def release(self, run_id: str, stage: int) -> None:
        """Takes this peer's entry under one stage out of the directory. Raises DirectoryLost."""
        await self._withdraw({stage_key(run_id, stage)})

    async def withdraw_peer(self) -> None:
        """Takes this peer's entry out of the directory at once. Does nothing when there is none.

        Raises:
            DirectoryLost
        """
        await self._withdraw(set(self._own_keys))

    async def snapshot(self, run_id: str, num_stages: int, max_age: timedelta = timedelta(0)) -> DirectorySnapshot:
        """The run's peers, read from the directory and checked.

        A search asks about every peer there is, and each answers: who need not know what has just changed takes what
        somebody else in this process has read within `max_age`.

        Raises:
            DirectoryLost
        """
        if self._newest is not None and self._newest.is_of(run_id, num_stages, max_age):
            return self._newest.snapshot
        began_at = time.monotonic()
        found = await self._directory.get([stage_key(run_id, stage) for stage in range(num_stages)])
        snapshot = snapshot_of(found, run_id, num_stages, now=time.time())
        # A process that ran under this identity before may have left entries: they are ours to renew or withdraw.
        self._own_keys |= {stage_key(run_id, e.stage) for e in snapshot.all_peers() if e.peer_id == self._peer_id}
        if self._newest is None or began_at >= self._newest.read_at:
            self._newest = _Reading(run_id, num_stages, began_at, snapshot)
        return snapshot

    async def watch(
        self, run_id: str, num_stages: int, period: timedelta = WATCH_PERIOD
    ) -> AsyncIterator[DirectorySnapshot]:
        """Fresh snapshots, one every `period`, the first at once. A read that fails once is skipped.

        Raises:
            DirectoryLost: the directory's process has stopped.
        """
        while True:
            try:
                yield await self.snapshot(run_id, num_stages)
            except DirectoryLost as error:
                if not self.is_alive():
                    raise
                log.warning("directory not read: %s", error)
            await asyncio.sleep(period.total_seconds())

    async def settle(self, entry: PeerEntry, machine: MachineProfile, num_stages: int, rules: Rules) -> Place:
        """Takes a place in the run. `entry` says what to publish with the claim; stage, state and time are filled in.

        On return the claim is published with the state RESERVED; renew it with `publish_peer`.

        Raises:
            NoStageFree, StageUnavailable, DirectoryLost
        """
        return await settle(_SwarmClaims(self, entry, machine, num_stages), machine, rules)

    async def _withdraw(self, keys: set[str]) -> None:
        # Records cannot be deleted, only covered by one that expires later.
        for key in keys:
            await self._publish(records_pb2.PeerRecord(), records.WITHDRAWAL_DOMAIN, key, PEER_LIFETIME)
            self._own_keys.discard(key)

    async def _publish(self, message: Message, domain: str, key: str, lifetime: timedelta) -> bytes:
        # The newest of a peer's records is the one that expires last, even when the clock was set back meanwhile.
        expires_at = max(time.time() + lifetime.total_seconds(), self._expirations.get(key, 0.0) + 0.001)
        self._expirations[key] = expires_at
        sealed = records.seal(message, domain=domain, key=key, expires_at=expires_at, seed=self._seed)
        if await self._directory.store(key, self._peer_id, sealed, expires_at=expires_at):
            return sealed
        # One peer's refusal is reported for all: what counts is whether the record can be read.
        if (await self._directory.get([key])).get(key, {}).get(self._peer_id) != sealed:
            raise DirectoryLost(f"the directory did not take this peer's record for {key}")
        return sealed


@dataclass(frozen=True, slots=True)
class _Reading:
    """A snapshot, and when it was read: monotonic seconds."""

    run_id: str
    num_stages: int
    read_at: float
    snapshot: DirectorySnapshot

    def is_of(self, run_id: str, num_stages: int, max_age: timedelta) -> bool:
        age = time.monotonic() - self.read_at
        return (self.run_id, self.num_stages) == (run_id, num_stages) and age < max_age.total_seconds()


@dataclass(frozen=True, slots=True)
class _SwarmClaims:
    """`settlement.Claims` on a swarm."""

    swarm: Swarm
    entry: PeerEntry
    machine: MachineProfile
    num_stages: int

    async def snapshot(self) -> DirectorySnapshot:
        return await self.swarm.snapshot(self.entry.run_id, self.num_stages)

    async def claim(self, stage: int, reserved_at: float) -> None:
        rate = self.machine.rates[stage]
        claim = replace(self.entry, stage=stage, throughput=rate, reserved_at=reserved_at, state=RESERVED)
        await self.swarm.publish_peer(claim)

    async def release(self, stage: int) -> None:
        await self.swarm.withdraw_peer()
