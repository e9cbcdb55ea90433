"""The fault plan itself: each fault does to the chosen frame what it says, once, and spares the rest."""

from __future__ import annotations

import asyncio

import pytest
from resbm_pb import stage_pb2

from stage_server.errors import LinkLost
from stage_server.faults import Fault, FaultPlan, FaultyDialer
from stage_server.links import Frame, FrameStream


def data(number: int) -> stage_pb2.UpstreamFrame:
    message = stage_pb2.Latents(step=number)
    message.latents.values = bytes([number, 0])
    return stage_pb2.UpstreamFrame(latents=stage_pb2.LatentsFrame(microbatches=[message]))


def answer(number: int) -> stage_pb2.DownstreamFrame:
    message = stage_pb2.Gradients(step=number)
    message.gradients.values = bytes([number, 0])
    return stage_pb2.DownstreamFrame(gradients=stage_pb2.GradientsFrame(microbatches=[message]))


def number(frame: Frame) -> int:
    messages = (
        frame.latents.microbatches if isinstance(frame, stage_pb2.UpstreamFrame) else frame.gradients.microbatches
    )
    return int(messages[0].step)


class Recorder:
    """A dialer and stream that notes what is sent and gives out five answers."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self.answers = [answer(n) for n in range(5)]
        self.closed = False

    async def dial(self, endpoint: str) -> FrameStream:
        return self

    async def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    async def receive(self) -> Frame:
        if not self.answers:
            raise LinkLost("no more")
        return self.answers.pop(0)

    async def close(self, reason: Exception | None = None) -> None:
        self.closed = True


def sent(faults: dict[int, Fault]) -> tuple[list[int], Recorder, FaultPlan]:
    recorder, plan = Recorder(), FaultPlan(faults, delay_seconds=0.02)

    async def scenario() -> None:
        stream = await FaultyDialer(recorder, plan).dial("x")
        for n in range(5):
            await stream.send(data(n))

    asyncio.run(scenario())
    return [number(frame) for frame in recorder.sent], recorder, plan


def received(faults: dict[int, Fault]) -> list[int]:
    async def scenario() -> list[int]:
        stream = await FaultyDialer(Recorder(), FaultPlan(faults)).dial("x")
        came = []
        with pytest.raises(LinkLost):
            while True:
                came.append(number(await stream.receive()))
        return came

    return asyncio.run(scenario())


ORDERS = [
    ({}, [0, 1, 2, 3, 4]),
    ({1: Fault.DROP}, [0, 2, 3, 4]),
    ({1: Fault.DUPLICATE}, [0, 1, 1, 2, 3, 4]),
    ({1: Fault.DELAY}, [0, 1, 2, 3, 4]),
    ({1: Fault.SWAP}, [0, 2, 1, 3, 4]),
    ({9: Fault.DROP}, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("faults", "order"), ORDERS)
def test_what_happens_to_frames_on_their_way_out(faults: dict[int, Fault], order: list[int]) -> None:
    numbers, _, plan = sent(faults)
    assert numbers == order
    assert plan.struck == [fault for place, fault in faults.items() if place < 5]
    assert plan.num_frames == 5


@pytest.mark.parametrize(("faults", "order"), ORDERS)
def test_what_happens_to_frames_on_their_way_in(faults: dict[int, Fault], order: list[int]) -> None:
    assert received(faults) == order


def test_a_spoiled_frame_differs_in_its_payload_alone_and_the_original_is_untouched() -> None:
    original = data(2)
    recorder = Recorder()

    async def scenario() -> None:
        stream = await FaultyDialer(recorder, FaultPlan({0: Fault.CORRUPT})).dial("x")
        await stream.send(original)

    asyncio.run(scenario())
    spoiled = recorder.sent[0]
    assert isinstance(spoiled, stage_pb2.UpstreamFrame)
    assert original == data(2)
    assert spoiled.latents.microbatches[0].latents.values == bytes([2 ^ 0x10, 0])
    spoiled.latents.microbatches[0].latents.values = bytes([2, 0])
    assert spoiled == original


def test_a_cut_closes_the_stream_in_the_frames_place() -> None:
    recorder = Recorder()

    async def scenario() -> None:
        stream = await FaultyDialer(recorder, FaultPlan({1: Fault.CUT})).dial("x")
        await stream.send(data(0))
        with pytest.raises(LinkLost, match="E212"):
            await stream.send(data(1))

    asyncio.run(scenario())
    assert (len(recorder.sent), recorder.closed) == (1, True)


def test_frames_are_numbered_over_both_directions_and_all_redials() -> None:
    recorder, plan = Recorder(), FaultPlan({3: Fault.DROP})

    async def scenario() -> None:
        dialer = FaultyDialer(recorder, plan)
        for _ in range(2):
            stream = await dialer.dial("x")
            await stream.send(data(0))
            await stream.receive()

    asyncio.run(scenario())
    # Frames 0 and 2 went out; 1 and 3 came in, of which 3 was dropped and the one after it handed on.
    assert plan.struck == [Fault.DROP]
    assert len(recorder.sent) == 2
    assert plan.num_frames == 5
    assert [number(frame) for frame in recorder.answers] == [3, 4]
