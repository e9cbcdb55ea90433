"""Peer ids and key files are those of libp2p, byte for byte."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from coordinator import identity
from coordinator.hivemind_parts import PeerID

SEED = bytes(range(32))


def test_peer_id_and_key_file_are_libp2ps(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity.write_key_file(path, SEED)
    public_key = path.read_bytes()[-32:]
    assert public_key == identity.public_key_of(SEED)
    # What the libp2p daemon itself says when it is started with this key file.
    assert identity.peer_id_of(public_key) == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    assert str(PeerID.from_base58(identity.peer_id_of(public_key))) == identity.peer_id_of(public_key)


def test_key_file_is_private_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity.write_key_file(path, bytes(32))
    identity.write_key_file(path, SEED)
    assert path.read_bytes()[4:36] == SEED
    assert stat.S_IMODE(path.stat().st_mode) == 0o400


def test_signatures() -> None:
    public_key = identity.public_key_of(SEED)
    signature = identity.sign(SEED, b"text")
    assert identity.verify(public_key, signature, b"text")
    assert not identity.verify(public_key, signature, b"other")
    assert not identity.verify(identity.public_key_of(bytes(32)), signature, b"text")
    assert not identity.verify(public_key, signature[:-1], b"text")
    assert not identity.verify(b"short", signature, b"text")
    with pytest.raises(ValueError, match="32 bytes"):
        identity.peer_id_of(b"short")
