"""The manifest that makes a folder of tensor files a checkpoint, and how files are brought safely onto the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError

from stage_server.config import Frozen
from stage_server.errors import CheckpointInvalid, CheckpointUnwritable
from stage_server.state_listing import MANIFEST, MAX_LINEAGE_CHARACTERS, StateListing


class ManifestFile(Frozen):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="file name, no separators")
    size_bytes: int = Field(ge=0, description="size in bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the whole file, hex")


class Manifest(Frozen):
    """What a checkpoint is of and what it consists of. The other files know nothing of it: replicas' are equal."""

    format: Literal[1] = Field(1, description="layout of the folder")
    run_id: str = Field(description="run, hex")
    stage: int = Field(ge=0, description="stage index")
    step: int = Field(ge=0, description="steps committed")
    lineage: str = Field("", max_length=MAX_LINEAGE_CHARACTERS, description="history the step belongs to; may be empty")
    software_version: str = Field(description="of the writer, for people")
    files: tuple[ManifestFile, ...] = Field(description="all files but this one")


def manifest_of(run_id: str, listing: StateListing) -> Manifest:
    """The manifest of a state that came from elsewhere."""
    files = (ManifestFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256.hex()) for f in listing.files)
    return Manifest(
        run_id=run_id,
        stage=listing.stage,
        step=listing.step,
        lineage=listing.lineage,
        software_version=software_version(),
        files=tuple(files),
    )


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointInvalid: there is none, or it is damaged."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as problem:
        raise CheckpointInvalid(f"checkpoint {folder} cannot be read: {problem}") from problem
    except ValidationError as problem:
        raise CheckpointInvalid(f"the manifest of {folder} is damaged") from problem


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Last of all files: from now on, even after a loss of power, the folder is a checkpoint. Raises OSError."""
    written = folder / f".{MANIFEST}"
    written.write_bytes(manifest.model_dump_json(indent=1).encode())
    flush(written)
    written.rename(folder / MANIFEST)
    flush(folder)


def flush(path: Path) -> None:
    """Until the disk has it: a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unwritable(what: str) -> Iterator[None]:
    """A disk that refuses becomes CheckpointUnwritable."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise CheckpointUnwritable(f"{what} cannot be written: {problem}") from problem


def software_version() -> str:
    try:
        return metadata.version("resbm-node")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
