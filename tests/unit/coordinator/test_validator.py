"""The doorkeeper: of all that a DHT may be asked to store, only honest records in their place."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resbm_pb import records_pb2

from coordinator import identity, records
from coordinator.hivemind_parts import DHTID, DHTRecord, MSGPackSerializer
from coordinator.validator import SignedRecordValidator

SEED = bytes(range(32))
ME = identity.peer_id_of(identity.public_key_of(SEED))
KEY = "resbm/abcd/stage/1"
VALIDATOR = SignedRecordValidator()


def record(
    *,
    key: str = KEY,
    signed_key: str = KEY,
    subkey: object = ME,
    lives: float = 30,
    signed_lives: float | None = None,
    spoil: bool = False,
) -> DHTRecord:
    now = time.time()
    sealed = records.seal(
        records_pb2.PeerRecord(peer_id=ME),
        domain=records.PEER_DOMAIN,
        key=signed_key,
        expires_at=now + (lives if signed_lives is None else signed_lives),
        seed=SEED,
    )
    if spoil:
        sealed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    dumps = MSGPackSerializer.dumps
    return DHTRecord(DHTID.generate(source=key).to_bytes(), dumps(subkey), dumps(sealed), now + lives)


def test_an_honest_record_passes() -> None:
    assert VALIDATOR.validate(record())
    assert pickle.loads(pickle.dumps(VALIDATOR)).validate(record())
    assert VALIDATOR.validate(record(lives=-2))  # a slower clock than ours


@pytest.mark.parametrize(
    "bad",
    [
        {"spoil": True},
        {"signed_key": "resbm/abcd/stage/2"},
        {"subkey": "12D3KooWsomeone"},
        {"subkey": None},
        {"subkey": ME.encode()},
        {"lives": -60},
        {"lives": 3600},
        {"lives": 60, "signed_lives": 30},
        {"lives": 30, "signed_lives": 60},
    ],
)
def test_anything_else_is_refused(bad: dict[str, object]) -> None:
    assert not VALIDATOR.validate(record(**bad))  # type: ignore[arg-type]


def test_a_whole_value_without_subkeys_is_refused() -> None:
    honest = record()
    assert not VALIDATOR.validate(DHTRecord(honest.key, b"", honest.value, honest.expiration_time))


@pytest.mark.parametrize("value", [None, 1, "text", ["list"], {"a": 1}, b"", (1, 2)])
def test_other_kinds_of_value_are_refused(value: object) -> None:
    honest = record()
    raw = MSGPackSerializer.dumps(value)
    assert not VALIDATOR.validate(DHTRecord(honest.key, honest.subkey, raw, honest.expiration_time))


@given(st.binary(max_size=200))
def test_junk_is_refused_without_an_exception(value: bytes) -> None:
    honest = record()
    assert not VALIDATOR.validate(DHTRecord(honest.key, honest.subkey, value, honest.expiration_time))
