"""hivemind's all-reduce, made exact: all members end with the reducers' very bytes, or with an error.

Written against hivemind 1.1.12, of which it overrides internals. As it comes, each reducer sends every member the
difference between the average and what that member had sent, so that members differ in their last bits; and where a
reducer or a sender fails, members go on with local values and report success. Here reducers send the sum itself, the
same bytes to all, added up in float64 (so that the order of arrival does not matter); and whatever fails fails the
round.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from coordinator import hivemind_parts  # before hivemind: it sets the environment that hivemind's imports read

# isort: split
from hivemind.averaging import allreduce, averager, partition
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.partition import AllreduceException, TensorPartReducer
from hivemind.compression import (
    CompressionBase,
    CompressionInfo,
    NoCompression,
    ScaledFloat16Compression,
    deserialize_torch_tensor,
)
from hivemind.p2p import P2PContext, P2PDaemonError, P2PHandlerError, p2p_daemon, servicer
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import amap_in_executor

__all__ = [
    "P2P",
    "AllreduceException",
    "CallFailed",
    "CompressionBase",
    "CompressionInfo",
    "DecentralizedAverager",
    "GroupInfo",
    "HivemindChanged",
    "NoCompression",
    "P2PContext",
    "PeerID",
    "RoundFailed",
    "ScaledFloat16Compression",
    "SumRunner",
    "averaging_pb2",
    "require_known_hivemind",
]

P2P, PeerID = hivemind_parts.P2P, hivemind_parts.PeerID

CallFailed = (P2PDaemonError, P2PHandlerError, ControlFailure, OSError, asyncio.IncompleteReadError, StopAsyncIteration)
"""What a call to a peer that is not there may raise."""

CLOSE_TIMEOUT = timedelta(seconds=10)
"""For the other end of a stream to end it too."""

KNOWN_SOURCES = {
    "allreduce": "2a67006fc98b9683e357e4b8a805832c9bec1e81afbf1ffcc41862bb56caab05",
    "averager": "932a59ddb7e0933de2dc674be8480ebcdc9eb9fd713f5040a33dd0e4cca59929",
    "partition": "8905c51826c26d18281121e760758f3a3bfc77feca351886eade13cfbe571e23",
    "p2p_daemon": "1eda97687e0a6c5a624c4bd53d7e1433b2a687382d58256dcaf0d668fab6fb98",
    "servicer": "c03aec53776ff1347eefcbda3d320f4a9001567d52d90326e17102ffcf4cfe06",
}
"""SHA-256 of the source files whose internals are overridden or relied on, in hivemind 1.1.12."""


class HivemindChanged(RuntimeError):
    """hivemind's internals are not those that this was written against: nobody knows what averaging would do."""


class RoundFailed(Exception):
    """The sum is not known: a member failed. `peer` is who, as far as it can be told."""

    def __init__(self, cause: str, peer: str | None = None) -> None:
        super().__init__(cause)
        self.peer = peer


def require_known_hivemind(
    modules: Sequence[ModuleType] = (allreduce, averager, partition, p2p_daemon, servicer),
) -> None:
    """Raises HivemindChanged unless the source of these modules is known, byte for byte."""
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        if digest != KNOWN_SOURCES.get(name):
            raise HivemindChanged(
                f"{module.__name__} has changed ({digest}): read what is new in it, adapt coordinator/averaging_*.py, "
                "then enter its digest in KNOWN_SOURCES"
            )


class Float64Reducer(TensorPartReducer):  # type: ignore[misc]  # hivemind has no types
    """hivemind's reducer, adding up in float64: rounded to float32 once, the sum is the same in any order."""

    def reset_accumulators(self) -> None:
        super().reset_accumulators()
        if not self.finished.is_set():
            self.accumulator: torch.Tensor = self.accumulator.double()


class SumRunner(AllReduceRunner):  # type: ignore[misc]
    """One exchange. Iterate over it for the sum's parts; `failure` is set as soon as anything has failed.

    Args:
        compression: the codec of the wire. What is lost in it is lost for all members alike.
        settings: hivemind's own.
    """

    def __init__(self, *, compression: CompressionBase, **settings: Any) -> None:
        super().__init__(compression=compression, **settings)
        self._codec = compression
        self.tensor_part_reducer = Float64Reducer(
            tuple(part.shape for part in self.parts_for_local_averaging), len(self.sender_peer_ids)
        )
        self._sums: dict[int, asyncio.Future[Any]] = {}  # by own part, as all members get it
        self.failure: asyncio.Future[RoundFailed] = asyncio.get_running_loop().create_future()
        self.bytes_sent = self.bytes_received = 0
        self._future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else looks at it

    def fail(self, cause: str, peer: Any = None) -> None:
        """Nothing that this exchange yields from now on, or has yielded, is worth anything."""
        if not self.failure.done() and not self._future.done():
            self.failure.set_result(RoundFailed(cause, None if peer is None else peer.to_base58()))

    async def sums(self) -> AsyncGenerator[torch.Tensor, None]:
        """The sum's parts in order, float32; the exchange succeeded if the last one came.

        Raises:
            RoundFailed: a member failed.
        """
        parts = self.run()
        try:
            while True:
                following: asyncio.Future[Any] = asyncio.ensure_future(_following(parts))
                either: set[asyncio.Future[Any]] = {following, self.failure}
                try:
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not following.done():
                        following.cancel()
                        await asyncio.wait({following})
                if self.failure.done():
                    if not following.cancelled():
                        following.exception()  # it has been seen
                    raise self.failure.result()
                part = following.result()
                if part is None:
                    return
                yield part
        finally:
            await parts.aclose()

    async def _communicate_with_peer(self, peer_id: Any) -> None:
        try:
            if peer_id == self.peer_id:
                await self._reduce_own_part()
            else:
                await self._exchange_with(peer_id)
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}", peer_id)
            raise

    async def _exchange_with(self, peer_id: Any) -> None:
        """Sends a member the values that it adds up, and registers the sums that come back.

        Once the answering end has sent its last message it closes, and hivemind's daemon then resets the stream: what
        has not been read at this end may be lost, over links of 80 ms now and then even in a quiet swarm. The answering
        end ends when its input does; so here the input does not end before all sums are there.

        Therefore the stream is read and written here and not by hivemind's generator over it, which waits for its input
        to end even when the stream is over: it would never tell that a member has died.
        """
        index = self.ordered_peer_ids.index(peer_id)
        handler = self._servicer_type._get_handle_name(self._prefix, "rpc_aggregate_part")
        _, reader, writer = await self._p2p.call_binary_stream_handler(peer_id, handler)
        sending = asyncio.create_task(self._send_parts(index, writer))
        try:
            await self._take_sums(index, reader)
        except BaseException:
            writer.close()
            raise
        finally:
            sending.cancel()  # all of it has arrived once the sums are here
            await asyncio.gather(sending, return_exceptions=True)
        closing = asyncio.create_task(_close(reader, writer))  # the sum is there: nobody waits for the stream's end
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)

    async def _send_parts(self, peer_index: int, writer: asyncio.StreamWriter) -> None:
        try:
            async for message in self._generate_input_for_peer(peer_index):
                await P2P.send_protobuf(message, writer)
        except OSError:
            return  # the other end has closed: what it has said before is read, or that it is gone
        except Exception as error:  # noqa: BLE001 - no other member's fault, whatever it is
            self.fail(f"{type(error).__name__}: {error}")

    async def _take_sums(self, peer_index: int, reader: asyncio.StreamReader) -> None:
        container = self.tensor_part_container
        sums = amap_in_executor(_decode_sum, _messages(reader), max_prefetch=container.prefetch)
        async with contextlib.aclosing(sums):
            for part_index in range(container.num_parts_by_peer[peer_index]):
                container.register_processed_part(peer_index, part_index, await anext(sums))

    async def _reduce_own_part(self) -> None:
        index, sender = self.ordered_peer_ids.index(self.peer_id), self.sender_peer_ids.index(self.peer_id)
        for part_index, part in enumerate(self.parts_for_local_averaging):
            mean = await self.tensor_part_reducer.accumulate_part(sender, part_index, part, weight=self.weight)
            message = await self._sum_message(part_index, mean)
            self.tensor_part_container.register_processed_part(index, part_index, deserialize_torch_tensor(message))

    async def _accumulate_parts_streaming(self, stream: AsyncIterator[Any], sender_index: int) -> AsyncIterator[Any]:
        """Takes a member's parts and gives it the sums."""
        part_index = 0
        try:
            decoded = amap_in_executor(_decode, stream, max_prefetch=self.tensor_part_container.prefetch)
            async for part, weight, num_bytes in decoded:
                self.bytes_received += num_bytes
                own = self.parts_for_local_averaging[part_index]
                if (part.shape, part.dtype, weight) != (own.shape, own.dtype, self.weight):
                    raise AllreduceException(f"part {part_index} has another shape, type or weight")
                mean = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, part, weight=weight)
                message = await self._sum_message(part_index, mean)
                part_index += 1
                self.bytes_sent += len(message.buffer)
                yield averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=message)
        finally:
            if part_index != self.tensor_part_reducer.num_parts:
                await self._ban_sender(self.sender_peer_ids[sender_index])

    async def _sum_message(self, part_index: int, mean: torch.Tensor) -> Any:
        """The sum of a part, encoded once for all members."""
        if part_index not in self._sums:
            loop = asyncio.get_running_loop()
            self._sums[part_index] = loop.run_in_executor(None, self._encode_sum, mean)
        return await asyncio.shield(self._sums[part_index])

    def _encode_sum(self, mean: torch.Tensor) -> Any:
        total = (mean * len(self.sender_peer_ids)).float()
        return self._codec.compress(total, CompressionInfo.from_tensor(total), allow_inplace=True)

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[Any]:
        async for message in super()._generate_input_for_peer(peer_index):
            self.bytes_sent += len(message.tensor_part.buffer)
            yield message

    async def _ban_sender(self, peer_id: Any) -> None:
        self.fail("it stopped sending", peer_id)
        await super()._ban_sender(peer_id)


_closing: set[asyncio.Task[None]] = set()
"""Streams whose last word is under way."""


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """What the answering end sends, without an end of its own: that of the stream is an error."""
    while True:
        try:
            message, error = await P2P.receive_protobuf(averaging_pb2.AveragingData, reader)
        except asyncio.IncompleteReadError:
            raise AllreduceException("it closed the stream") from None
        if error is not None:
            raise AllreduceException(f"it refused: {error.message}")
        yield message


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # whatever it is, TimeoutError too, it comes too late to matter
        async with asyncio.timeout(CLOSE_TIMEOUT.total_seconds()):
            await P2P.send_protobuf(P2P.END_OF_STREAM, writer)
            while await reader.read(65_536):
                pass
    writer.close()


async def _following(parts: AsyncIterator[torch.Tensor]) -> torch.Tensor | None:
    return await anext(parts, None)


def _decode_sum(message: Any) -> Any:
    if message.code != averaging_pb2.AVERAGED_PART:
        raise AllreduceException(f"it sent {averaging_pb2.MessageCode.Name(message.code)}")
    return deserialize_torch_tensor(message.tensor_part)


def _decode(message: Any) -> tuple[torch.Tensor, float, int]:
    return deserialize_torch_tensor(message.tensor_part), message.weight, len(message.tensor_part.buffer)
