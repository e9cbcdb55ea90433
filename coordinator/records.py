"""Signed records: how a thing in the directory proves who said it, where, and until when. Pure: bytes in and out."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError, Message
from resbm_pb import records_pb2

from coordinator import identity
from coordinator.errors import RecordExpired, RecordForged, RecordInvalid

M = TypeVar("M", bound=Message)

PEER_DOMAIN: Final = "resbm.v1.PeerRecord"
RUN_DOMAIN: Final = "resbm.v1.RunRecord"
WITHDRAWAL_DOMAIN: Final = "resbm.v1.Withdrawal"
"""An empty payload under the peer's own key: it covers the peer's last record until that would have expired."""

MAX_LIFETIME: Final[Mapping[str, timedelta]] = {
    PEER_DOMAIN: timedelta(minutes=10),
    WITHDRAWAL_DOMAIN: timedelta(minutes=10),
    RUN_DOMAIN: timedelta(days=1),
}
"""A record that claims to live longer is refused: nobody can fill the directory for good."""

MAX_RECORD_BYTES: Final[Mapping[str, int]] = {PEER_DOMAIN: 4096, WITHDRAWAL_DOMAIN: 512, RUN_DOMAIN: 65536}

CLOCK_TOLERANCE: Final = timedelta(seconds=5)
"""How far apart two peers' clocks may be (the directory itself refuses more than 3 s at joining)."""

# Leads every signed text, so that no signature made for another purpose with the same key passes for a record.
_CONTEXT = b"resbm-node signed record 1"


@dataclass(frozen=True, slots=True)
class Opened(Generic[M]):
    """A record whose signature, place and age have been checked."""

    message: M
    peer_id: str
    public_key: bytes
    expires_at: float
    """Unix time in seconds."""


def seal(message: Message, *, domain: str, key: str, expires_at: float, seed: bytes) -> bytes:
    """Signs a message for one DHT key, to be void after `expires_at` (Unix time in seconds).

    Raises:
        RecordInvalid: the record would be larger than its kind may be.
    """
    payload = message.SerializeToString(deterministic=True)
    sealed = records_pb2.SignedRecord(
        domain=domain,
        key=key,
        expiration=expires_at,
        payload=payload,
        public_key=identity.public_key_of(seed),
        signature=identity.sign(seed, _signed_text(domain, key, expires_at, payload)),
    ).SerializeToString(deterministic=True)
    if len(sealed) > MAX_RECORD_BYTES[domain]:
        raise RecordInvalid(f"a {domain} record of {len(sealed)} bytes is too large: {MAX_RECORD_BYTES[domain]} may be")
    return sealed


def open_record(data: bytes, *, domain: str, key: str, now: float, message_type: type[M]) -> Opened[M]:
    """Checks a record from outside and decodes its message.

    Raises:
        RecordInvalid: it cannot be decoded, is too large or contradicts itself.
        RecordForged: the signature is wrong, or it was signed for another key or kind.
        RecordExpired: it is void, or claims to live longer than its kind may.
    """
    record = parse_envelope(data)
    if record.domain != domain or record.key != key:
        raise RecordForged(f"a {record.domain!r} record for {record.key!r} was found as {domain!r} under {key!r}")
    verify_envelope(record, now=now)
    message = message_type()
    try:
        message.ParseFromString(record.payload)
    except DecodeError as error:
        raise RecordInvalid(f"the payload of a {domain} record cannot be decoded") from error
    return Opened(message, identity.peer_id_of(record.public_key), record.public_key, record.expiration)


def parse_envelope(data: bytes) -> records_pb2.SignedRecord:
    """Decodes an envelope of a known kind and bounded size; nothing is verified yet.

    Raises:
        RecordInvalid: it is not one, or carries bytes that the signature does not cover.
    """
    if len(data) > max(MAX_RECORD_BYTES.values()):
        raise RecordInvalid(f"a record of {len(data)} bytes is too large")
    record = records_pb2.SignedRecord()
    try:
        record.ParseFromString(data)
    except DecodeError as error:
        raise RecordInvalid("a record cannot be decoded") from error
    if record.domain not in MAX_RECORD_BYTES:
        raise RecordInvalid(f"records of the kind {record.domain[:40]!r} are unknown")
    if len(data) > MAX_RECORD_BYTES[record.domain]:
        raise RecordInvalid(f"a {record.domain} record of {len(data)} bytes is too large")
    # Only one encoding of a record is accepted: otherwise anyone could pad someone else's record with unsigned bytes.
    record.DiscardUnknownFields()
    if record.SerializeToString(deterministic=True) != data:
        raise RecordInvalid(f"a {record.domain} record is not in its canonical encoding")
    return record


def verify_envelope(record: records_pb2.SignedRecord, *, now: float, tolerance: timedelta = timedelta(0)) -> None:
    """Checks signature and age. `tolerance` lets a record pass that expired so recently (clocks differ).

    Raises:
        RecordForged, RecordExpired, RecordInvalid
    """
    if not math.isfinite(record.expiration):
        raise RecordInvalid("a record's expiration is not a time")
    text = _signed_text(record.domain, record.key, record.expiration, record.payload)
    if not identity.verify(record.public_key, record.signature, text):
        raise RecordForged(f"the signature of a {record.domain} record for {record.key!r} is wrong")
    if record.expiration + tolerance.total_seconds() <= now:
        raise RecordExpired(f"a {record.domain} record expired {now - record.expiration:.1f} s ago")
    longest = MAX_LIFETIME[record.domain] + CLOCK_TOLERANCE
    if record.expiration > now + longest.total_seconds():
        raise RecordExpired(f"a {record.domain} record claims to live {record.expiration - now:.0f} s more")


def _signed_text(domain: str, key: str, expires_at: float, payload: bytes) -> bytes:
    """Every part led by its length, so that two different records never have the same text."""
    parts = (_CONTEXT, domain.encode(), key.encode(), struct.pack(">d", expires_at), payload)
    return b"".join(struct.pack(">Q", len(part)) + part for part in parts)
