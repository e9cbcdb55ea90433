"""Records: what is signed is what is read, and nothing else passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resbm_pb import records_pb2

from coordinator import identity, records
from coordinator.errors import RecordError, RecordExpired, RecordForged, RecordInvalid

SEED = bytes(range(32))
NOW = 1_800_000_000.0
KEY = "resbm/abcd/stage/1"
MESSAGE = records_pb2.PeerRecord(run_id="abcd", stage=1, peer_id="me", endpoints=["h:1"])


def seal(*, domain: str = records.PEER_DOMAIN, key: str = KEY, expires_at: float = NOW + 30) -> bytes:
    return records.seal(MESSAGE, domain=domain, key=key, expires_at=expires_at, seed=SEED)


def open_peer(data: bytes, *, key: str = KEY, now: float = NOW) -> records.Opened[records_pb2.PeerRecord]:
    return records.open_record(data, domain=records.PEER_DOMAIN, key=key, now=now, message_type=records_pb2.PeerRecord)


def changed(data: bytes, **values: object) -> bytes:
    record = records_pb2.SignedRecord.FromString(data)
    for name, value in values.items():
        setattr(record, name, value)
    return record.SerializeToString(deterministic=True)


def test_round_trip() -> None:
    opened = open_peer(seal())
    assert opened.message == MESSAGE
    assert opened.public_key == identity.public_key_of(SEED)
    assert opened.peer_id == identity.peer_id_of(opened.public_key)
    assert opened.expires_at == NOW + 30


@pytest.mark.parametrize(
    "values",
    [
        {"payload": records_pb2.PeerRecord(peer_id="you").SerializeToString()},
        {"expiration": NOW + 31},
        {"public_key": identity.public_key_of(bytes(32))},
        {"public_key": b""},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_a_changed_record_is_forged(values: dict[str, object]) -> None:
    with pytest.raises(RecordForged):
        open_peer(changed(seal(), **values))


def test_a_record_counts_for_its_key_and_kind_only() -> None:
    with pytest.raises(RecordForged):
        open_peer(seal(), key="resbm/abcd/stage/2")
    with pytest.raises(RecordForged):
        open_peer(seal(domain=records.RUN_DOMAIN))
    with pytest.raises(RecordForged):  # the envelope's words changed, the signature not
        open_peer(changed(seal(key="resbm/abcd/stage/2"), key=KEY))
    with pytest.raises(RecordForged):
        open_peer(changed(seal(domain=records.RUN_DOMAIN), domain=records.PEER_DOMAIN))


def test_the_border_between_two_fields_is_signed() -> None:
    """The same bytes in a row, divided otherwise, are another text."""
    sealed = records_pb2.SignedRecord.FromString(seal(key="ab"))
    moved = changed(sealed.SerializeToString(), domain=records.PEER_DOMAIN, key="a", payload=b"b" + sealed.payload)
    with pytest.raises(RecordForged):
        open_peer(moved, key="a")


def test_age() -> None:
    assert open_peer(seal(), now=NOW + 29.9)
    with pytest.raises(RecordExpired):
        open_peer(seal(), now=NOW + 30)
    with pytest.raises(RecordExpired, match="claims to live"):
        open_peer(seal(expires_at=NOW + 3600))
    for not_a_time in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(RecordInvalid):
            open_peer(seal(expires_at=not_a_time))


def test_malformed_records_are_invalid() -> None:
    for data in (b"", b"junk", seal()[:-1] + b"\xff\xff", bytes(100_000)):
        with pytest.raises(RecordInvalid):
            open_peer(data)
    with pytest.raises(RecordInvalid, match="unknown"):
        open_peer(changed(seal(), domain="resbm.v1.Else"))


def test_large_records_are_neither_made_nor_read() -> None:
    big = records_pb2.PeerRecord(software_version="x" * 5000)
    with pytest.raises(RecordInvalid, match="too large"):
        records.seal(big, domain=records.PEER_DOMAIN, key=KEY, expires_at=NOW + 30, seed=SEED)
    with pytest.raises(RecordInvalid, match="too large"):
        open_peer(changed(seal(), payload=big.SerializeToString()))


def test_unsigned_padding_is_refused() -> None:
    unknown_field = bytes([0x7A, 0x03]) + b"pad"  # field 15
    with pytest.raises(RecordInvalid, match="canonical"):
        open_peer(seal() + unknown_field)


@given(st.data())
def test_no_single_changed_byte_passes(data: st.DataObject) -> None:
    sealed = bytearray(seal())
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        open_peer(bytes(sealed))


@given(st.binary(max_size=300))
def test_junk_never_escapes_as_another_error(data: bytes) -> None:
    with pytest.raises(RecordError):
        open_peer(data)
