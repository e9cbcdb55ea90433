"""Peers that give away their stage's state over real gRPC, some of them honest."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from resbm_pb import stage_pb2
from torch import Tensor

from stage_server.checkpoint import CheckpointStore
from stage_server.server import ServedStage, StageServer, StageService
from stage_server.state_listing import StateListing
from stage_server.state_plan import chunks_of
from stage_server.state_serving import StateLimits

RUN_ID = "0123456789abcdef"
LINEAGE = "history"
STEP = 4

Request = tuple[str, int]
"""(file, offset in bytes) of a chunk that was asked for."""


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Fourteen files of a few bytes, and one of three chunks."""
    generator = torch.Generator().manual_seed(seed)
    small = {f"small-{number:02d}": torch.randn(3, generator=generator) for number in range(14)}
    return small | {"large": torch.randn(600_000, generator=generator)}


def _saved(folder: Path, run_id: str, step: int, lineage: str) -> Path:
    """A copy of a checkpoint: writing one safely takes longer than many tests."""
    if (key := (run_id, step, lineage)) not in _SAVED:
        with tempfile.TemporaryDirectory() as place:
            store = CheckpointStore(Path(place), run_id, 1, shard_bytes=8)
            store.save(step, tensors(step), lineage)
            _SAVED[key] = {path.name: path.read_bytes() for path in (Path(place) / f"step-{step:08d}").iterdir()}
    copy = folder / "incoming"
    copy.mkdir()
    for name, data in _SAVED[key].items():
        (copy / name).write_bytes(data)
    return copy


_SAVED: dict[tuple[str, int, str], dict[str, bytes]] = {}


@dataclass
class Peer(StageService):
    """A peer with checkpoints, and how it behaves. An honest one by default.

    `on_list` gets each listing before it goes; `on_fetch` runs before a chunk is given, with the number of chunks asked
    for so far.
    """

    folder: Path
    run_id: str = RUN_ID
    lineage: str = LINEAGE
    steps: tuple[int, ...] = (STEP,)
    limits: StateLimits = field(default_factory=StateLimits)
    on_list: Callable[[stage_pb2.ListStateReply], Awaitable[None]] | None = None
    on_fetch: Callable[[int], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        super().__init__(self.limits)
        self.store = CheckpointStore(self.folder, self.run_id, 1, shard_bytes=8)
        for step in self.steps:
            self.store.adopt(_saved(self.folder, self.run_id, step, self.lineage))
        self.requests: list[Request] = []
        self.endpoint = ""
        self._death: asyncio.Future[None] | None = None
        self.attach(ServedStage(self.run_id, stage_pb2.DescribeReply, no_links, self.store))
        self.server = StageServer(self, max_frame_bytes=1 << 20)

    async def ListState(self, request: stage_pb2.ListStateRequest, context: Any) -> stage_pb2.ListStateReply:
        reply = await super().ListState(request, context)
        if self.on_list:
            await self.on_list(reply)
        return reply

    async def FetchState(self, request: stage_pb2.FetchStateRequest, context: Any) -> None:
        self.requests.append((request.name, request.offset_bytes))
        if self.on_fetch:
            await self.on_fetch(len(self.requests))
        await super().FetchState(request, context)

    def die(self) -> None:
        """Ends the server from outside its handlers: they are cancelled by it."""
        self._death = self._death or asyncio.ensure_future(self.server.stop(0))

    async def stop(self) -> None:
        self.die()
        assert self._death
        await self._death

    def spoil(self) -> None:
        """From now on it lists the true hashes and sends other bytes."""
        listing = self.store.listing(self.steps[-1])
        for file in listing.files:
            path = self.folder / f"step-{self.steps[-1]:08d}" / file.name
            path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()[:100]) + path.read_bytes()[100:])


async def no_links(stream: object) -> None: ...


@asynccontextmanager
async def serving(*peers: Peer) -> Any:
    """While they listen. Yields their endpoints."""
    async with AsyncExitStack() as stack:
        for peer in peers:
            port = await peer.server.start("127.0.0.1", 0)
            stack.push_async_callback(peer.stop)
            peer.endpoint = f"127.0.0.1:{port}"
        yield [peer.endpoint for peer in peers]


def run(scenario: Awaitable[None]) -> None:
    """Bounded in time."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario

    asyncio.run(bounded())


def all_chunks(listing: StateListing) -> set[Request]:
    return {(chunk.name, chunk.offset_bytes) for file in listing.files for chunk in chunks_of(file)}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
