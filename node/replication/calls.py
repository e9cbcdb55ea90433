"""Calls between the replicas of a stage over gRPC: both ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from resbm_pb import replicas_pb2
from resbm_pb.replicas_pb2_grpc import ReplicasServicer, ReplicasStub, add_ReplicasServicer_to_server

from coordinator.agreement import Round
from node.replication.messages import ReplicaWord, decode_round, decode_word, encode_round, encode_word
from stage_server.errors import CorruptFrame, LinkLost, ProtocolViolation, StageError, WrongRun, WrongStage
from stage_server.grpc_links import abort, channel_options

if TYPE_CHECKING:
    from resbm_pb.replicas_pb2_grpc import ReplicasAsyncStub  # exists in the type stubs alone

PREPARE_LIMIT = timedelta(seconds=60)

Reply = TypeVar("Reply")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A state that a replica has put on its disk for another to fetch."""

    step: int
    lineage: str


class Line(Protocol):
    """A way to one other replica."""

    async def agree(self, word: ReplicaWord, proposed: Round | None, within: timedelta) -> ReplicaWord:
        """Tells this replica's word and hears the other's. Raises LinkLost, or the other's refusal."""

    async def prepare_state(self) -> Prepared:
        """Asks for a copy of the other's state. Raises LinkLost, or the other's refusal."""

    async def close(self) -> None:
        """Hangs up."""


class GrpcLine:
    """To the replica at "host:port"."""

    def __init__(self, endpoint: str, run_id: str, stage: int) -> None:
        self._run_id, self._stage = run_id, stage
        self._channel = grpc.aio.insecure_channel(endpoint, options=channel_options(0))
        self._stub: ReplicasAsyncStub = ReplicasStub(self._channel)

    async def agree(self, word: ReplicaWord, proposed: Round | None, within: timedelta) -> ReplicaWord:
        request = replicas_pb2.AgreeRequest(
            run_id=self._run_id,
            stage=self._stage,
            sender=encode_word(word),
            round=None if proposed is None else encode_round(proposed),
        )
        try:
            reply = await self._stub.Agree(request, timeout=within.total_seconds())
        except grpc.aio.AioRpcError as error:
            raise LinkLost(f"a replica does not answer: {error.details()}") from None
        if reply is None:  # gRPC's way to say that the bytes are no message
            raise CorruptFrame("a replica's answer is no message")
        return decode_word(reply.replica)

    async def prepare_state(self) -> Prepared:
        request = replicas_pb2.PrepareStateRequest(run_id=self._run_id, stage=self._stage)
        try:
            reply = await self._stub.PrepareState(request, timeout=PREPARE_LIMIT.total_seconds())
        except grpc.aio.AioRpcError as error:
            raise LinkLost(f"a replica gives no state: {error.details()}") from None
        if reply is None:
            raise CorruptFrame("a replica's answer is no message")
        return Prepared(reply.step, reply.lineage)

    async def close(self) -> None:
        await self._channel.close()


class ReplicaHost(Protocol):
    """What calls from outside reach."""

    run_id: str
    stage: int

    def hear(self, word: ReplicaWord, proposed: Round | None) -> ReplicaWord:
        """Another replica's word, and its proposal if it makes one; returns this replica's word.

        Raises LinkLost: this replica has left.
        """

    async def prepare_state(self) -> Prepared:
        """Puts the committed state on disk. Raises StageError where it cannot."""


class ReplicaService(ReplicasServicer):
    """Translates calls; decides nothing. Until `attach`, calls are answered "unavailable"."""

    def __init__(self) -> None:
        self._host: ReplicaHost | None = None

    def attach(self, host: ReplicaHost) -> None:
        """From now on calls reach this replica."""
        self._host = host

    def add_to(self, server: grpc.aio.Server) -> None:
        """Makes the server answer these calls."""
        add_ReplicasServicer_to_server(self, server)

    async def Agree(self, request: replicas_pb2.AgreeRequest, context: Context) -> replicas_pb2.AgreeReply:
        async def answer(host: ReplicaHost) -> replicas_pb2.AgreeReply:
            proposed = decode_round(request.round) if request.HasField("round") else None
            return replicas_pb2.AgreeReply(replica=encode_word(host.hear(decode_word(request.sender), proposed)))

        return await self._answer(request.run_id, request.stage, context, answer)

    async def PrepareState(
        self, request: replicas_pb2.PrepareStateRequest, context: Context
    ) -> replicas_pb2.PrepareStateReply:
        async def answer(host: ReplicaHost) -> replicas_pb2.PrepareStateReply:
            prepared = await host.prepare_state()
            return replicas_pb2.PrepareStateReply(step=prepared.step, lineage=prepared.lineage)

        return await self._answer(request.run_id, request.stage, context, answer)

    async def _answer(
        self, run_id: str, stage: int, context: Context, answer: Callable[[ReplicaHost], Awaitable[Reply]]
    ) -> Reply:
        try:
            if self._host is None:
                raise LinkLost("this peer has no stage yet, or shares none")
            if run_id != self._host.run_id:
                raise WrongRun(f"this peer serves run {self._host.run_id!r}, not {run_id!r}")
            if stage != self._host.stage:
                raise WrongStage(f"this peer serves stage {self._host.stage}, not {stage}")
            return await answer(self._host)
        except StageError as error:
            await abort(context, error)
            raise ProtocolViolation("not reached: abort raises") from error
