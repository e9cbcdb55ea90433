"""Giving a stage's state to peers that join: listed, in parts, and no faster than training can bear."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from resbm_pb import stage_pb2

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid, LinkLost, StateBusy
from stage_server.state_limits import DownloadSlots, TokenBucket
from stage_server.state_listing import CHUNK_BYTES, StateListing, to_reply

PIECE_BYTES: Final = 64 << 10  # of one message: so little that a frame of training need not wait long behind it
BURST_SECONDS: Final = 0.05
PIN: Final = timedelta(seconds=60)  # a state stays readable for so long after the last byte of it was asked for
MAX_CALLS_PER_DOWNLOAD: Final = 4

Send = Callable[[stage_pb2.StateChunk], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class StateLimits:
    """What giving away state may take from a peer. `bytes_per_second` is shared by all downloads; None: no limit."""

    bytes_per_second: float | None = None
    max_downloads: int = 4
    keep_place: timedelta = timedelta(seconds=5)  # for one who has no call open: between two chunks
    stall_limit: timedelta = timedelta(seconds=30)  # a caller that takes no byte for so long is cut off


class StateServing:
    """Answers ListState and FetchState for whatever checkpoints it is given; counts who downloads."""

    def __init__(self, limits: StateLimits) -> None:
        self._limits = limits
        self._slots = DownloadSlots(limits.max_downloads, MAX_CALLS_PER_DOWNLOAD, limits.keep_place.total_seconds())
        self._listing = asyncio.Lock()
        rate = limits.bytes_per_second
        self._bucket = TokenBucket(rate, max(2 * PIECE_BYTES, int(rate * BURST_SECONDS))) if rate else None

    async def list_state(
        self, checkpoints: CheckpointStore, request: stage_pb2.ListStateRequest
    ) -> stage_pb2.ListStateReply:
        """Raises CheckpointInvalid: there is no such state, or it is damaged."""
        async with self._listing:  # it may read gigabytes: one thread does, whoever else asks
            listing = await asyncio.to_thread(_newest, checkpoints, request)
        checkpoints.pin(listing.step, PIN)
        return to_reply(listing)

    async def fetch_state(
        self, checkpoints: CheckpointStore, request: stage_pb2.FetchStateRequest, downloader: str, send: Send
    ) -> None:
        """Sends what is asked for. `downloader` names the caller's connection.

        Raises:
            StateBusy: too many download already.
            CheckpointInvalid: there is no such state, or not so many bytes of it.
            LinkLost: the caller takes no bytes.
        """
        if not self._slots.enter(downloader, time.monotonic()):
            raise StateBusy(f"{self._limits.max_downloads} peers download this state already, or this one too often")
        try:
            await self._send_part(checkpoints, request, send)
        finally:
            self._slots.leave(downloader, time.monotonic())

    async def _send_part(self, checkpoints: CheckpointStore, request: stage_pb2.FetchStateRequest, send: Send) -> None:
        offset = request.offset_bytes
        while data := await asyncio.to_thread(_read, checkpoints, request, offset):
            checkpoints.pin(request.step, PIN)
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                await self._take_turn(len(piece))
                await self._send(send, stage_pb2.StateChunk(offset_bytes=offset + at, data=piece))
            offset += len(data)

    async def _take_turn(self, num_bytes: int) -> None:
        if self._bucket:
            await asyncio.sleep(self._bucket.wait_seconds(num_bytes, time.monotonic()))

    async def _send(self, send: Send, chunk: stage_pb2.StateChunk) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_limit.total_seconds()):
                await send(chunk)
        except TimeoutError:
            raise LinkLost("the caller takes no bytes") from None


def _newest(checkpoints: CheckpointStore, request: stage_pb2.ListStateRequest) -> StateListing:
    newest = request.step if request.HasField("step") else None
    lineage = request.lineage if request.HasField("lineage") else None
    for step in reversed(checkpoints.steps()):
        if (newest is None or step <= newest) and lineage in (None, checkpoints.lineage(step)):
            return checkpoints.listing(step)
    raise CheckpointInvalid(
        "this peer has no checkpoint"
        + ("" if newest is None else f" up to step {newest}")
        + ("" if lineage is None else f" of lineage {lineage!r}")
    )


def _read(checkpoints: CheckpointStore, request: stage_pb2.FetchStateRequest, offset: int) -> bytes:
    """At most CHUNK_BYTES of what is asked for, from `offset` on; nothing at its end."""
    with checkpoints.open_file(request.step, request.name, request.sha256) as file:
        size = file.seek(0, os.SEEK_END)
        if offset > size:
            raise CheckpointInvalid(f"{request.name} ends at byte {size}, before byte {offset}")
        file.seek(offset)
        end = request.offset_bytes + request.length_bytes if request.length_bytes else size
        return file.read(min(CHUNK_BYTES, end - offset))
