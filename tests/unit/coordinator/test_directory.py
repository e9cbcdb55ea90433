"""From records to entries: everything from outside is checked once, here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from resbm_pb import records_pb2

from coordinator import identity, records
from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry, port_of, stage_key
from coordinator.errors import RecordForged, RecordInvalid
from coordinator.reading import snapshot_of

SEED = bytes(range(32))
ME = identity.peer_id_of(identity.public_key_of(SEED))
NOW = 1_800_000_000.0

ENTRY = PeerEntry(
    run_id="abcd",
    stage=1,
    peer_id=ME,
    endpoints=("203.0.113.7:4000", "[::1]:4000"),
    state=SERVING,
    throughput=2.5,
    reserved_at=NOW - 5,
    queue_depth=3,
    committed_step=17,
    durable_step=0,
    software_version="0.1.0",
    loss=4.25,
    compute_share=0.5,
    microbatches=99,
    tokens_per_second=1000.0,
    wire_compression=128.0,
    round_trip_seconds=0.2,
    link_bytes_per_second=1e7,
    node_id=identity.peer_id_of(bytes(32)),
    stand_in=True,
    max_stages=4,
    claimed_at=NOW - 60,
    kept_stages=(0, 3),
    expires_at=NOW + 30,
)


def read(record: records_pb2.PeerRecord, *, stage: int = 1) -> PeerEntry:
    opened = records.Opened(record, ME, identity.public_key_of(SEED), NOW + 30)
    return PeerEntry.from_opened(opened, run_id="abcd", stage=stage)


def seal(entry: PeerEntry, *, stage: int | None = None, domain: str = records.PEER_DOMAIN) -> bytes:
    key = stage_key("abcd", entry.stage if stage is None else stage)
    message = entry.to_record() if domain == records.PEER_DOMAIN else records_pb2.PeerRecord()
    return records.seal(message, domain=domain, key=key, expires_at=entry.expires_at, seed=SEED)


def test_round_trip_keeps_every_field() -> None:
    assert read(ENTRY.to_record()) == ENTRY
    bare = replace(ENTRY, loss=None, durable_step=None)
    assert read(bare.to_record()) == bare  # absent is not zero


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "ffff"},
        {"stage": 2},
        {"state": 0},
        {"state": 77},
        {"endpoints": ()},
        {"endpoints": ("h:1",) * 9},
        {"endpoints": ("nowhere",)},
        {"endpoints": ("h:0",)},
        {"endpoints": ("h:65536",)},
        {"endpoints": ("h h:1",)},
        {"endpoints": ("h" * 300 + ":1",)},
        {"throughput": -1.0},
        {"throughput": math.nan},
        {"reserved_at": math.inf},
        {"wire_compression": math.inf},
        {"round_trip_seconds": -0.1},
        {"link_bytes_per_second": math.nan},
        {"claimed_at": -1.0},
        {"kept_stages": (1, 1)},
        {"kept_stages": (2, 1)},
        {"kept_stages": tuple(range(257))},
        {"node_id": "no peer id"},
        {"node_id": "1" * 71},
        {"node_id": ""},  # a stand-in is never the only peer of its machine
        {"node_id": ME},
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordInvalid):
        read(replace(ENTRY, **changes).to_record())


def test_a_record_of_before_machines_served_several_stages_is_a_machine_of_its_own() -> None:
    old = ENTRY.to_record()
    for name in ("node_id", "stand_in", "max_stages", "claimed_at"):
        old.ClearField(name)
    entry = read(old)
    assert (entry.node, entry.stand_in, entry.max_stages, entry.claim) == (ME, False, 1, ENTRY.reserved_at)


def test_a_peer_speaks_for_itself_only() -> None:
    with pytest.raises(RecordForged):
        read(replace(ENTRY, peer_id="12D3KooWsomeone").to_record())


def test_snapshot_reads_what_is_valid_and_counts_the_rest() -> None:
    found = {
        stage_key("abcd", 1): {"a": seal(ENTRY), "b": b"junk", "c": seal(replace(ENTRY, stage=0), stage=1)},
        stage_key("abcd", 2): {"d": seal(replace(ENTRY, stage=2), domain=records.WITHDRAWAL_DOMAIN)},
        stage_key("ffff", 0): {"e": seal(ENTRY)},
    }
    snapshot = snapshot_of(found, "abcd", 3, now=NOW)
    assert snapshot.peers == ((), (ENTRY,), ())
    assert snapshot.num_refused == 2
    assert snapshot_of(found, "abcd", 3, now=NOW + 31).all_peers() == ()


def test_snapshot_views() -> None:
    other = replace(ENTRY, stage=0, peer_id="A", state=COMPLETE)
    dead = replace(ENTRY, stage=2, peer_id="B", expires_at=NOW)
    older = replace(ENTRY, stage=2, expires_at=NOW + 10)
    snapshot = DirectorySnapshot.of("abcd", 3, [ENTRY, other, dead, older], taken_at=NOW)
    assert snapshot.num_stages == 3
    assert snapshot.at(2) == (older,)
    assert snapshot.all_peers() == (other, ENTRY, older)
    assert snapshot.find(ME) == ENTRY  # the newest of two
    assert snapshot.find("B") is None


def test_the_port_of_a_directory_peer_is_in_its_address() -> None:
    peer_id = "12D3KooWQKQm9VyX3bx6V6aHgGJDgpwg7S45i55jj6mGxEgP4Qzr"
    assert port_of(f"/ip4/127.0.0.1/tcp/4321/p2p/{peer_id}") == 4321
    assert port_of("/ip4/127.0.0.1/tcp/4321") is None
