"""A state on its way onto this disk: verified chunks at their places, and in the end a checkpoint.

No journal says what has come: what is on the disk is hashed again, and is believed or not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stage_server.errors import CheckpointInvalid
from stage_server.manifest import flush, manifest_of, unwritable, write_manifest
from stage_server.state_listing import MANIFEST, StateFile, StateListing, hash_file
from stage_server.state_plan import Chunk, chunks_of

_SHARDS: Final = "state-*.safetensors"
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW


def begin(folder: Path, listing: StateListing) -> list[Chunk]:
    """Makes `folder` ready for a state; the chunks of it that an earlier attempt has left there.

    Raises:
        CheckpointUnwritable: the disk refuses.
    """
    with unwritable(f"folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # what is there may be another state, and is in pieces from now on
        names = {file.name for file in listing.files}
        for path in folder.glob(_SHARDS):
            if path.name not in names:
                path.unlink()
        return [chunk for file in listing.files for chunk in _found(folder, file)]


def put(folder: Path, chunk: Chunk, data: bytes) -> bool:
    """Writes a chunk to its place; False when it is not what its hash says, and nothing is written.

    Raises:
        CheckpointUnwritable: the disk refuses.
    """
    if hashlib.sha256(data).digest() != chunk.sha256:
        return False
    with unwritable(f"{chunk.name} in {folder}"):
        descriptor = os.open(folder / chunk.name, _FLAGS, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], chunk.offset_bytes + written)
        finally:
            os.close(descriptor)
    return True


def finish(folder: Path, run_id: str, listing: StateListing) -> dict[str, Tensor]:
    """All chunks are there: brings them safely onto the disk, adds the manifest, and reads the tensors.

    Raises:
        CheckpointInvalid: the files are not what their hashes say, or no tensors.
        CheckpointUnwritable: the disk refuses.
    """
    tensors: dict[str, Tensor] = {}
    for file in listing.files:
        with unwritable(f"{file.name} in {folder}"):
            _settle(folder / file.name, file)
        tensors |= _load(folder / file.name)
    with unwritable(f"manifest in {folder}"):
        write_manifest(folder, manifest_of(run_id, listing))
    return tensors


def _found(folder: Path, file: StateFile) -> Iterator[Chunk]:
    try:
        with (folder / file.name).open("rb") as opened:
            for chunk in chunks_of(file):
                if hashlib.sha256(opened.read(chunk.size_bytes)).digest() == chunk.sha256:
                    yield chunk
    except FileNotFoundError:
        return


def _settle(path: Path, file: StateFile) -> None:
    with path.open("ab") as opened:
        opened.truncate(file.size_bytes)  # an earlier state's may have been longer
    with path.open("rb") as opened:
        if hash_file(opened)[0] != file.sha256:
            raise CheckpointInvalid(f"{file.name} does not match its hash, though its chunks match theirs")
    flush(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as problem:
        raise CheckpointInvalid(f"{path.name} holds no tensors: {problem}") from problem
