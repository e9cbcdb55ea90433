"""One suite for every transport: what a link promises over gRPC it promises in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from resbm_pb import stage_pb2

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CorruptFrame, LinkLost, NeighbourStateLost, StateLost, WrongStage
from stage_server.grpc_links import GrpcDialer
from stage_server.links import Dialer, FrameStream
from stage_server.memory_links import MemoryNetwork
from stage_server.server import ServedStage, StageServer, StageService

MIB = 1 << 20
Handler = Callable[[FrameStream], Awaitable[None]]


@asynccontextmanager
async def memory(handler: Handler, _folder: Path) -> AsyncIterator[tuple[Dialer, str]]:
    network = MemoryNetwork()
    network.listen("peer", handler)
    yield network, "peer"
    await network.close()


@asynccontextmanager
async def grpc(handler: Handler, folder: Path) -> AsyncIterator[tuple[Dialer, str]]:
    service = StageService()
    service.attach(ServedStage("run", stage_pb2.DescribeReply, handler, CheckpointStore(folder, "run", 0)))
    server = StageServer(service, max_frame_bytes=MIB)
    port = await server.start("127.0.0.1", 0)
    yield GrpcDialer(MIB), f"127.0.0.1:{port}"
    await server.stop()


TRANSPORTS = pytest.mark.parametrize("transport", [memory, grpc], ids=["memory", "grpc"])


def latents(step: int, payload: bytes = b"") -> stage_pb2.UpstreamFrame:
    message = stage_pb2.Latents(step=step)
    message.latents.values = payload
    return stage_pb2.UpstreamFrame(latents=stage_pb2.LatentsFrame(microbatches=[message]))


def gradients(step: int) -> stage_pb2.DownstreamFrame:
    return stage_pb2.DownstreamFrame(gradients=stage_pb2.GradientsFrame(microbatches=[stage_pb2.Gradients(step=step)]))


def run(coroutine: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await coroutine

    asyncio.run(bounded())


async def echo(stream: FrameStream) -> None:
    """Answers every latents frame with a gradients frame of the same step."""
    try:
        while True:
            frame = await stream.receive()
            assert isinstance(frame, stage_pb2.UpstreamFrame)
            await stream.send(gradients(frame.latents.microbatches[0].step))
    except LinkLost:
        return


@TRANSPORTS
def test_frames_arrive_whole_and_in_order_both_ways(transport, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with transport(echo, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)

            async def send_all() -> None:
                for step in range(1, 201):
                    await stream.send(latents(step, bytes([step % 256]) * (step * 100)))

            sending = asyncio.create_task(send_all())
            answers = [(await stream.receive()).gradients.microbatches[0].step for _ in range(200)]
            assert answers == list(range(1, 201))
            await sending
            await stream.close()

    run(scenario())


@TRANSPORTS
def test_a_large_frame_within_the_limit_passes(transport, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with transport(echo, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)
            await stream.send(latents(7, bytes(MIB)))
            assert (await stream.receive()).gradients.microbatches[0].step == 7
            await stream.close()

    run(scenario())


@TRANSPORTS
def test_nobody_at_the_address_is_a_lost_link(transport, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("stage_server.grpc_links.CONNECT_SECONDS", 0.5)

    async def scenario() -> None:
        async with transport(echo, tmp_path) as (dialer, _):
            with pytest.raises(LinkLost):
                await dialer.dial("127.0.0.1:1")

    run(scenario())


@TRANSPORTS
def test_a_closed_stream_is_a_lost_link_on_both_ends(transport, tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def handler(stream: FrameStream) -> None:
        try:
            while True:
                await stream.receive()
        finally:
            ended.set()

    async def quiet(stream: FrameStream) -> None:
        try:
            await handler(stream)
        except LinkLost:
            return

    async def scenario() -> None:
        async with transport(quiet, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)
            await stream.send(latents(1))
            await stream.close()
            await stream.close()  # twice is allowed
            with pytest.raises(LinkLost):
                await stream.receive()
            with pytest.raises(LinkLost):
                await stream.send(latents(2))
            await ended.wait()

    run(scenario())


@TRANSPORTS
@pytest.mark.parametrize(
    ("reason", "seen"),
    [
        (CorruptFrame("the checksum does not match"), LinkLost),
        (WrongStage("stage 5 is no neighbour"), LinkLost),
        (NeighbourStateLost("too old"), StateLost),
    ],
)
def test_a_refusal_by_the_answering_end_says_why(transport, tmp_path: Path, reason, seen) -> None:
    async def refuse(stream: FrameStream) -> None:
        await stream.receive()
        await stream.close(reason)

    async def scenario() -> None:
        async with transport(refuse, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)
            await stream.send(latents(1))
            with pytest.raises(seen, match=str(reason)):
                await stream.receive()
            await stream.close()

    run(scenario())


@TRANSPORTS
def test_a_refusal_by_the_dialling_end_says_why(transport, tmp_path: Path) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()

    async def listen(stream: FrameStream) -> None:
        try:
            frame = await stream.receive()
            assert isinstance(frame, stage_pb2.UpstreamFrame)
            told.put_nowait(frame.goodbye.detail)
        except StateLost as error:
            told.put_nowait(error.cause)

    async def scenario() -> None:
        async with transport(listen, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)
            await stream.close(NeighbourStateLost("nobody keeps frames that old"))
            assert "nobody keeps frames that old" in await told.get()

    run(scenario())


@TRANSPORTS
def test_a_slow_reader_makes_the_sender_wait(transport, tmp_path: Path) -> None:
    async def never_read(stream: FrameStream) -> None:
        await asyncio.sleep(3600)

    async def scenario() -> None:
        async with transport(never_read, tmp_path) as (dialer, endpoint):
            stream = await dialer.dial(endpoint)
            sent = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    for _ in range(10_000):
                        await stream.send(latents(1, bytes(64 << 10)))
                        sent += 1
            assert sent < 2_000  # 128 MiB would mean that nothing bounds the memory of a stalled link
            await stream.close()

    run(scenario())
