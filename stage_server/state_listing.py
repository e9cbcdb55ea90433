"""What a peer says of its stage's state: files, and the hash of every chunk. Checked at the door, compared, chosen.

Replicas of a stage that stand at one step of one history hold the same bits, so their listings are equal, and a chunk
may come from any of them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from resbm_pb import stage_pb2

from stage_server.errors import CheckpointInvalid, Oversized

CHUNK_BYTES: Final = 1 << 20  # part of the wire contract
MANIFEST: Final = "manifest.json"  # each peer writes its own: it may name another version of the software
MAX_LINEAGE_CHARACTERS: Final = 64
MAX_FILES: Final = 65_536
SHA256_BYTES: Final = 32
_FILE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")


@dataclass(frozen=True, slots=True)
class StateFile:
    """One file of a state: `sha256` of all of it, `chunk_sha256` of every CHUNK_BYTES (the last may have fewer)."""

    name: str
    size_bytes: int
    sha256: bytes
    chunk_sha256: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StateListing:
    """One stage's state at one step of one history. Two that are equal are the same bits."""

    stage: int
    step: int
    lineage: str
    files: tuple[StateFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def num_chunks(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def hash_file(file: BinaryIO) -> tuple[bytes, tuple[bytes, ...]]:
    """SHA-256 of what is left in a file and of each chunk of it, in one reading."""
    whole, chunks = hashlib.sha256(), list[bytes]()
    while data := file.read(CHUNK_BYTES):
        whole.update(data)
        chunks.append(hashlib.sha256(data).digest())
    return whole.digest(), tuple(chunks)


def to_reply(listing: StateListing) -> stage_pb2.ListStateReply:
    files = (
        stage_pb2.StateFile(
            name=file.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            chunk_sha256=b"".join(file.chunk_sha256),
        )
        for file in listing.files
    )
    return stage_pb2.ListStateReply(stage=listing.stage, step=listing.step, lineage=listing.lineage, files=files)


def from_reply(reply: stage_pb2.ListStateReply, max_bytes: int) -> StateListing:
    """A peer's listing, at the door: nothing of it can lead out of a folder or fill a disk beyond `max_bytes`.

    Raises:
        Oversized: the state, or the listing itself, is larger than allowed.
        CheckpointInvalid: it contradicts itself.
    """
    size_bytes = sum(file.size_bytes for file in reply.files)
    if size_bytes > max_bytes:
        raise Oversized(f"a state of {size_bytes} bytes; at most {max_bytes} are allowed here")
    if not 0 < len(reply.files) <= MAX_FILES:
        raise CheckpointInvalid(f"a state of {len(reply.files)} files")
    if len(reply.lineage) > MAX_LINEAGE_CHARACTERS:
        raise CheckpointInvalid(f"a lineage of {len(reply.lineage)} characters")
    files = tuple(map(_file, reply.files))
    if len({file.name for file in files}) < len(files):
        raise CheckpointInvalid("a state with two files of one name")
    return StateListing(reply.stage, reply.step, reply.lineage, files)


def _file(file: stage_pb2.StateFile) -> StateFile:
    if not _FILE_NAME.fullmatch(file.name) or file.name == MANIFEST:
        raise CheckpointInvalid(f"a state file called {file.name!r}")
    hashes = file.chunk_sha256
    if len(file.sha256) != SHA256_BYTES or len(hashes) != SHA256_BYTES * num_chunks(file.size_bytes):
        raise CheckpointInvalid(f"{file.name} has {file.size_bytes} bytes and {len(hashes)} bytes of hashes")
    chunks = tuple(hashes[at : at + SHA256_BYTES] for at in range(0, len(hashes), SHA256_BYTES))
    return StateFile(file.name, file.size_bytes, file.sha256, chunks)


def choose(listings: Mapping[str, StateListing], num_waiting: int) -> StateListing | None:
    """The state that most peers list, of equals the one that comes first.

    None while no peer has answered, or while the `num_waiting` who have not could still outvote those who have.
    """
    ranked = Counter(listings.values()).most_common(2)
    if not ranked:
        return None
    (leader, votes), others = ranked[0], ranked[1:]
    rival = others[0][1] if others else 0
    return leader if not num_waiting or votes > rival + num_waiting else None
