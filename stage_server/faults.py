"""Faults on purpose: a dialer whose streams drop, double, delay, swap, spoil or cut chosen frames.

Works over any transport. Frames are numbered from 0 in the order in which they cross the dialling end, both directions
and all redials together, so a plan strikes each chosen frame once and then leaves the link in peace.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from resbm_pb import stage_pb2

from stage_server.errors import LinkLost
from stage_server.links import Dialer, Frame, FrameStream


class Fault(enum.StrEnum):
    """What happens to one frame."""

    DROP = "drop"  # it never arrives
    DUPLICATE = "duplicate"  # it arrives twice
    DELAY = "delay"  # it arrives a little later, in order
    SWAP = "swap"  # it arrives after the frame that follows it
    CORRUPT = "corrupt"  # a byte of its payload is flipped
    CUT = "cut"  # the link breaks in its place


@dataclass
class FaultPlan:
    """Which fault strikes which frame. `struck` says what has happened so far."""

    faults: Mapping[int, Fault]
    delay_seconds: float = 0.01
    num_frames: int = 0
    struck: list[Fault] = field(default_factory=list)

    def next_fault(self) -> Fault | None:
        """Counts one frame and returns what is to happen to it."""
        fault = self.faults.get(self.num_frames)
        self.num_frames += 1
        if fault is not None:
            self.struck.append(fault)
        return fault


class FaultyDialer:
    """Dials through another dialer and spoils its streams by plan."""

    def __init__(self, inner: Dialer, plan: FaultPlan) -> None:
        self._inner = inner
        self.plan = plan

    async def dial(self, endpoint: str) -> FrameStream:
        return _FaultyStream(await self._inner.dial(endpoint), self.plan)


class _FaultyStream:
    def __init__(self, inner: FrameStream, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._held: Frame | None = None  # waits to be sent after the frame that follows
        self._arrived: list[Frame] = []  # received and not handed on yet

    async def send(self, frame: Frame) -> None:
        frames, self._held = await self._strike(frame, self._held)
        for struck in frames:
            await self._inner.send(struck)

    async def receive(self) -> Frame:
        while not self._arrived:
            frames, held = await self._strike(await self._inner.receive(), None)
            if held is not None:
                frames = [await self._inner.receive(), held]
            self._arrived = frames
        return self._arrived.pop(0)

    async def close(self, reason: Exception | None = None) -> None:
        await self._inner.close(reason)

    async def _strike(self, frame: Frame, held: Frame | None) -> tuple[list[Frame], Frame | None]:
        """(frames that go on now, frame held back until the next one)."""
        before = [] if held is None else [held]
        match self._plan.next_fault():
            case Fault.DROP:
                return before, None
            case Fault.DUPLICATE:
                return [frame, *before, frame], None
            case Fault.DELAY:
                await asyncio.sleep(self._plan.delay_seconds)
            case Fault.SWAP:
                return before, frame
            case Fault.CORRUPT:
                return [_corrupted(frame), *before], None
            case Fault.CUT:
                await self._inner.close()
                raise LinkLost("cut by the fault plan")
        return [frame, *before], None


def _corrupted(frame: Frame) -> Frame:
    """A copy with one payload byte flipped; frames without payload stay as they are."""
    copy = type(frame).FromString(frame.SerializeToString())
    tensors = (
        [m.latents for m in copy.latents.microbatches]
        if isinstance(copy, stage_pb2.UpstreamFrame)
        else [m.gradients for m in copy.gradients.microbatches]
    )
    for tensor in tensors[:1]:
        if tensor.values:
            tensor.values = bytes([tensor.values[0] ^ 0x10]) + tensor.values[1:]
    return copy
