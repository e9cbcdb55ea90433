"""Committed states of one stage on disk: complete or absent, never half.

    <folder>/step-00000010/manifest.json               run, stage, step, lineage, and size and SHA-256 of each file
    <folder>/step-00000010/state-00000.safetensors     tensors in name order, in shards of bounded size
    <folder>/.writing-...                              a writer at work (it holds a lock), or what a dead one left
    <folder>/.pinned-00000010                          withdrawn, but somebody is still downloading it
    <folder>/incoming                                  a state on its way from other peers (fetch.py)

A checkpoint is written beside the others, flushed to the disk, and renamed into place. Its files but the manifest
depend on nothing but the tensors: replicas that hold the same bits write the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage_server.errors import CheckpointInvalid
from stage_server.manifest import (
    Manifest,
    ManifestFile,
    flush,
    read_manifest,
    software_version,
    unwritable,
    write_manifest,
)
from stage_server.pins import Pins
from stage_server.state_listing import StateFile, StateListing, hash_file

SHARD_BYTES: Final = 64 * 2**20
COMMON_KEPT: Final = 2  # whoever copies the newest may not be done when the next one is written
COMMON_AGE: Final = timedelta(minutes=1)  # a copy may be being made of one that is younger
_STEP_FOLDER: Final = re.compile(r"step-(\d{8,})")
_TEMPORARY: Final = ".writing-"
_WITHDRAWN: Final = ".pinned-"
_MAX_REMEMBERED: Final = 4  # checkpoints whose chunks' hashes are kept in memory


class CheckpointStore:
    """The checkpoints of one stage of one run in one folder. One process writes; reading needs no lock.

    Args:
        folder: made if need be.
        run_id: whose checkpoints these are.
        stage: whose checkpoints these are.
        shard_bytes: a save copies at most this much, or the largest tensor if that is larger.
        common_every: of the checkpoints at multiples of this step the newest two, and those of the last minute, are not
            pruned, so that all stages hold a common one to go back to, even when one has to be restored from a copy; 0:
            none is kept for that.

    Raises:
        CheckpointUnwritable: the folder cannot be made or cleared of what dead writers left.
    """

    def __init__(
        self, folder: Path, run_id: str, stage: int, *, shard_bytes: int = SHARD_BYTES, common_every: int = 0
    ) -> None:
        self.folder, self.run_id, self.stage, self.shard_bytes = folder, run_id, stage, shard_bytes
        self._common_every = common_every
        self._pins = Pins()
        self._listings: dict[Manifest, StateListing] = {}
        self._hashing = threading.Lock()
        with unwritable(f"checkpoint folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            self._sweep()

    @property
    def incoming(self) -> Path:
        """Where a download of this stage's state is collected before `adopt`; what is in it survives a restart."""
        return self.folder / "incoming"

    def save(self, step: int, tensors: Mapping[str, Tensor], lineage: str = "") -> int:
        """Write a checkpoint, replacing one of the same step; its size in bytes.

        Args:
            step: steps committed.
            tensors: weights and optimizer.
            lineage: name of the history that led to this step, at most 64 characters.

        Raises:
            CheckpointUnwritable: disk full or refused; nothing half-written remains and the others are untouched.
        """
        with unwritable(f"checkpoint of step {step} in {self.folder}"), self._temporary() as temporary:
            files = [_write_shard(temporary, number, shard) for number, shard in enumerate(self._shards(tensors))]
            manifest = Manifest(
                run_id=self.run_id,
                stage=self.stage,
                step=step,
                lineage=lineage,
                software_version=software_version(),
                files=tuple(files),
            )
            write_manifest(temporary, manifest)
            self._put(temporary, step)
        return sum(file.size_bytes for file in files)

    def adopt(self, folder: Path) -> int:
        """Make a downloaded checkpoint one of these, replacing one of the same step; its step. The folder moves.

        Raises:
            CheckpointInvalid: not a complete checkpoint of this run and stage.
            CheckpointUnwritable: the disk refuses (the folder must be on the same one).
        """
        step = read_manifest(folder).step
        self._checked(read_manifest(folder), step, folder)
        if not _is_complete(folder):
            raise CheckpointInvalid(f"{folder} lacks files that its manifest names")
        with unwritable(f"checkpoint of step {step} in {self.folder}"):
            self._put(folder, step)
        return step

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending: a readable manifest and every file at its full size."""
        found = (int(match[1]) for path in self.folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name)))
        return sorted(step for step in found if _is_complete(self._path(step)))

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

    def lineage(self, step: int) -> str:
        """The history a checkpoint belongs to; empty when its writer named none.

        Raises:
            CheckpointInvalid: missing, or of another run or stage.
        """
        return self._manifest(step).lineage

    def listing(self, step: int) -> StateListing:
        """What other peers are told of a checkpoint. Reads it all the first time: gigabytes take seconds.

        Raises:
            CheckpointInvalid: missing, damaged, or of another run or stage.
        """
        with self._hashing:  # several who ask at once wait for one reading
            manifest = self._manifest(step)
            if manifest not in self._listings:
                files = tuple(_hashed(self._path(step), file) for file in manifest.files)
                while len(self._listings) >= _MAX_REMEMBERED:
                    del self._listings[next(iter(self._listings))]
                self._listings[manifest] = StateListing(self.stage, step, manifest.lineage, files)
            return self._listings[manifest]

    def open_file(self, step: int, name: str, sha256: bytes = b"") -> BinaryIO:
        """One file of a checkpoint, for reading; with `sha256`, only that one. Only names in the manifest are opened.

        Raises:
            CheckpointInvalid: there is no such file (any more).
        """
        problem: Exception | None = None
        for folder in (self._path(step), self._withdrawn(step)):
            try:
                files = {file.name: file.sha256 for file in self._checked(read_manifest(folder), step, folder).files}
                if name in files and sha256.hex() in ("", files[name]):
                    return os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb")
            except (CheckpointInvalid, OSError) as error:
                problem = problem or error
        raise CheckpointInvalid(f"no file {name!r} of step {step}, or another one than asked for") from problem

    def pin(self, step: int, lasting: timedelta) -> bool:
        """For a while, a checkpoint stays readable even when it is pruned or discarded: somebody is downloading it.

        False when too many others are pinned. May be called from any thread.
        """
        return self._pins.pin(step, lasting)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they belong to a past that is being redone.

        Those that are pinned are no longer among the `steps`, but can be read until their pins expire.

        Raises:
            CheckpointUnwritable: the disk refuses.
        """
        self._discard(*(saved for saved in self.steps() if saved > step))

    def prune(self, keep_from_step: int) -> None:
        """Remove what nobody can need: keeps all from a step on, the newest at or before it, common and pinned ones.

        Raises:
            CheckpointUnwritable: the disk refuses.
        """
        steps = self.steps()
        oldest_needed = max((step for step in steps if step <= keep_from_step), default=keep_from_step)
        kept = {*self._pins.pinned(), *self._common(steps)}
        self._discard(*(step for step in steps if step < oldest_needed and step not in kept))
        self._sweep()

    def _common(self, steps: Sequence[int]) -> Sequence[int]:
        if not self._common_every:
            return ()
        common = [step for step in steps if step % self._common_every == 0]
        oldest = time.time() - COMMON_AGE.total_seconds()
        return [step for step in common if step in common[-COMMON_KEPT:] or self._path(step).stat().st_mtime > oldest]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _withdrawn(self, step: int) -> Path:
        return self.folder / f"{_WITHDRAWN}{step:08d}"

    def _put(self, folder: Path, step: int) -> None:
        """A complete folder becomes the checkpoint of a step."""
        self._discard(step)
        folder.rename(self._path(step))
        flush(self.folder)

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
        for step in filter(lambda step: self._path(step).exists(), steps):
            if step in self._pins.pinned():
                self._remove(self._withdrawn(step))
                with unwritable(f"withdrawing the checkpoint of step {step}"):
                    self._path(step).rename(self._withdrawn(step))
            else:
                self._remove(self._path(step))

    def _sweep(self) -> None:
        """Remove what was withdrawn and is not pinned any more."""
        for path in self.folder.glob(f"{_WITHDRAWN}*"):
            if path not in map(self._withdrawn, self._pins.pinned()):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        with unwritable(f"removing {path}"), self._temporary() as trash:
            if path.exists():
                path.rename(trash / "removed")

    def _manifest(self, step: int) -> Manifest:
        return self._checked(read_manifest(self._path(step)), step, self._path(step))

    def _checked(self, manifest: Manifest, step: int, path: Path) -> Manifest:
        if (manifest.run_id, manifest.stage, manifest.step) != (self.run_id, self.stage, step):
            raise CheckpointInvalid(
                f"{path} is step {manifest.step} of stage {manifest.stage} of run {manifest.run_id}, "
                f"not step {step} of stage {self.stage} of run {self.run_id}"
            )
        return manifest


def _is_complete(folder: Path) -> bool:
    try:
        return all((folder / file.name).stat().st_size == file.size_bytes for file in read_manifest(folder).files)
    except (OSError, CheckpointInvalid):
        return False


def _write_shard(folder: Path, number: int, shard: Mapping[str, Tensor]) -> ManifestFile:
    name = f"state-{number:05d}.safetensors"
    path = folder / name
    save_file({key: tensor.cpu().contiguous() for key, tensor in shard.items()}, path)
    flush(path)
    return ManifestFile(name=name, size_bytes=path.stat().st_size, sha256=_sha256(path))


def _hashed(folder: Path, file: ManifestFile) -> StateFile:
    try:
        with (folder / file.name).open("rb") as opened:
            whole, chunks = hash_file(opened)
    except OSError as problem:
        raise CheckpointInvalid(f"{folder / file.name} cannot be read: {problem}") from problem
    if whole.hex() != file.sha256:
        raise CheckpointInvalid(f"{folder / file.name} does not match its hash")
    return StateFile(file.name, file.size_bytes, whole, chunks)


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
