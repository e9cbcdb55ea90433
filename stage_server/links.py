"""One link between two neighbouring stages: handshake, pumps, marks. The same on both ends and over any transport.

A `LinkSession` lives as long as one stream. When the stream breaks it ends; the peer opens another one and the
handshake finds out what is missing. What to send and what to believe is the ledger's business (`LinkHost`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeAlias

from resbm_pb import stage_pb2

from stage_server.concurrency import until_first_ends
from stage_server.errors import LinkLost, Oversized, ProtocolViolation, WrongRun, WrongStage, WrongVersion, refusal
from stage_server.ids import MicrobatchId
from stage_server.silence import Patience, Silence
from stage_server.wire import PROTOCOL_VERSION, decode_held, encode_held
from stage_server.work import Declined, Forwarded, Outbound, Returned, Side

Frame = stage_pb2.UpstreamFrame | stage_pb2.DownstreamFrame
GoodbyeReason: TypeAlias = "stage_pb2.Goodbye.Reason.ValueType"

STATUS_INTERVAL = timedelta(seconds=1)
SILENCE_LIMIT = timedelta(seconds=20)  # a live neighbour says something every STATUS_INTERVAL
SUSPICION = Patience(least=2.0, factor=2.5, longest=10.0)
HANDSHAKE_LIMIT = timedelta(seconds=20)
MAX_MICROBATCHES_PER_FRAME = 16
MAX_FRAMES_AHEAD = 4096  # of one that is missing; a stream in order never has any
MAX_HELD = 65_536  # microbatches in a handshake
MAX_PEER_ID_CHARACTERS = 128
MAX_BYTES_PER_FRAME = 1 << 20  # coalescing stops here; one large microbatch still travels whole


class FrameStream(Protocol):
    """An ordered stream of frames to and from one neighbour. The transport seam: gRPC or memory."""

    async def send(self, frame: Frame) -> None:
        """Hands over one frame; waits while the transport is full. Raises LinkLost."""

    async def receive(self) -> Frame:
        """The next frame. Raises LinkLost when the stream is over, or the neighbour's refusal as a StageError."""

    async def close(self, reason: Exception | None = None) -> None:
        """Ends the stream, telling the neighbour why if there is a reason. May be called twice."""


class Dialer(Protocol):
    """The one way to reach a downstream peer. What is behind an endpoint's text is the dialer's business."""

    async def dial(self, endpoint: str) -> FrameStream:
        """Opens a stream to the peer. Raises LinkLost when nobody answers."""


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """Who one end of a link is."""

    run_id: str
    stage: int
    peer_id: str


class LinkHost(Protocol):
    """What a session asks of the peer it belongs to."""

    identity: LinkIdentity

    def holdings(self) -> tuple[int, list[MicrobatchId]]:
        """(committed step, microbatches that need not be sent) for the handshake."""

    def link_opened(self, peer: LinkIdentity, committed: int, held: Iterable[MicrobatchId]) -> list[Outbound]:
        """The neighbour has said who it is; returns what it lacks. Raises to refuse the link.

        From here on whatever is computed for that neighbour goes through this session.
        """

    def link_received(self, frame: Frame) -> None:
        """Latents or gradients came in. Raises FrameError to refuse them and end the link."""

    def link_declined(self, names: Iterable[MicrobatchId]) -> None:
        """The neighbour cannot compute these any more."""

    def link_status(self) -> tuple[int, int | None, int]:
        """(committed step, durable step, settled step) to report."""

    def link_received_status(self, committed: int, durable: int | None, settled: int) -> None:
        """The neighbour's progress."""

    def link_goodbye(self, reason: GoodbyeReason) -> None:
        """The neighbour leaves on purpose."""

    def count_sent(self, num_bytes: int, items: Sequence[Outbound]) -> None:
        """A frame was handed to the transport."""

    def count_received(self, num_bytes: int) -> None:
        """A frame came from the transport."""


class LinkSession:
    """One stream's life on one end. `side` is the neighbour's place: DOWNSTREAM on the end that dialled."""

    def __init__(self, stream: FrameStream, side: Side, host: LinkHost) -> None:
        self._stream = stream
        self._side = side
        self._host = host
        self._queue: asyncio.Queue[Outbound | stage_pb2.Goodbye | None] = asyncio.Queue()
        self._frames_sent = 0
        self._arrivals = _Arrivals()
        self._statuses_sent = 0
        self._newest_status = 0
        self._silence = Silence(SUSPICION)
        self._said_goodbye = asyncio.Event()
        self._superseded = asyncio.Event()
        self._report_due = False

    def send(self, item: Outbound) -> None:
        """Queues a microbatch for sending."""
        self._queue.put_nowait(item)

    def report(self) -> None:
        """Sends the present marks soon, without waiting for the interval."""
        if not self._report_due:
            self._report_due = True
            self._queue.put_nowait(None)

    @property
    def is_suspect(self) -> bool:
        """Whether the neighbour has been silent for longer than it usually is: whoever can be asked instead, is."""
        return self._silence.is_long(asyncio.get_running_loop().time())

    def supersede(self) -> None:
        """Ends the session: the neighbour has opened a newer stream."""
        self._superseded.set()

    async def say_goodbye(self, reason: GoodbyeReason, within: timedelta) -> None:
        """Tells the neighbour that this end leaves, after everything queued before; gives up after `within`."""
        self._queue.put_nowait(stage_pb2.Goodbye(reason=reason))
        try:
            async with asyncio.timeout(within.total_seconds()):
                await self._said_goodbye.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        """Runs until the stream ends. Raises LinkLost or the StageError that ended it; the stream is closed then."""
        reason: Exception | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_LIMIT.total_seconds()):
                await self._handshake()
            await self._pump()
        except TimeoutError:
            reason = LinkLost(f"the {self._side} neighbour did not finish its handshake")
        except Exception as error:  # noqa: BLE001 - told to the neighbour below, then raised
            reason = error
        finally:
            await self._stream.close(reason)
        try:
            if reason is not None:
                raise reason
        finally:
            reason = None  # its traceback holds this frame: with it, all of the link would stay until it is collected

    # -- handshake ----------------------------------------------------------------------------------------------

    async def _handshake(self) -> None:
        """The end that dialled speaks first, so that a wrong caller is refused before anything is said."""
        if self._side is Side.DOWNSTREAM:
            await self._send_frame(open=self._open())
        peer = await self._stream.receive()
        if peer.WhichOneof("body") != "open":
            raise ProtocolViolation(f"the first frame of a link is Open, not {peer.WhichOneof('body')}")
        identity = self._check_open(peer.open)
        if len(peer.open.held) > MAX_HELD or len(peer.open.peer_id) > MAX_PEER_ID_CHARACTERS:
            raise Oversized(f"the {self._side} peer's Open names {len(peer.open.held)} microbatches")
        held = decode_held(peer.open.held)
        for item in self._host.link_opened(identity, peer.open.committed_step, held):
            self.send(item)
        self._host.count_received(peer.ByteSize())
        if self._side is Side.UPSTREAM:
            await self._send_frame(open=self._open())

    def _open(self) -> stage_pb2.Open:
        identity = self._host.identity
        committed, held = self._host.holdings()
        return stage_pb2.Open(
            protocol_version=PROTOCOL_VERSION,
            run_id=identity.run_id,
            stage=identity.stage,
            peer_id=identity.peer_id,
            committed_step=committed,
            held=encode_held(held),
        )

    def _check_open(self, peer: stage_pb2.Open) -> LinkIdentity:
        own = self._host.identity
        if peer.protocol_version != PROTOCOL_VERSION:
            raise WrongVersion(f"the {self._side} peer speaks protocol {peer.protocol_version}, not {PROTOCOL_VERSION}")
        if peer.run_id != own.run_id:
            raise WrongRun(f"the {self._side} peer serves run {peer.run_id!r}, not {own.run_id!r}")
        expected = own.stage + (1 if self._side is Side.DOWNSTREAM else -1)
        if peer.stage != expected:
            raise WrongStage(f"the {self._side} peer serves stage {peer.stage}, not {expected}")
        return LinkIdentity(peer.run_id, peer.stage, peer.peer_id)

    # -- pumps --------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        raise _most_telling(await until_first_ends(self._send_queued(), self._receive(), self._watch()))

    async def _send_queued(self) -> None:
        while True:
            item = await self._queue.get()
            items: list[Forwarded | Returned] = []
            declined: list[MicrobatchId] = []
            report = False
            goodbye: stage_pb2.Goodbye | None = None
            size = 0
            while True:
                if isinstance(item, stage_pb2.Goodbye):
                    goodbye = item
                elif item is None:
                    report = True
                elif isinstance(item, Declined):
                    declined.append(item.name)
                else:
                    items.append(item)
                    size += item.body.ByteSize()
                full = len(items) >= MAX_MICROBATCHES_PER_FRAME or size >= MAX_BYTES_PER_FRAME
                if goodbye or report or full or self._queue.empty():
                    break
                item = self._queue.get_nowait()
            await self._send_items(items)
            if declined:
                frame = stage_pb2.DownstreamFrame(declined=stage_pb2.DeclinedFrame(microbatches=encode_held(declined)))
                await self._send(frame)
            if report:
                await self._send_status()
            if goodbye:
                await self._send_frame(goodbye=goodbye)
                self._said_goodbye.set()

    async def _send_items(self, items: list[Forwarded | Returned]) -> None:
        if not items:
            return
        bodies = [item.body for item in items]
        self._frames_sent += 1
        if self._side is Side.DOWNSTREAM:
            latents = stage_pb2.LatentsFrame(microbatches=bodies, sequence=self._frames_sent)
            frame: Frame = stage_pb2.UpstreamFrame(latents=latents)
        else:
            gradients = stage_pb2.GradientsFrame(microbatches=bodies, sequence=self._frames_sent)
            frame = stage_pb2.DownstreamFrame(gradients=gradients)
        await self._stream.send(frame)
        self._host.count_sent(frame.ByteSize(), items)

    async def _send_status(self) -> None:
        committed, durable, settled = self._host.link_status()
        self._report_due = False
        self._statuses_sent += 1
        status = stage_pb2.LinkStatus(
            frames_sent=self._frames_sent,
            committed_step=committed,
            durable_step=durable,
            settled_step=settled,
            sequence=self._statuses_sent,
        )
        await self._send_frame(status=status)

    async def _send_frame(
        self,
        *,
        open: stage_pb2.Open | None = None,
        status: stage_pb2.LinkStatus | None = None,
        goodbye: stage_pb2.Goodbye | None = None,
    ) -> None:
        kind = stage_pb2.UpstreamFrame if self._side is Side.DOWNSTREAM else stage_pb2.DownstreamFrame
        await self._send(kind(open=open, status=status, goodbye=goodbye))

    async def _send(self, frame: Frame) -> None:
        await self._stream.send(frame)
        self._host.count_sent(frame.ByteSize(), ())

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        self._silence.heard(loop.time())
        while True:
            frame = await self._stream.receive()
            frame.DiscardUnknownFields()  # what is kept and passed on holds nothing that was not checked
            self._silence.heard(loop.time())
            self._host.count_received(frame.ByteSize())
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        body = frame.WhichOneof("body")
        if body == "status":
            self._take_status(frame.status)
        elif body in ("latents", "gradients"):
            data = frame.latents if isinstance(frame, stage_pb2.UpstreamFrame) else frame.gradients
            self._arrivals.note(data.sequence)
            self._host.link_received(frame)
        elif body == "declined" and isinstance(frame, stage_pb2.DownstreamFrame):
            self._host.link_declined(decode_held(frame.declined.microbatches[:MAX_HELD]))
        elif body == "goodbye":
            if frame.goodbye.reason == stage_pb2.Goodbye.REASON_REFUSED:
                raise refusal(frame.goodbye.code, frame.goodbye.detail)
            if frame.goodbye.reason not in stage_pb2.Goodbye.Reason.values():
                raise ProtocolViolation(f"a goodbye for the unknown reason {frame.goodbye.reason}")
            self._host.link_goodbye(frame.goodbye.reason)
        else:
            raise ProtocolViolation(f"a frame with {body or 'nothing'} in it where the link is open already")

    def _take_status(self, status: stage_pb2.LinkStatus) -> None:
        if status.frames_sent > self._arrivals.all_up_to:
            raise LinkLost(f"frame {self._arrivals.all_up_to + 1} from {self._side} was lost on the way")
        if status.sequence <= self._newest_status:
            return
        self._newest_status = status.sequence
        durable = status.durable_step if status.HasField("durable_step") else None
        self._host.link_received_status(status.committed_step, durable, status.settled_step)

    async def _watch(self) -> None:
        """Says something every STATUS_INTERVAL, and gives up on a neighbour that says nothing for SILENCE_LIMIT."""
        loop = asyncio.get_running_loop()
        while True:
            self.report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._superseded.wait(), STATUS_INTERVAL.total_seconds())
                raise LinkLost(f"the {self._side} neighbour has opened a newer link")
            heard_at = self._silence.heard_at
            if heard_at is not None and loop.time() - heard_at > SILENCE_LIMIT.total_seconds():
                raise LinkLost(f"the {self._side} neighbour has been silent for {SILENCE_LIMIT.total_seconds():.0f} s")


def _most_telling(errors: Sequence[Exception]) -> Exception:
    """A refusal says more than the broken stream it causes."""
    return next((error for error in errors if not isinstance(error, LinkLost)), errors[0])


class _Arrivals:
    """Which of the neighbour's numbered frames are here."""

    def __init__(self) -> None:
        self.all_up_to = 0  # every frame up to this one has arrived
        self._beyond: set[int] = set()

    def note(self, sequence: int) -> None:
        if sequence > self.all_up_to + MAX_FRAMES_AHEAD:
            raise ProtocolViolation(f"frame {sequence} follows frame {self.all_up_to}")
        if sequence > self.all_up_to:
            self._beyond.add(sequence)
        while self.all_up_to + 1 in self._beyond:
            self.all_up_to += 1
            self._beyond.remove(self.all_up_to)
