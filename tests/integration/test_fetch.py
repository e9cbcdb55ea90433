"""A stage's state from a peer that may break off, lie or attack: resumed where it stopped, believed by its hash."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from resbm_pb import stage_pb2
from resbm_pb.stage_pb2_grpc import StageServicer, add_StageServicer_to_server
from safetensors.torch import save
from torch import Tensor

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid, LinkLost
from stage_server.fetch import ATTEMPTS, fetch_state
from stage_server.server import ServedStage, StageServer, StageService

RUN_ID = "0123456789abcdef"
TENSORS = {"a": torch.arange(5000, dtype=torch.float32), "b": torch.ones(3)}
PAYLOAD = save(TENSORS)
NAME = "state-00000.safetensors"


@dataclass
class StrangePeer(StageServicer):
    """Serves `files` and lists `listed`; breaks off and lies as it is told."""

    files: dict[str, bytes]
    listed: dict[str, tuple[int, bytes]]  # name: size, sha256
    break_after: int | None = None  # bytes of one answer
    shift: int = 0  # of the stated offset
    requests: list[tuple[str, int]] = field(default_factory=list)

    async def ListState(self, request: stage_pb2.ListStateRequest, context: Any) -> stage_pb2.ListStateReply:
        files = [stage_pb2.StateFile(name=n, size_bytes=s, sha256=h) for n, (s, h) in self.listed.items()]
        return stage_pb2.ListStateReply(step=4, files=files)

    async def FetchState(
        self, request: stage_pb2.FetchStateRequest, context: Any
    ) -> AsyncIterator[stage_pb2.StateChunk]:
        self.requests.append((request.name, request.offset_bytes))
        data, sent = self.files[request.name], 0
        for place in range(request.offset_bytes, len(data), 1000):
            if self.break_after is not None and sent >= self.break_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            chunk = data[place : place + 1000]
            yield stage_pb2.StateChunk(offset_bytes=place + self.shift, data=chunk)
            sent += len(chunk)


def peer(data: bytes = PAYLOAD, **changes: Any) -> StrangePeer:
    """An honest peer with one file, but for the changes."""
    listed = {NAME: (len(PAYLOAD), hashlib.sha256(PAYLOAD).digest())}
    return StrangePeer(**({"files": {NAME: data}, "listed": listed} | changes))


def fetch(servicer: StrangePeer, folder: Path) -> dict[str, Tensor]:
    async def scenario() -> dict[str, Tensor]:
        server = grpc.aio.server()
        add_StageServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with asyncio.timeout(20):
                return await fetch_state(f"127.0.0.1:{port}", RUN_ID, folder)
        finally:
            await server.stop(0)

    return asyncio.run(scenario())


def assert_whole(tensors: dict[str, Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def with_real_server(folder: Path, scenario: Callable[[str, CheckpointStore], Awaitable[None]]) -> None:
    async def bounded() -> None:
        store = CheckpointStore(folder / "served", RUN_ID, 1, shard_bytes=8)
        for step in (2, 4):
            store.save(step, {name: tensor * step for name, tensor in TENSORS.items()})
        service = StageService()

        async def no_links(stream: object) -> None: ...

        service.attach(ServedStage(RUN_ID, stage_pb2.DescribeReply, no_links, store))
        server = StageServer(service, max_frame_bytes=1 << 20)
        port = await server.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(20):
                await scenario(f"127.0.0.1:{port}", store)
        finally:
            await server.stop(0)

    asyncio.run(bounded())


def test_the_newest_state_comes_whole_and_is_a_checkpoint_again(tmp_path: Path) -> None:
    async def scenario(endpoint: str, store: CheckpointStore) -> None:
        folder = tmp_path / "own" / "step-00000004"
        tensors = await fetch_state(endpoint, RUN_ID, folder)
        assert all(torch.equal(tensors[name], TENSORS[name] * 4) for name in TENSORS)
        assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _, _ in store.files(4))
        own = CheckpointStore(tmp_path / "own", RUN_ID, 1)
        assert own.steps() == [4]
        assert torch.equal(own.load(4)["a"], TENSORS["a"] * 4)

    with_real_server(tmp_path, scenario)


def test_an_older_state_can_be_asked_for(tmp_path: Path) -> None:
    async def scenario(endpoint: str, store: CheckpointStore) -> None:
        tensors = await fetch_state(endpoint, RUN_ID, tmp_path / "own", step=3)
        assert torch.equal(tensors["b"], TENSORS["b"] * 2)

    with_real_server(tmp_path, scenario)


@pytest.mark.parametrize(("run_id", "step"), [("another", None), (RUN_ID, 1)])
def test_state_that_the_peer_has_not_is_a_lost_link(run_id: str, step: int | None, tmp_path: Path) -> None:
    async def scenario(endpoint: str, store: CheckpointStore) -> None:
        with pytest.raises(LinkLost, match="does not list its state: E"):
            await fetch_state(endpoint, run_id, tmp_path / "own", step=step)

    with_real_server(tmp_path, scenario)


def test_nobody_there_is_a_lost_link(tmp_path: Path) -> None:
    with pytest.raises(LinkLost):
        asyncio.run(fetch_state("127.0.0.1:1", RUN_ID, tmp_path))


def test_a_file_that_is_here_in_part_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(PAYLOAD[:7777])
    servicer = peer()
    assert_whole(fetch(servicer, tmp_path))
    assert servicer.requests == [(NAME, 7777)]


def test_a_file_that_is_here_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(PAYLOAD)
    servicer = peer()
    assert_whole(fetch(servicer, tmp_path))
    assert servicer.requests == []


def test_a_transfer_that_breaks_goes_on_where_it_stopped(tmp_path: Path) -> None:
    servicer = peer(break_after=5000)
    assert_whole(fetch(servicer, tmp_path))
    assert servicer.requests == [(NAME, place) for place in range(0, len(PAYLOAD), 5000)]


def test_a_transfer_that_breaks_every_time_is_given_up_and_its_bytes_are_kept(tmp_path: Path) -> None:
    servicer = peer(break_after=1000)
    with pytest.raises(LinkLost, match="broken off"):
        fetch(servicer, tmp_path)
    assert len(servicer.requests) == ATTEMPTS
    assert (tmp_path / NAME).read_bytes() == PAYLOAD[: ATTEMPTS * 1000]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_spoiled_bytes_are_detected_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="hash") as error:
        fetch(peer(flipped(PAYLOAD, 9000)), tmp_path)
    assert error.value.code == 401
    assert not (tmp_path / NAME).exists()
    assert_whole(fetch(peer(), tmp_path))


def test_a_spoiled_part_from_before_is_detected_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(flipped(PAYLOAD[:7777], 500))
    with pytest.raises(CheckpointInvalid):
        fetch(peer(), tmp_path)
    assert_whole(fetch(peer(), tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/tmp/escaped", "a/b", "a\\b", "..", ".", "", "nul\0byte", ".hidden", "x" * 200, "UPPER", "a b"],
)
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    servicer = peer(files={name: PAYLOAD}, listed={name: (len(PAYLOAD), hashlib.sha256(PAYLOAD).digest())})
    with pytest.raises(CheckpointInvalid):
        fetch(servicer, folder)
    assert servicer.requests == []
    assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def test_a_peer_that_sends_more_than_it_stated_is_cut_off(tmp_path: Path) -> None:
    """Otherwise it could fill the disk."""
    endless = PAYLOAD + bytes(5_000_000)
    with pytest.raises(CheckpointInvalid, match="longer"):
        fetch(peer(endless), tmp_path)
    assert (tmp_path / NAME).stat().st_size <= len(PAYLOAD)


def test_a_gap_is_detected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="gap"):
        fetch(peer(shift=1), tmp_path)


@pytest.mark.parametrize(
    ("data", "stated"),
    [(b"no tensors at all", None), (b"", None), (b"", hashlib.sha256(b"other").digest()), (b"\xff" * 64, None)],
    ids=["text", "empty", "empty and lying", "absurd header"],
)
def test_a_file_of_true_hash_that_is_no_state_is_refused(data: bytes, stated: bytes | None, tmp_path: Path) -> None:
    listed = {NAME: (len(data), stated or hashlib.sha256(data).digest())}
    with pytest.raises(CheckpointInvalid):
        fetch(peer(data, listed=listed), tmp_path)
