"""Who a peer is: an Ed25519 key, the peer id made from it, and the key file the directory's daemon reads.

The peer id is the libp2p one: the owner of a record, the peer id and the identity of the transport are the same.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
NUM_REMEMBERED = 512
"""Keys and signatures: a search of the directory finds each record at several peers, and verifies it once."""

# libp2p: identity multihash (code 0x00, length 0x24) of PublicKey{type: Ed25519 (08 01), data: 32 bytes (12 20 ..)}.
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
# libp2p: PrivateKey{type: Ed25519 (08 01), data: 64 bytes (12 40 ..)}, the data being seed and public key.
_PRIVATE_KEY_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])


def public_key_of(seed: bytes) -> bytes:
    """Raw Ed25519 public key (32 bytes) of a 32-byte seed."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


@lru_cache(NUM_REMEMBERED)
def peer_id_of(public_key: bytes) -> str:
    """Base58 libp2p peer id of a raw Ed25519 public key.

    Raises:
        ValueError: the key is not 32 bytes long.
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return str(base58.b58encode(_PEER_ID_PREFIX + public_key), "ascii")


def sign(seed: bytes, message: bytes) -> bytes:
    """Ed25519 signature, 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


@lru_cache(NUM_REMEMBERED)
def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is that of `public_key` over `message`; a malformed key or signature verifies nothing."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def write_key_file(path: Path, seed: bytes) -> None:
    """Writes the key as libp2p's PrivateKey message, readable by the owner alone; a file already there is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_PRIVATE_KEY_PREFIX + seed + public_key_of(seed))
