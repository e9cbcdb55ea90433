"""The stage's server as any client sees it: real gRPC on loopback, typed refusals, health and reflection."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from resbm_pb import stage_pb2
from resbm_pb.stage_pb2_grpc import StageStub

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CorruptFrame, LinkLost, PortTaken, StageError
from stage_server.grpc_links import ERROR_METADATA, MIN_MESSAGE_LIMIT_BYTES, GrpcDialer, channel_options, describe
from stage_server.links import FrameStream
from stage_server.server import ServedStage, StageServer, StageService
from stage_server.state_listing import CHUNK_BYTES

RUN_ID = "0123456789abcdef"
UINT64_MAX = 2**64 - 1
FRAME_LIMIT = MIN_MESSAGE_LIMIT_BYTES
LINK = "/resbm.v1.Stage/Link"


async def echo(stream: FrameStream) -> None:
    """A peer that answers a status with a status and refuses what is none, as a LinkSession would."""
    try:
        while True:
            frame = await stream.receive()
            await stream.send(stage_pb2.DownstreamFrame(status=frame.status))
    except StageError as error:
        await stream.close(error)


def status(number: int) -> stage_pb2.UpstreamFrame:
    return stage_pb2.UpstreamFrame(status=stage_pb2.LinkStatus(frames_sent=number))


@asynccontextmanager
async def served(folder: Path, *, attach: bool = True) -> AsyncIterator[tuple[StageServer, str, StageService]]:
    store = CheckpointStore(folder, RUN_ID, 1)
    for step in (2, 4):
        store.save(step, {"a": torch.full((700_000,), float(step)), "b": torch.ones(3)}, "first")
    service = StageService()
    stage = ServedStage(RUN_ID, lambda: stage_pb2.DescribeReply(run_id=RUN_ID, stage=1), echo, store)
    if attach:
        service.attach(stage)
    server = StageServer(service, max_frame_bytes=1 << 20)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, f"127.0.0.1:{port}", service
    finally:
        await server.stop(0)


def run(folder: Path, scenario: Callable[[StageServer, str, Any], Awaitable[None]], *, attach: bool = True) -> None:
    """The scenario gets the server, its endpoint and a channel to it."""

    async def bounded() -> None:
        async with (
            asyncio.timeout(20),
            served(folder, attach=attach) as (server, endpoint, _),
            grpc.aio.insecure_channel(endpoint, options=channel_options(0)) as channel,
        ):
            await scenario(server, endpoint, channel)

    asyncio.run(bounded())


async def fetched(channel: Any, name: str, *, offset: int = 0, length: int = 0) -> list[stage_pb2.StateChunk]:
    request = stage_pb2.FetchStateRequest(run_id=RUN_ID, step=4, name=name, offset_bytes=offset, length_bytes=length)
    return [chunk async for chunk in StageStub(channel).FetchState(request)]


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, int]:
    """(status, stable code in the trailing metadata) of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    metadata = dict(error.value.trailing_metadata() or ())
    return error.value.code(), int(metadata.get(ERROR_METADATA, 0))


# -- who is here ------------------------------------------------------------------------------------------------


def test_describe_says_who_is_here(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        reply = await describe(endpoint, timedelta(seconds=5))
        assert reply is not None
        assert (reply.run_id, reply.stage) == (RUN_ID, 1)

    run(tmp_path, scenario)


def test_before_a_stage_is_attached_calls_are_unavailable(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        unavailable = (grpc.StatusCode.UNAVAILABLE, LinkLost.code)
        calls = StageStub(channel)
        assert await refusal(calls.Describe(stage_pb2.DescribeRequest())) == unavailable
        assert await refusal(calls.ListState(stage_pb2.ListStateRequest(run_id=RUN_ID))) == unavailable
        assert await refusal(fetched(channel, "state-00000.safetensors")) == unavailable
        stream = await GrpcDialer(1 << 20).dial(endpoint)
        with pytest.raises(LinkLost, match="no stage yet"):
            await stream.receive()
        await stream.close()
        assert await describe(endpoint, timedelta(seconds=5)) is None  # somebody is there, but has no stage

    run(tmp_path, scenario, attach=False)


def test_nobody_there_is_a_lost_link() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        with pytest.raises(LinkLost):
            asyncio.run(describe(f"127.0.0.1:{taken.getsockname()[1]}", timedelta(seconds=2)))


# -- state ------------------------------------------------------------------------------------------------------


def test_state_is_listed_at_or_before_a_step(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        async def listed(**step: int) -> stage_pb2.ListStateReply:
            return await StageStub(channel).ListState(stage_pb2.ListStateRequest(run_id=RUN_ID, **step))

        newest = await listed()
        assert newest.step == 4
        (file,) = newest.files
        assert (file.name, newest.stage, newest.lineage) == ("state-00000.safetensors", 1, "first")
        whole = (tmp_path / "step-00000004" / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(whole), hashlib.sha256(whole).digest())
        chunks = [whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES)]
        assert file.chunk_sha256 == b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
        assert (await listed(step=3)).step == 2
        assert (await listed(step=UINT64_MAX)).step == 4
        assert (await listed(lineage="first")).step == 4
        other = StageStub(channel).ListState(stage_pb2.ListStateRequest(run_id=RUN_ID, lineage="second"))
        assert await refusal(other) == (grpc.StatusCode.FAILED_PRECONDITION, 401)
        none = StageStub(channel).ListState(stage_pb2.ListStateRequest(run_id=RUN_ID, step=1))
        assert await refusal(none) == (grpc.StatusCode.FAILED_PRECONDITION, 401)

    run(tmp_path, scenario)


def test_a_file_comes_in_bounded_chunks_from_any_offset(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        name = "state-00000.safetensors"
        whole = (tmp_path / "step-00000004" / name).read_bytes()
        offsets = (0, 1, CHUNK_BYTES, len(whole) - 1, len(whole))
        for offset, length in itertools.product(offsets, (0, 1, CHUNK_BYTES + 1, UINT64_MAX)):
            chunks = await fetched(channel, name, offset=offset, length=length)
            assert b"".join(chunk.data for chunk in chunks) == whole[offset:][: length or None]
            assert all(len(chunk.data) <= CHUNK_BYTES for chunk in chunks)
            place = offset
            for chunk in chunks:
                assert chunk.offset_bytes == place
                place += len(chunk.data)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "nothing"}, 401),
        ({"name": ""}, 401),
        ({"name": "../step-00000002/manifest.json"}, 401),
        ({"name": "/etc/passwd"}, 401),
        ({"name": "manifest.json"}, 401),
        ({"name": "manifest.json\0"}, 401),
        ({"step": 3}, 401),
        ({"step": UINT64_MAX}, 401),
        ({"offset_bytes": 2_800_300}, 401),
        ({"offset_bytes": UINT64_MAX}, 401),
        ({"sha256": bytes(32)}, 401),
        ({"run_id": "another"}, 202),
        ({"run_id": ""}, 202),
    ],
    ids=["unknown file", "no name", "other folder", "absolute", "manifest", "zero byte", "unknown step", "far step",
         "behind the end", "far behind the end", "another file meanwhile", "other run", "no run"],
)  # fmt: skip
def test_a_file_that_is_not_to_be_had_is_refused_with_a_code(change: dict[str, Any], code: int, tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        values = {"run_id": RUN_ID, "step": 4, "name": "state-00000.safetensors", "offset_bytes": 0} | change
        call = StageStub(channel).FetchState(stage_pb2.FetchStateRequest(**values))
        assert await refusal(call.read()) == (grpc.StatusCode.FAILED_PRECONDITION, code)
        assert await fetched(channel, "state-00000.safetensors")  # the server lives on

    run(tmp_path, scenario)


def test_state_of_another_run_is_not_listed(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        call = StageStub(channel).ListState(stage_pb2.ListStateRequest(run_id="another"))
        assert await refusal(call) == (grpc.StatusCode.FAILED_PRECONDITION, 202)

    run(tmp_path, scenario)


# -- standard services ------------------------------------------------------------------------------------------


def test_the_health_service_says_whether_it_serves(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        stub = health_pb2_grpc.HealthStub(channel)

        async def health(service: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

        for serving in (True, False, True):
            await server.set_serving(serving)
            expected = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            assert [await health(""), await health("resbm.v1.Stage")] == [expected] * 2
        assert (await refusal(health("unknown")))[0] == grpc.StatusCode.NOT_FOUND

    run(tmp_path, scenario)


def test_reflection_lists_the_stage_service(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="resbm.v1.Stage")

        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests())
        listed = await answers.read()
        names = {service.name for service in listed.list_services_response.service}
        assert {"resbm.v1.Stage", "grpc.health.v1.Health"} <= names
        assert (await answers.read()).file_descriptor_response.file_descriptor_proto

    run(tmp_path, scenario)


# -- ports and hostile callers ----------------------------------------------------------------------------------


def test_a_taken_port_is_refused_and_its_holder_goes_on(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        second = StageServer(StageService(), max_frame_bytes=1 << 20)
        with pytest.raises(PortTaken) as error:
            await second.start("127.0.0.1", int(endpoint.split(":")[1]))
        assert error.value.code == 105
        assert endpoint in error.value.cause
        await second.stop(0)
        assert await describe(endpoint, timedelta(seconds=5)) is not None

    run(tmp_path, scenario)


def test_an_address_that_is_not_ours_is_refused() -> None:
    async def scenario() -> None:
        server = StageServer(StageService(), max_frame_bytes=1 << 20)
        with pytest.raises(PortTaken):
            await server.start("192.0.2.1", 0)
        await server.stop(0)

    asyncio.run(scenario())


def test_a_port_is_free_again_after_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with served(tmp_path / "first") as (_, endpoint, _):
            pass
        server = StageServer(StageService(), max_frame_bytes=1 << 20)
        port = int(endpoint.split(":")[1])
        assert await server.start("127.0.0.1", port) == port
        await server.stop(0)

    asyncio.run(scenario())


def test_a_frame_over_the_limit_is_refused_and_the_server_lives_on(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, _: Any) -> None:
        unbounded = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(endpoint, options=unbounded) as channel:
            call = StageStub(channel).Link()
            message = stage_pb2.Latents()
            message.latents.values = bytes(FRAME_LIMIT + 1)
            await call.write(stage_pb2.UpstreamFrame(latents=stage_pb2.LatentsFrame(microbatches=[message])))
            assert (await refusal(call.read()))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        await still_answers(endpoint)

    run(tmp_path, scenario)


@pytest.mark.parametrize("junk", [b"\xff" * 40, b"\x0a\x7f\x00", b"\x08"])
def test_bytes_that_are_no_frame_are_refused_and_the_server_lives_on(junk: bytes, tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        call = channel.stream_stream(LINK)()
        await call.write(junk)
        assert await refusal(call.read()) == (grpc.StatusCode.FAILED_PRECONDITION, CorruptFrame.code)
        await still_answers(endpoint)

    run(tmp_path, scenario)


def test_bytes_that_are_no_frame_are_refused_by_the_dialling_end() -> None:
    """They must neither end its process nor keep it waiting until the link is silent for too long."""

    async def junk(request_iterator: AsyncIterator[bytes], context: Any) -> None:
        await context.write(b"\xff" * 40)
        await asyncio.sleep(3600)

    async def scenario() -> None:
        server = grpc.aio.server()
        handlers = {"Link": grpc.stream_stream_rpc_method_handler(junk)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("resbm.v1.Stage", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stream = await GrpcDialer(1 << 20).dial(f"127.0.0.1:{port}")
        with pytest.raises(CorruptFrame):
            async with asyncio.timeout(5):
                await stream.receive()
        await stream.close()
        await server.stop(0)

    asyncio.run(scenario())


def test_an_unknown_method_is_no_way_in(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        call = channel.unary_unary("/resbm.v1.Stage/Shutdown")(b"")
        assert (await refusal(call))[0] == grpc.StatusCode.UNIMPLEMENTED

    run(tmp_path, scenario)


def test_stop_ends_open_links(tmp_path: Path) -> None:
    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        stream = await GrpcDialer(1 << 20).dial(endpoint)
        await stream.send(status(1))
        await stream.receive()
        await server.stop(0)
        with pytest.raises(LinkLost):
            await stream.receive()
        await stream.close()

    run(tmp_path, scenario)


def test_a_closed_stream_that_somebody_still_knows_keeps_no_socket(tmp_path: Path) -> None:
    """gRPC keeps the connection while a call object lives, closed or not; a traceback is enough to keep one."""

    def connections() -> int:
        return len(psutil.Process().net_connections("tcp"))

    async def scenario(server: StageServer, endpoint: str, channel: Any) -> None:
        await still_answers(endpoint)
        before = connections()
        kept = [await GrpcDialer(1 << 20).dial(endpoint) for _ in range(3)]
        for stream in kept:
            await stream.send(status(1))
            await stream.receive()
        assert connections() > before
        for stream in kept:
            await stream.close()
        while connections() > before:  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)
        with pytest.raises(LinkLost, match="closed"):
            await kept[0].receive()

    gc.disable()  # it would find most of what nobody needs
    try:
        run(tmp_path, scenario)
    finally:
        gc.enable()


async def still_answers(endpoint: str) -> None:
    stream = await GrpcDialer(1 << 20).dial(endpoint)
    await stream.send(status(7))
    assert (await stream.receive()).status.frames_sent == 7
    await stream.close()
