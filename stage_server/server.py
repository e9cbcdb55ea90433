"""The gRPC server around one stage: Describe, Link, state, health and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from resbm_pb import stage_pb2
from resbm_pb.stage_pb2_grpc import StageServicer, add_StageServicer_to_server

from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid, LinkLost, PortTaken, StageError, WrongRun
from stage_server.grpc_links import ServerStream, abort, server_options
from stage_server.links import FrameStream
from stage_server.state_serving import StateLimits, StateServing

MAX_CONCURRENT_CALLS = 1024
"""Each peer of the stage before holds one for its link; those who ask for a state must still find a place."""
SERVICE = "resbm.v1.Stage"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServedStage:
    """What the server needs of the stage behind it."""

    run_id: str
    describe: Callable[[], stage_pb2.DescribeReply]
    serve_link: Callable[[FrameStream], Awaitable[None]]
    checkpoints: CheckpointStore
    copies: Callable[[int], CheckpointStore | None] = lambda _: None
    """Of another stage, what this peer keeps of its checkpoints."""

    def states(self, stage: int | None) -> CheckpointStore:
        """The checkpoints that a caller means. Raises CheckpointInvalid when there are none of that stage here."""
        if stage is None or stage == self.checkpoints.stage:
            return self.checkpoints
        copies = self.copies(stage)
        if copies is None:
            raise CheckpointInvalid(f"this peer keeps no state of stage {stage}")
        return copies


class StageService(StageServicer):
    """Translates calls; decides nothing.

    It listens before its stage is known, because a peer announces its address when it asks for a place; until
    `attach`, calls are answered "unavailable".
    """

    def __init__(self, state_limits: StateLimits | None = None) -> None:
        self._stage: ServedStage | None = None
        self._state = StateServing(state_limits or StateLimits())

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
        try:
            _check_run(stage, request.run_id)
            return await self._state.list_state(stage.states(_stage_of(request)), request)
        except StageError as error:
            await abort(context, error)
            raise

    async def FetchState(self, request: stage_pb2.FetchStateRequest, context: Context) -> None:  # type: ignore[override]
        stage = await self._ready(context)
        try:
            _check_run(stage, request.run_id)
            checkpoints = stage.states(_stage_of(request))
            await self._state.fetch_state(checkpoints, request, context.peer(), context.write)
        except StageError as error:
            await abort(context, error)
            raise

    async def _ready(self, context: Context) -> ServedStage:
        if self._stage is None:
            await abort(context, LinkLost("this peer has no stage yet"))
            raise LinkLost("not reached: abort raises")
        return self._stage


def _stage_of(request: stage_pb2.ListStateRequest | stage_pb2.FetchStateRequest) -> int | None:
    return request.stage if request.HasField("stage") else None


def _check_run(stage: ServedStage, run_id: str) -> None:
    if run_id != stage.run_id:
        raise WrongRun(f"this peer serves run {stage.run_id!r}, not {run_id!r}")


class StageServer:
    """The listening server. `start` returns the port; `stop` ends every call."""

    def __init__(
        self, service: StageService, max_frame_bytes: int, also: Sequence[Callable[[grpc.aio.Server], None]] = ()
    ) -> None:
        """`also`: what adds other services to the server."""
        self._server = grpc.aio.server(
            options=server_options(max_frame_bytes), maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS
        )
        self._health = health.aio.HealthServicer()
        add_StageServicer_to_server(service, self._server)
        for add in also:
            add(self._server)
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
