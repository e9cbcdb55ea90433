"""The gRPC server around one stage: Describe, Link, state, health and reflection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from resbm_pb import stage_pb2
from resbm_pb.stage_pb2_grpc import StageServicer, add_StageServicer_to_server

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid, LinkLost, PortTaken, StageError, WrongRun
from stage_server.grpc_links import ServerStream, abort, server_options
from stage_server.links import FrameStream

CHUNK_BYTES = 1 << 20
MAX_CONCURRENT_CALLS = 64
SERVICE = "resbm.v1.Stage"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServedStage:
    """What the server needs of the stage behind it."""

    run_id: str
    describe: Callable[[], stage_pb2.DescribeReply]
    serve_link: Callable[[FrameStream], Awaitable[None]]
    checkpoints: CheckpointStore


class StageService(StageServicer):
    """Translates calls; decides nothing.

    It listens before its stage is known, because a peer announces its address when it asks for a place; until
    `attach`, calls are answered "unavailable".
    """

    def __init__(self) -> None:
        self._stage: ServedStage | None = None

    def attach(self, stage: ServedStage) -> None:
        """From now on calls reach this stage."""
        self._stage = stage

    async def Describe(self, request: stage_pb2.DescribeRequest, context: Context) -> stage_pb2.DescribeReply:
        return (await self._ready(context)).describe()

    async def Link(self, request_iterator: AsyncIterator[stage_pb2.UpstreamFrame], context: Context) -> None:  # type: ignore[override]
        stage = await self._ready(context)
        stream = ServerStream(context)
        await stage.serve_link(stream)
        await stream.finish()

    async def ListState(self, request: stage_pb2.ListStateRequest, context: Context) -> stage_pb2.ListStateReply:
        stage = await self._ready(context)
        newest = request.step if request.HasField("step") else None
        try:
            _check_run(stage, request.run_id)
            step, files = await asyncio.to_thread(_list, stage.checkpoints, newest)
        except StageError as error:
            await abort(context, error)
            raise
        entries = (stage_pb2.StateFile(name=n, size_bytes=size, sha256=digest) for n, size, digest in files)
        return stage_pb2.ListStateReply(step=step, files=entries)

    async def FetchState(
        self, request: stage_pb2.FetchStateRequest, context: Context
    ) -> AsyncIterator[stage_pb2.StateChunk]:
        stage = await self._ready(context)
        try:
            _check_run(stage, request.run_id)
            file = await asyncio.to_thread(_open, stage.checkpoints, request)
        except StageError as error:
            await abort(context, error)
            raise
        with file:
            offset = request.offset_bytes
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield stage_pb2.StateChunk(offset_bytes=offset, data=data)
                offset += len(data)

    async def _ready(self, context: Context) -> ServedStage:
        if self._stage is None:
            await abort(context, LinkLost("this peer has no stage yet"))
            raise LinkLost("not reached: abort raises")
        return self._stage


def _check_run(stage: ServedStage, run_id: str) -> None:
    if run_id != stage.run_id:
        raise WrongRun(f"this peer serves run {stage.run_id!r}, not {run_id!r}")


def _list(checkpoints: CheckpointStore, newest: int | None) -> tuple[int, list[tuple[str, int, bytes]]]:
    steps = [step for step in checkpoints.steps() if newest is None or step <= newest]
    if not steps:
        raise CheckpointInvalid("this peer has no checkpoint" + ("" if newest is None else f" up to step {newest}"))
    return steps[-1], checkpoints.files(steps[-1])


def _open(checkpoints: CheckpointStore, request: stage_pb2.FetchStateRequest) -> BinaryIO:
    """The file asked for, at the place asked for."""
    file = checkpoints.open_file(request.step, request.name)
    size = file.seek(0, os.SEEK_END)
    if request.offset_bytes > size:
        file.close()
        raise CheckpointInvalid(f"{request.name} ends at byte {size}, before byte {request.offset_bytes}")
    file.seek(request.offset_bytes)
    return file


class StageServer:
    """The listening server. `start` returns the port; `stop` ends every call."""

    def __init__(self, service: StageService, max_frame_bytes: int) -> None:
        self._server = grpc.aio.server(
            options=server_options(max_frame_bytes), maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS
        )
        self._health = health.aio.HealthServicer()
        add_StageServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listens on host:port (0: any free one) and returns the port. Raises PortTaken."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise PortTaken(f"cannot listen on {host}:{port}") from error
        if bound == 0:
            raise PortTaken(f"cannot listen on {host}:{port}")
        await self._server.start()
        await self.set_serving(True)
        return bound

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service answers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, status)
        await self._health.set("", status)

    async def stop(self, grace_seconds: float = 0.5) -> None:
        await self.set_serving(False)
        await self._server.stop(grace_seconds)
