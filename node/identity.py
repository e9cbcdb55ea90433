"""Who this peer is: one Ed25519 key, kept in a file that hivemind's p2p daemon reads too.

The file is libp2p's `PrivateKey` protobuf: field 1 = key type Ed25519, field 2 = 32 bytes of seed and 32 of public key.
The peer id is libp2p's: base58 of the identity multihash of the `PublicKey` protobuf. So the owner of a record, the
name of a peer and its transport identity are one and the same.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.errors import IdentityInvalid
from stage_server.ids import PeerId

PRIVATE_HEADER = b"\x08\x01\x12\x40"  # field 1 varint 1 (Ed25519); field 2, 64 bytes
PUBLIC_MULTIHASH_HEADER = b"\x00\x24" + b"\x08\x01\x12\x20"  # identity hash of 36 bytes: PublicKey, Ed25519, 32 bytes
SEED_SIZE = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer's key. The seed is the secret and never shows in a repr."""

    seed: bytes = field(repr=False)
    public_key: bytes

    @property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public_key)


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(PUBLIC_MULTIHASH_HEADER + public_key).decode())


def load_or_create(path: Path) -> Identity:
    """The identity kept at `path`, made there (mode 0400) if there is none. Several processes may ask at once.

    Raises:
        IdentityInvalid: the file or its folder cannot be read or written, the file is not an Ed25519 identity, or
            others than its owner may read it.
    """
    try:
        if not path.exists():
            _create(path)
        return _load(path)
    except OSError as error:
        raise IdentityInvalid(f"{path}: {error.strerror}") from error


def _create(path: Path) -> None:
    """Writes a new key beside `path` and links it there in one go; whoever comes second keeps the first one's."""
    seed = os.urandom(SEED_SIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(PRIVATE_HEADER + seed + _public_key(seed))
            os.fchmod(file.fileno(), 0o400)
            file.flush()
            os.fsync(file.fileno())
        Path(path).hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()


def _load(path: Path) -> Identity:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise IdentityInvalid(
            f"{path} may be used by others (mode {mode:04o}): its key may be known",
            remedy=f"if nobody else could read it: chmod 400 {path}; else move it away to be given a new identity",
        )
    if status.st_uid != os.geteuid():
        raise IdentityInvalid(f"{path} belongs to another user (uid {status.st_uid})")
    data = path.read_bytes()
    seed, public_key = data[4 : 4 + SEED_SIZE], data[4 + SEED_SIZE :]
    if len(data) != 4 + 64 or not data.startswith(PRIVATE_HEADER):
        raise IdentityInvalid(f"{path} is not an Ed25519 identity file")
    if _public_key(seed) != public_key:
        raise IdentityInvalid(f"{path} is damaged: its public key does not belong to its private key")
    return Identity(seed, public_key)


def _public_key(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
