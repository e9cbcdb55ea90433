"""Getting a stage's state from the peer that serves it: listed, in order, resumable, verified."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path

import grpc
from resbm_pb import stage_pb2
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stage_server.errors import CheckpointInvalid, LinkLost
from stage_server.grpc_links import channel_options, stub

MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
ATTEMPTS = 5  # of one file; each goes on where the one before stopped


async def fetch_state(endpoint: str, run_id: str, folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Downloads the newest state (at or before `step`) of the peer at `endpoint` into `folder` and returns its tensors.

    Files that are in `folder` already are not fetched again, broken ones go on where they stopped.

    Raises:
        LinkLost: the peer cannot be reached, or not for long enough.
        CheckpointInvalid: what came does not match its hash.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    async with grpc.aio.insecure_channel(endpoint, options=channel_options(0)) as channel:
        try:
            listed = await stub(channel).ListState(stage_pb2.ListStateRequest(run_id=run_id, step=step))
        except grpc.aio.AioRpcError as error:
            raise LinkLost(f"{endpoint} does not list its state: {error.details()}") from error
        for file in listed.files:
            request = stage_pb2.FetchStateRequest(run_id=run_id, step=listed.step, name=file.name)
            await _fetch_file(channel, request, file, _inside(folder, file.name))
    return await asyncio.to_thread(_load, [folder / file.name for file in listed.files if file.name != MANIFEST])


def _load(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise CheckpointInvalid(f"{path.name} holds no tensors: {error}") from error
    return tensors


async def _fetch_file(
    channel: grpc.aio.Channel, request: stage_pb2.FetchStateRequest, file: stage_pb2.StateFile, path: Path
) -> None:
    last: grpc.aio.AioRpcError | None = None
    for _ in range(ATTEMPTS):
        request.offset_bytes = _size(path)
        try:
            if request.offset_bytes < file.size_bytes:
                await _append(channel, request, path, file.size_bytes)
        except grpc.aio.AioRpcError as error:
            last = error
            continue
        if _sha256(path) == file.sha256:
            return
        await asyncio.to_thread(path.unlink, missing_ok=True)
        raise CheckpointInvalid(f"{file.name} of step {request.step} does not match the hash that its peer stated")
    raise LinkLost(f"{file.name} could not be fetched in {ATTEMPTS} attempts: {last.details() if last else 'no bytes'}")


async def _append(channel: grpc.aio.Channel, request: stage_pb2.FetchStateRequest, path: Path, size: int) -> None:
    with path.open("ab") as out:
        async for chunk in stub(channel).FetchState(request):
            if chunk.offset_bytes != out.tell():
                raise CheckpointInvalid(f"{request.name} came with a gap at byte {out.tell()}")
            if out.tell() + len(chunk.data) > size:
                raise CheckpointInvalid(f"{request.name} is longer than the {size} bytes that its peer stated")
            out.write(chunk.data)


def _inside(folder: Path, name: str) -> Path:
    """A peer's file name is no path: it must not lead out of the folder."""
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointInvalid(f"a state file called {name!r}")
    return folder / name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
