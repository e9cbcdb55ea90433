"""One peer that is asked for its stage's state. Whatever goes wrong with it comes out as a typed error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from resbm_pb import errors_pb2 as codes
from resbm_pb import stage_pb2

from stage_server.errors import MAX_DETAIL_CHARACTERS, CheckpointInvalid, LinkLost, StageError, StateBusy, WrongRun
from stage_server.grpc_links import ERROR_METADATA, stub
from stage_server.state_listing import StateListing, from_reply
from stage_server.state_plan import Chunk


class Silent(LinkLost):
    """No byte for so long that it makes no sense to ask this peer again."""


class Donor:
    """A peer that serves the stage.

    Args:
        endpoint: "host:port", for messages.
        channel: to it.
        run_id: run whose state is wanted.
        stage: stage whose state is wanted; None: the peer's own.
        lineage: history whose state is wanted; None: any.
        max_bytes: largest state that is accepted.
        idle_seconds: without a byte for so long, the peer counts as silent.
    """

    def __init__(
        self,
        endpoint: str,
        channel: grpc.aio.Channel,
        *,
        run_id: str,
        stage: int | None,
        lineage: str | None,
        max_bytes: int,
        idle_seconds: float,
    ) -> None:
        self.endpoint = endpoint
        self._stub = stub(channel)
        self._run_id, self._stage, self._lineage = run_id, stage, lineage
        self._max_bytes, self._idle_seconds = max_bytes, idle_seconds

    async def listing(self, step: int | None) -> StateListing:
        """Its newest state, at or before a step.

        Raises:
            WrongRun: the peer serves another run.
            LinkLost: it cannot be reached, says nothing, or has no such state.
            Oversized, CheckpointInvalid: its answer is not accepted.
        """
        request = stage_pb2.ListStateRequest(run_id=self._run_id, stage=self._stage, step=step, lineage=self._lineage)
        try:
            reply = await self._stub.ListState(request, timeout=self._idle_seconds)
        except grpc.aio.AioRpcError as error:
            raise self._told(error, "does not list its state") from error
        listing = from_reply(reply, self._max_bytes)
        too_late = step is not None and listing.step > step
        if too_late or self._lineage not in (None, listing.lineage) or self._stage not in (None, listing.stage):
            raise CheckpointInvalid(
                f"{self.endpoint} lists step {listing.step} of stage {listing.stage} and {listing.lineage!r}, "
                "not what was asked"
            )
        return listing

    async def chunk(self, step: int, chunk: Chunk, is_wanted: Callable[[], bool]) -> bytes | None:
        """The bytes of a chunk, not yet verified; None when it is no longer wanted.

        Raises:
            StateBusy: the peer gives to too many others already.
            Silent: no byte within the limit.
            LinkLost: the transfer broke off, or the peer has the state no more.
            CheckpointInvalid: what comes is not what was asked for.
        """
        request = stage_pb2.FetchStateRequest(
            run_id=self._run_id,
            stage=self._stage,
            step=step,
            name=chunk.name,
            offset_bytes=chunk.offset_bytes,
            length_bytes=chunk.size_bytes,
            sha256=chunk.file_sha256,
        )
        call = self._stub.FetchState(request)
        try:
            return await self._received(call, chunk, is_wanted)
        except grpc.aio.AioRpcError as error:
            raise self._told(error, f"breaks off {chunk.name}") from error
        except TimeoutError:
            raise Silent(f"{self.endpoint} has sent nothing for {self._idle_seconds:g} s") from None
        finally:
            call.cancel()

    async def _received(self, call: Any, chunk: Chunk, is_wanted: Callable[[], bool]) -> bytes | None:
        data = bytearray()
        while is_wanted():
            async with asyncio.timeout(self._idle_seconds):
                piece = await call.read()
            if piece is grpc.aio.EOF:
                if len(data) < chunk.size_bytes:
                    raise CheckpointInvalid(f"{self.endpoint} ends {chunk.name} early")
                return bytes(data)
            if piece is None or piece.offset_bytes != chunk.offset_bytes + len(data):
                raise CheckpointInvalid(f"{self.endpoint} sends {chunk.name} with a gap")
            data += piece.data
            if not piece.data or len(data) > chunk.size_bytes:
                raise CheckpointInvalid(f"{self.endpoint} sends more of {chunk.name} than was asked for, or nothing")
        return None

    def _told(self, error: grpc.aio.AioRpcError, what: str) -> StageError:
        """A peer's refusal, or the loss of the peer, as an error here."""
        code = dict(error.trailing_metadata() or ()).get(ERROR_METADATA)
        said = f"{self.endpoint} {what}: {(error.details() or 'no reason given')[:MAX_DETAIL_CHARACTERS]}"
        match code:
            case str() if code == str(codes.ERROR_CODE_WRONG_RUN):
                return WrongRun(said)
            case str() if code == str(codes.ERROR_CODE_STATE_BUSY):
                return StateBusy(said)
        silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return Silent(said) if silent else LinkLost(said)
