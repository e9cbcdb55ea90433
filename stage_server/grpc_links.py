"""Links over gRPC: channel and server settings, both ends of a stream, and how refusals travel."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from resbm_pb import errors_pb2, stage_pb2
from resbm_pb.stage_pb2_grpc import StageStub

from stage_server.errors import CorruptFrame, LinkLost, StageError, refusal
from stage_server.links import Frame, FrameStream

if TYPE_CHECKING:
    from resbm_pb.stage_pb2_grpc import StageAsyncStub  # exists in the type stubs alone

ERROR_METADATA = "resbm-error"  # trailing metadata key with the stable code of a refusal
MIN_MESSAGE_LIMIT_BYTES = 4 << 20
CONNECT_SECONDS = 10.0
REFUSAL_SECONDS = 2.0

# Home routers forget idle mappings after a minute or so; a ping every 20 s keeps them and notices dead peers. The
# server must allow what the client does, or it answers with "too_many_pings".
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


# Who is away for some seconds is called again soon after; by itself gRPC would wait for up to two minutes.
_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # for one attempt
]


def channel_options(max_frame_bytes: int) -> list[tuple[str, Any]]:
    """Options of a client channel whose frames are at most `max_frame_bytes`."""
    return [
        *_message_limits(max_frame_bytes),
        *_KEEPALIVE,
        ("grpc.enable_retries", 0),
        *_RECONNECT,
        # Channels of one process to one address must not share a connection: a redial has to be a new one.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(max_frame_bytes: int) -> list[tuple[str, Any]]:
    """Options of a server whose frames are at most `max_frame_bytes`."""
    return [
        *_message_limits(max_frame_bytes),
        *_KEEPALIVE,
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # Without this a second server binds the same port silently and gets half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def _message_limits(max_frame_bytes: int) -> list[tuple[str, Any]]:
    limit = max(MIN_MESSAGE_LIMIT_BYTES, 2 * max_frame_bytes)
    return [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", limit)]


class GrpcDialer:
    """Reaches "host:port" directly."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._options = channel_options(max_frame_bytes)

    async def dial(self, endpoint: str) -> FrameStream:
        channel = grpc.aio.insecure_channel(endpoint, options=self._options)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await channel.channel_ready()
            return _ClientStream(channel, endpoint)
        except TimeoutError:
            await channel.close()
            raise LinkLost(f"nobody answers at {endpoint} within {CONNECT_SECONDS:.0f} s") from None
        except BaseException:
            await channel.close()
            raise


def stub(channel: grpc.aio.Channel) -> StageAsyncStub:
    """The stage service's stub, typed for asyncio."""
    return StageStub(channel)


async def describe(endpoint: str, within: timedelta) -> stage_pb2.DescribeReply | None:
    """Who answers at "host:port"; None for a peer that has no stage yet. Raises LinkLost when nobody does."""
    async with grpc.aio.insecure_channel(endpoint, options=channel_options(0)) as channel:
        try:
            reply: stage_pb2.DescribeReply = await stub(channel).Describe(
                stage_pb2.DescribeRequest(), timeout=within.total_seconds()
            )
            return reply
        except grpc.aio.AioRpcError as error:
            if ERROR_METADATA in dict(error.trailing_metadata() or ()):
                return None
            raise LinkLost(f"nobody answers at {endpoint}: {error.details()}") from error


class _ClientStream:
    """The end that dialled.

    gRPC keeps a connection for as long as a call object of it lives, closed or not. So this one lets go of its call,
    lest whoever still refers to the stream (an exception's traceback will do) keeps a socket.
    """

    def __init__(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        self._channel = channel
        self._endpoint = endpoint
        self._call = stub(channel).Link()
        self._closed = False

    async def send(self, frame: Frame) -> None:
        self._raise_if_closed_here()
        try:
            await self._call.write(frame)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            self._raise_if_closed_here()
            raise
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._over() from None

    async def receive(self) -> Frame:
        self._raise_if_closed_here()
        try:
            frame = await self._call.read()
        except asyncio.CancelledError:
            self._raise_if_closed_here()
            raise
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._over() from None
        if frame is None:  # gRPC's way to say that the bytes are no message
            raise CorruptFrame(f"{self._endpoint} sent bytes that are no frame")
        if not isinstance(frame, stage_pb2.DownstreamFrame):  # grpc.aio.EOF
            raise await self._over()
        return frame

    async def close(self, reason: Exception | None = None) -> None:
        try:
            if not self._closed and isinstance(reason, StageError) and not isinstance(reason, LinkLost):
                await self._refuse(reason)
        finally:
            if not self._closed:
                self._closed = True
                self._call.cancel()
                del self._call
                await self._channel.close()

    async def _refuse(self, reason: StageError) -> None:
        """The dialling side cannot end a call with a status of its own: it says why in a last frame."""
        call = self._call
        goodbye = stage_pb2.Goodbye(
            reason=stage_pb2.Goodbye.REASON_REFUSED,
            code=errors_pb2.ErrorCode.ValueType(int(reason.code)),
            detail=str(reason),
        )
        try:
            async with asyncio.timeout(REFUSAL_SECONDS):
                await call.write(stage_pb2.UpstreamFrame(goodbye=goodbye))
                await call.wait_for_connection()
                await call.code()  # the answering side ends the call when it has read the frame
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

    def _raise_if_closed_here(self) -> None:
        """gRPC reports a call that this end cancelled as a cancelled task, which is something else entirely."""
        if self._closed:
            raise LinkLost(f"the link to {self._endpoint} is closed") from None

    async def _over(self) -> StageError:
        self._raise_if_closed_here()
        call = self._call
        details = await call.details() or "no reason given"
        code = dict((await call.trailing_metadata()) or ()).get(ERROR_METADATA)
        if isinstance(code, str) and code.isascii() and code.isdigit():
            return refusal(int(code), str(details))
        return LinkLost(f"the link to {self._endpoint} is over: {details}")


class ServerStream:
    """The end that answers, within a servicer's Link call. The call itself ends with `finish`."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._reason: Exception | None = None

    async def send(self, frame: Frame) -> None:
        try:
            await self._context.write(frame)
        except (grpc.aio.UsageError, grpc.RpcError, asyncio.InvalidStateError, SystemError) as error:
            raise LinkLost(f"the upstream link is over: {error}") from None

    async def receive(self) -> Frame:
        try:
            frame = await self._context.read()
        except (grpc.aio.UsageError, grpc.RpcError, asyncio.InvalidStateError) as error:
            raise LinkLost(f"the upstream link is over: {error}") from None
        except DecodeError:
            raise CorruptFrame("the upstream peer sent bytes that are no frame") from None
        if not isinstance(frame, stage_pb2.UpstreamFrame):  # grpc.aio.EOF
            raise LinkLost("the upstream peer hung up")
        return frame

    async def close(self, reason: Exception | None = None) -> None:
        self._reason = reason

    async def finish(self) -> None:
        """Tells the caller why, in the words and with the code that it would use itself."""
        if isinstance(self._reason, StageError):
            await abort(self._context, self._reason)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: StageError) -> None:
    """Ends a call with a typed refusal."""
    gone = isinstance(error, LinkLost)
    status = grpc.StatusCode.UNAVAILABLE if gone else grpc.StatusCode.FAILED_PRECONDITION
    await context.abort(status, str(error), ((ERROR_METADATA, str(int(error.code))),))
