"""What the directory says, as plain frozen values: who serves which stage of a run. Pure."""

from __future__ import annotations

import ipaddress
import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from resbm_pb import records_pb2

from coordinator.errors import RecordForged, RecordInvalid
from coordinator.records import Opened

RESERVED: Final = records_pb2.PEER_STATE_RESERVED
SERVING: Final = records_pb2.PEER_STATE_SERVING
DRAINING: Final = records_pb2.PEER_STATE_DRAINING
COMPLETE: Final = records_pb2.PEER_STATE_COMPLETE

MAX_ENDPOINTS = 8
MAX_ENDPOINT_CHARACTERS = 256
MAX_CHECKPOINTS = 64
MAX_KEPT_STAGES = 256
_WAY_IN = re.compile(
    r"/(?P<kind>ip4|ip6|dns4|dns6)/(?P<host>[^/,\s]{1,253})/tcp/(?P<port>\d{1,5})/p2p/[1-9A-HJ-NP-Za-km-z]{40,70}"
)
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,70}")


def run_key(run_id: str) -> str:
    """DHT key of the run's record; the subkey is its publisher's peer id."""
    return f"resbm/{run_id}/run"


def stage_key(run_id: str, stage: int) -> str:
    """DHT key of a stage's peers; the subkeys are their peer ids."""
    return f"resbm/{run_id}/stage/{stage}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEntry:
    """One peer that serves, or is about to serve, one stage. The fields are those of resbm.v1.PeerRecord."""

    run_id: str
    stage: int
    peer_id: str
    endpoints: tuple[str, ...]
    """Addresses of the stage service, "host:port", best first."""
    state: records_pb2.PeerState.ValueType
    throughput: float
    """Microbatches per second."""
    reserved_at: float
    """Unix time in seconds; the earlier of two claims to a place wins."""
    queue_depth: int = 0
    committed_step: int = 0
    durable_step: int | None = None
    software_version: str = ""
    loss: float | None = None
    compute_share: float = 0.0
    microbatches: int = 0
    tokens_per_second: float = 0.0
    wire_compression: float = 0.0
    round_trip_seconds: float = 0.0
    link_bytes_per_second: float = 0.0
    bootstrap: tuple[str, ...] = ()
    """Multiaddresses of the peer's directory process, with peer id."""
    epoch: int = 0
    epoch_step: int = 0
    """Where the run went back to when the epoch began."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints on the peer's disk."""
    copied_stage: int | None = None
    """Another stage of which the peer keeps a copy of a checkpoint,"""
    copied_step: int = 0
    """of this step."""
    node_id: str = ""
    """Peer id of the first of several peers that one machine runs; empty: this is it. See `node`."""
    stand_in: bool = False
    """Whether the peer serves its stage only because nobody else does, see coordinator/coverage.py."""
    max_stages: int = 1
    """How many stages the machine would serve at most; said by its first peer."""
    kept_stages: tuple[int, ...] = ()
    """Stages that the machine holds checkpoints of, beside its first peer's own; said by that one."""
    claimed_at: float = 0.0
    """Unix time of the claim that a stand-in has taken over from another one with its place; 0: none, see `claim`."""
    expires_at: float = 0.0
    """Unix time in seconds; set by the directory when the entry is read, 0 in an entry to be published."""

    @property
    def node(self) -> str:
        """The machine, by the peer id of its first peer."""
        return self.node_id or self.peer_id

    @property
    def claim(self) -> float:
        """Unix time in seconds of the first claim to the place, whoever made it."""
        return self.claimed_at or self.reserved_at

    def is_live(self, now: float) -> bool:
        """Whether the record still speaks for its peer."""
        return self.expires_at > now

    def to_record(self) -> records_pb2.PeerRecord:
        """The message to be sealed; the expiration travels in the envelope."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "expires_at"}
        return records_pb2.PeerRecord(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_opened(cls, opened: Opened[records_pb2.PeerRecord], *, run_id: str, stage: int) -> PeerEntry:
        """Reads a verified record found under a run's stage.

        Raises:
            RecordForged: it speaks for a peer other than its signer.
            RecordInvalid: it names another run or stage, or impossible values.
        """
        record = opened.message
        if record.peer_id != opened.peer_id:
            raise RecordForged(f"{opened.peer_id} signed a record for peer {record.peer_id[:64]!r}")
        if record.run_id != run_id or record.stage != stage:
            raise RecordInvalid(f"{opened.peer_id} names stage {record.stage} of run {record.run_id[:64]!r}")
        check_values(record, opened.peer_id)
        return cls(
            run_id=record.run_id,
            stage=record.stage,
            peer_id=record.peer_id,
            endpoints=tuple(record.endpoints),
            state=record.state,
            throughput=record.throughput,
            reserved_at=record.reserved_at,
            queue_depth=record.queue_depth,
            committed_step=record.committed_step,
            durable_step=record.durable_step if record.HasField("durable_step") else None,
            software_version=record.software_version,
            loss=record.loss if record.HasField("loss") else None,
            compute_share=record.compute_share,
            microbatches=record.microbatches,
            tokens_per_second=record.tokens_per_second,
            wire_compression=record.wire_compression,
            round_trip_seconds=record.round_trip_seconds,
            link_bytes_per_second=record.link_bytes_per_second,
            bootstrap=tuple(record.bootstrap),
            epoch=record.epoch,
            epoch_step=record.epoch_step,
            checkpoints=tuple(record.checkpoints),
            copied_stage=record.copied_stage if record.HasField("copied_stage") else None,
            copied_step=record.copied_step,
            node_id=record.node_id,
            stand_in=record.stand_in,
            max_stages=max(1, record.max_stages),
            kept_stages=tuple(record.kept_stages),
            claimed_at=record.claimed_at,
            expires_at=opened.expires_at,
        )


def check_values(record: records_pb2.PeerRecord, peer_id: str) -> None:
    """Whether a record's state, addresses and rates are possible ones.

    Raises:
        RecordInvalid
    """
    if record.state not in (RESERVED, SERVING, DRAINING, COMPLETE):
        raise RecordInvalid(f"{peer_id} is in the unknown state {record.state}")
    if not 1 <= len(record.endpoints) <= MAX_ENDPOINTS or not all(map(_is_endpoint, record.endpoints)):
        raise RecordInvalid(f"{peer_id} has no usable endpoint")
    if len(record.bootstrap) > MAX_ENDPOINTS or not all(map(is_way_in, record.bootstrap)):
        raise RecordInvalid(f"{peer_id} names bootstrap addresses that are none, or too many")
    if len(record.checkpoints) > MAX_CHECKPOINTS:
        raise RecordInvalid(f"{peer_id} names {len(record.checkpoints)} checkpoints")
    if (record.epoch == 0) > (record.epoch_step == 0):
        raise RecordInvalid(f"{peer_id} went back to step {record.epoch_step} in no epoch")
    if record.node_id and not _PEER_ID.fullmatch(record.node_id):
        raise RecordInvalid(f"{peer_id} names a machine by what is no peer id")
    kept = list(record.kept_stages)
    if len(kept) > MAX_KEPT_STAGES or any(later <= earlier for earlier, later in itertools.pairwise(kept)):
        raise RecordInvalid(f"{peer_id} keeps stages that are too many or out of order")
    if record.stand_in and record.node_id in ("", record.peer_id):
        raise RecordInvalid(f"{peer_id} stands in, but is the only peer of its machine")
    numbers = (
        record.throughput,
        record.compute_share,
        record.tokens_per_second,
        record.wire_compression,
        record.round_trip_seconds,
        record.link_bytes_per_second,
        record.reserved_at,
        record.claimed_at,
    )
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise RecordInvalid(f"{peer_id} names a rate or time that is not a number of 0 or more")


def _is_endpoint(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536) and (
        len(text) <= MAX_ENDPOINT_CHARACTERS and text.isprintable() and " " not in text
    )


def is_way_in(address: str) -> bool:
    """Whether a text is the full multiaddress of a directory peer. One that is not spoils a whole bootstrap list."""
    match = _WAY_IN.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        return False
    try:
        return match["kind"].startswith("dns") or ipaddress.ip_address(match["host"]).version == int(match["kind"][2])
    except ValueError:
        return False


def port_of(address: str) -> int | None:
    """The port in a full multiaddress of a directory peer; None where it is none."""
    match = _WAY_IN.fullmatch(address)
    return None if match is None else int(match["port"])


@dataclass(frozen=True, slots=True)
class DirectorySnapshot:
    """A run's peers by stage, as one reader saw them at one moment."""

    run_id: str
    peers: tuple[tuple[PeerEntry, ...], ...]
    """One tuple per stage, sorted by peer id; only records that were valid and live when read."""
    taken_at: float
    """Unix time in seconds."""
    num_refused: int = 0
    """Records that were found and refused (forged, expired or invalid)."""

    @property
    def num_stages(self) -> int:
        return len(self.peers)

    def at(self, stage: int) -> tuple[PeerEntry, ...]:
        """The peers of one stage."""
        return self.peers[stage]

    def all_peers(self) -> tuple[PeerEntry, ...]:
        """Every peer, by stage and then by peer id."""
        return tuple(entry for entries in self.peers for entry in entries)

    def find(self, peer_id: str) -> PeerEntry | None:
        """The peer's newest record, if it has any."""
        own = [entry for entry in self.all_peers() if entry.peer_id == peer_id]
        return max(own, key=lambda entry: entry.expires_at, default=None)

    def where(self, holds: Callable[[PeerEntry], bool]) -> DirectorySnapshot:
        """With those peers alone."""
        return replace(self, peers=tuple(tuple(filter(holds, entries)) for entries in self.peers))

    def with_peer(self, entry: PeerEntry) -> DirectorySnapshot:
        """As it will be when that record has been published."""
        others = [other for other in self.all_peers() if other.peer_id != entry.peer_id]
        return DirectorySnapshot.of(self.run_id, self.num_stages, [*others, entry], taken_at=self.taken_at)

    @classmethod
    def of(
        cls, run_id: str, num_stages: int, entries: Iterable[PeerEntry], *, taken_at: float, num_refused: int = 0
    ) -> DirectorySnapshot:
        """Sorts entries by stage; those that are no longer live are left out."""
        stages: list[list[PeerEntry]] = [[] for _ in range(num_stages)]
        for entry in sorted(entries, key=lambda entry: entry.peer_id):
            if entry.is_live(taken_at):
                stages[entry.stage].append(entry)
        return cls(run_id, tuple(map(tuple, stages)), taken_at, num_refused)
