"""Committed states of one stage on disk: complete or absent, never half.

    <folder>/step-00000010/manifest.json               run, stage, step, software, and size and SHA-256 of each file
    <folder>/step-00000010/state-00000.safetensors     tensors in name order, in shards of bounded size
    <folder>/.writing-...                              a writer at work (it holds a lock), or what a dead one left

A checkpoint is written beside the others, flushed to the disk, and renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Final, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage_server.config import Frozen
from stage_server.errors import CheckpointInvalid, CheckpointUnwritable

SHARD_BYTES: Final = 64 * 2**20
_MANIFEST: Final = "manifest.json"
_STEP_FOLDER: Final = re.compile(r"step-(\d{8,})")
_TEMPORARY: Final = ".writing-"


class _ManifestFile(Frozen):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="file name, no separators")
    size_bytes: int = Field(ge=0, description="size in bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the whole file, hex")


class _Manifest(Frozen):
    format: Literal[1] = Field(1, description="layout of the folder")
    run_id: str = Field(description="run, hex")
    stage: int = Field(ge=0, description="stage index")
    step: int = Field(ge=0, description="steps committed")
    software_version: str = Field(description="of the writer, for people")
    files: tuple[_ManifestFile, ...] = Field(description="all files but this one")


class CheckpointStore:
    """The checkpoints of one stage of one run in one folder. One process writes; reading needs no lock.

    Args:
        folder: made if need be.
        run_id: whose checkpoints these are.
        stage: whose checkpoints these are.
        shard_bytes: a save copies at most this much, or the largest tensor if that is larger.

    Raises:
        CheckpointUnwritable: the folder cannot be made or cleared of what dead writers left.
    """

    def __init__(self, folder: Path, run_id: str, stage: int, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.run_id, self.stage, self.shard_bytes = folder, run_id, stage, shard_bytes
        with _unwritable(f"checkpoint folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> int:
        """Write a checkpoint, replacing one of the same step; its size in bytes.

        Raises:
            CheckpointUnwritable: disk full or refused; nothing half-written remains and the others are untouched.
        """
        with _unwritable(f"checkpoint of step {step} in {self.folder}"), self._temporary() as temporary:
            files = [_write_shard(temporary, number, shard) for number, shard in enumerate(self._shards(tensors))]
            manifest = _Manifest(
                run_id=self.run_id,
                stage=self.stage,
                step=step,
                software_version=_software_version(),
                files=tuple(files),
            )
            _write_durably(temporary / _MANIFEST, manifest.model_dump_json(indent=1).encode())
            _flush(temporary)
            self._discard(step)
            temporary.rename(self._path(step))
            _flush(self.folder)
        return sum(file.size_bytes for file in files)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending: a readable manifest and every file at its full size."""
        found = (int(match[1]) for path in self.folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name)))
        return sorted(step for step in found if self._is_complete(step))

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """All tensors of a checkpoint, on `device`.

        Raises:
            CheckpointInvalid: missing, damaged, or of another run or stage.
        """
        manifest, tensors = self._manifest(step), dict[str, Tensor]()
        for file in manifest.files:
            path = self._path(step) / file.name
            try:
                if _sha256(path) != file.sha256:
                    raise CheckpointInvalid(f"{path} does not match its hash")
                tensors |= load_file(path, device=str(device))
            except (OSError, SafetensorError) as problem:
                raise CheckpointInvalid(f"{path} cannot be read: {problem}") from problem
        return tensors

    def files(self, step: int) -> list[tuple[str, int, bytes]]:
        """Name, size in bytes and SHA-256 of every file of a checkpoint, the manifest last: together they are a copy.

        Raises:
            CheckpointInvalid: missing, or of another run or stage.
        """
        manifest = self._manifest(step)
        raw = self._read_manifest(step)
        listed = [(file.name, file.size_bytes, bytes.fromhex(file.sha256)) for file in manifest.files]
        return [*listed, (_MANIFEST, len(raw), hashlib.sha256(raw).digest())]

    def open_file(self, step: int, name: str) -> BinaryIO:
        """One file of a checkpoint, for reading. Only names that `files` lists are opened.

        Raises:
            CheckpointInvalid: there is no such file.
        """
        if name not in {listed for listed, _, _ in self.files(step)}:
            raise CheckpointInvalid(f"the checkpoint of step {step} has no file {name!r}")
        try:
            return os.fdopen(os.open(self._path(step) / name, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError as problem:
            raise CheckpointInvalid(f"{name} of step {step} cannot be opened: {problem}") from problem

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they belong to a past that is being redone.

        Raises:
            CheckpointUnwritable: the disk refuses.
        """
        self._discard(*(saved for saved in self.steps() if saved > step))

    def prune(self, keep_from_step: int) -> None:
        """Remove what nobody can need: keeps every checkpoint from a step on and the newest at or before it.

        Raises:
            CheckpointUnwritable: the disk refuses.
        """
        steps = self.steps()
        oldest_needed = max((step for step in steps if step <= keep_from_step), default=keep_from_step)
        self._discard(*(step for step in steps if step < oldest_needed))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _shards(self, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Tensors in name order, cut so that no shard exceeds the bound unless one tensor does."""
        shard, size_bytes = dict[str, Tensor](), 0
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            if shard and size_bytes + tensor.nbytes > self.shard_bytes:
                yield shard
                shard, size_bytes = {}, 0
            shard[name] = tensor
            size_bytes += tensor.nbytes
        if shard:
            yield shard

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A locked folder to write in; whatever is left of it in the end is removed."""
        path = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def _discard(self, *steps: int) -> None:
        """Out of sight first, in one move: a removal that is cut short must not look like a checkpoint."""
        for step in steps:
            with _unwritable(f"removing the checkpoint of step {step}"), self._temporary() as trash:
                if self._path(step).exists():
                    self._path(step).rename(trash / "removed")

    def _read_manifest(self, step: int) -> bytes:
        try:
            return (self._path(step) / _MANIFEST).read_bytes()
        except OSError as problem:
            raise CheckpointInvalid(f"checkpoint of step {step} in {self.folder} cannot be read") from problem

    def _manifest(self, step: int) -> _Manifest:
        path = self._path(step)
        try:
            manifest = _Manifest.model_validate_json(self._read_manifest(step))
        except ValidationError as problem:
            raise CheckpointInvalid(f"the manifest of {path} is damaged") from problem
        if (manifest.run_id, manifest.stage, manifest.step) != (self.run_id, self.stage, step):
            raise CheckpointInvalid(
                f"{path} is step {manifest.step} of stage {manifest.stage} of run {manifest.run_id}, "
                f"not step {step} of stage {self.stage} of run {self.run_id}"
            )
        return manifest

    def _is_complete(self, step: int) -> bool:
        path = self._path(step)
        try:
            manifest = _Manifest.model_validate_json((path / _MANIFEST).read_bytes())
            return all((path / file.name).stat().st_size == file.size_bytes for file in manifest.files)
        except (OSError, ValidationError):
            return False


def _write_shard(folder: Path, number: int, shard: Mapping[str, Tensor]) -> _ManifestFile:
    name = f"state-{number:05d}.safetensors"
    path = folder / name
    save_file({key: tensor.cpu().contiguous() for key, tensor in shard.items()}, path)
    _flush(path)
    return _ManifestFile(name=name, size_bytes=path.stat().st_size, sha256=_sha256(path))


def _write_durably(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _flush(path)


def _flush(path: Path) -> None:
    """Until the disk has it: a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders whose writer is dead: nobody holds their lock."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # its writer lives
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _unwritable(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise CheckpointUnwritable(f"{what} cannot be written: {problem}") from problem


def _software_version() -> str:
    try:
        return metadata.version("resbm-node")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
