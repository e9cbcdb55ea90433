"""The rules of an open link, spoken by hand to a real peer: each breach has its code and changes nothing."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from resbm_pb import stage_pb2
from support.hand_link import (
    DOWN,
    UINT32_MAX,
    UINT64_MAX,
    UP,
    Bench,
    changed,
    hello,
    latents_frame,
    one_latents,
    refused,
    run,
    status,
    train,
    until,
)

from stage_server import links
from stage_server.errors import FrameError, LinkLost, StateLost
from stage_server.links import LinkSession
from stage_server.memory_links import MemoryStream
from stage_server.reports import LinkReport
from stage_server.wire import _latents_checksum
from stage_server.work import SOLE, Side


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- an open link -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (UP(open=hello()), 204),
        (UP(), 204),
        (DOWN(gradients=stage_pb2.GradientsFrame(microbatches=[stage_pb2.Gradients(step=1)], sequence=1)), 204),
        (latents_frame(one_latents(), sequence=links.MAX_FRAMES_AHEAD + 1), 204),
        (latents_frame(one_latents(), sequence=UINT64_MAX), 204),
        (UP(status=status(committed_step=5)), 204),
        (UP(status=status(committed_step=UINT64_MAX, durable_step=UINT64_MAX)), 204),
        (UP(status=status(committed_step=1, durable_step=2)), 204),
        (UP(goodbye=stage_pb2.Goodbye(reason=77)), 204),  # type: ignore[arg-type]
        (changed(kind=0), 204),
        (changed(checksum=0), 208),
        (changed(step=UINT64_MAX), 208),
        (latents_frame(one_latents(step=5)), 210),
        (latents_frame(one_latents(step=UINT64_MAX)), 210),
        (latents_frame(one_latents(index=2)), 210),
        (latents_frame(one_latents(index=UINT32_MAX)), 210),
        (latents_frame(one_latents(step=3)), 210),
    ],
    ids=["second open", "nothing", "gradients from upstream", "sequence jump", "far jump", "status beyond the run",
         "status far beyond", "durable before committed", "goodbye for no reason", "kind", "checksum", "name spoiled",
         "step beyond the run", "far step", "index", "far index", "step too early"],
)  # fmt: skip
def test_a_breach_costs_its_sender_the_stream_and_nothing_else(frame: links.Frame, code: int, tmp_path: Path) -> None:
    run(tmp_path, lambda bench: refused(bench, frame, code=code, opened=True))


def test_latents_from_downstream_are_refused(tmp_path: Path) -> None:
    """The other wrong direction, on the end that dialled."""

    async def scenario(bench: Bench) -> None:
        before = bench.state()
        caller, answerer = MemoryStream.pair()
        session = asyncio.create_task(bench.peer.neighbours.run_session(caller, Side.DOWNSTREAM))
        await answerer.receive()
        await answerer.send(DOWN(open=hello(stage=2)))
        await answerer.send(latents_frame(one_latents()))
        with pytest.raises(FrameError) as error:
            await session
        assert error.value.code == 204
        assert bench.state() == before
        await bench.still_works()

    run(tmp_path, scenario)


def test_numbers_that_no_trainer_should_see_never_reach_it(tmp_path: Path) -> None:
    message = stage_pb2.Latents()
    message.CopyFrom(one_latents())
    wire_values = np.frombuffer(message.latents.values, np.float32).copy()
    wire_values[3] = np.nan
    message.latents.values = wire_values.tobytes()
    message.checksum = _latents_checksum(message)
    run(tmp_path, lambda bench: refused(bench, latents_frame(message), code=211, opened=True))


def test_a_lost_frame_is_noticed_by_the_next_status(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        await stream.send(latents_frame(one_latents(), sequence=1))
        await stream.send(UP(status=status(1, frames_sent=1)))
        await stream.send(latents_frame(one_latents(1, 1), sequence=3))
        await stream.send(UP(status=status(2, frames_sent=3)))
        error = await bench.ended()
        assert isinstance(error, LinkLost)
        assert "frame 2" in error.cause
        assert bench.peer.totals.frames_refused == 0  # nobody's fault
        assert bench.peer.ledger.holdings(Side.UPSTREAM) == [train(1, 0), train(1, 1)]

    run(tmp_path, scenario)


def test_frames_out_of_order_and_doubled_are_no_breach(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        for sequence in (2, 2, 1, 1, 3):
            await stream.send(latents_frame(one_latents(1, sequence % 2), sequence=sequence))
        await stream.send(UP(status=status(1, frames_sent=3, committed_step=1)))
        await until(lambda: not bench.peer.ledger.wants(Side.UPSTREAM, train(1, 0)))
        assert not bench.raised

    run(tmp_path, scenario)


def test_a_status_that_was_overtaken_is_ignored(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        await stream.send(UP(status=status(2, committed_step=2, durable_step=2)))
        await stream.send(UP(status=status(1, committed_step=1, durable_step=0)))
        await stream.send(latents_frame(one_latents()))
        await until(lambda: bool(bench.peer.ledger.holdings(Side.UPSTREAM)))
        assert bench.peer.ledger._marks[Side.UPSTREAM].of(SOLE).durable == 2

    run(tmp_path, scenario)


def test_silence_is_a_lost_link_and_a_voice_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STATUS_INTERVAL", timedelta(milliseconds=20))
    monkeypatch.setattr(links, "SILENCE_LIMIT", timedelta(milliseconds=250))

    async def scenario(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        stream = await bench.open()
        for sequence in range(1, 9):
            await asyncio.sleep(0.06)
            await stream.send(UP(status=status(sequence)))
        assert not bench.raised  # 480 ms with words in between
        fell_silent = loop.time()
        error = await bench.ended()
        assert isinstance(error, LinkLost)
        assert "silent" in error.cause
        assert 0.2 < loop.time() - fell_silent < 3
        await bench.still_works()

    run(tmp_path, scenario)


def test_a_live_link_says_something_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "STATUS_INTERVAL", timedelta(milliseconds=20))

    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        statuses = [(await stream.receive()).status.sequence for _ in range(5)]
        assert statuses == [1, 2, 3, 4, 5]

    run(tmp_path, scenario)


def test_a_newer_stream_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        old = await bench.open()
        new = await bench.open()
        error = await bench.ended()
        assert isinstance(error, LinkLost)
        assert "newer" in error.cause
        with pytest.raises(LinkLost):
            while True:
                await old.receive()
        assert bench.peer.neighbours.links_open[Side.UPSTREAM]
        await new.send(latents_frame(one_latents()))
        await until(lambda: bool(bench.peer.ledger.holdings(Side.UPSTREAM)))
        lost = [r for r in bench.reports if isinstance(r, LinkReport) and not r.open]
        assert lost == []  # the neighbour was never gone

    run(tmp_path, scenario)


@pytest.mark.parametrize("reason", ["REASON_DRAINING", "REASON_RUN_COMPLETE", "REASON_UNSPECIFIED"])
def test_a_goodbye_is_reported(reason: str, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        await stream.send(UP(goodbye=stage_pb2.Goodbye(reason=stage_pb2.Goodbye.Reason.Value(reason))))
        await stream.send(latents_frame(one_latents()))  # what follows is still taken
        await until(lambda: bool(bench.peer.ledger.holdings(Side.UPSTREAM)))
        said = [r.detail for r in bench.reports if isinstance(r, LinkReport)]
        assert said[-1] == f"leaves: {reason}"

    run(tmp_path, scenario)


def test_a_peer_that_leaves_says_goodbye_after_what_it_has_to_send(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await bench.open()
        session = bench.peer.neighbours._sessions[Side.UPSTREAM, SOLE]
        assert isinstance(session, LinkSession)
        session.report()
        await session.say_goodbye(stage_pb2.Goodbye.REASON_DRAINING, timedelta(seconds=2))
        bodies = []
        while not bodies or bodies[-1] != "goodbye":
            bodies.append((await stream.receive()).WhichOneof("body"))
        assert bodies[:-1]
        assert set(bodies[:-1]) == {"status"}

    run(tmp_path, scenario)


@pytest.mark.parametrize("code", [403, 202, 0, 99999])
def test_a_refusal_by_the_caller_ends_the_link_and_never_the_peer(code: int, tmp_path: Path) -> None:
    """Anybody can dial: no caller's word is final, not even "your state is lost"."""
    goodbye = stage_pb2.Goodbye(reason=stage_pb2.Goodbye.REASON_REFUSED, code=code, detail="because")  # type: ignore[arg-type]

    async def scenario(bench: Bench) -> None:
        bench.network.listen("peer", bench.peer.serve_link)
        running = asyncio.create_task(bench.peer.run())
        stream = await bench.open()
        await stream.send(UP(goodbye=goodbye))
        with pytest.raises((LinkLost, StateLost)):
            while True:
                await stream.receive()
        await bench.still_works()
        assert not running.done()
        bench.peer.drain()
        await running

    run(tmp_path, scenario)
