"""A link's handshake, spoken by hand to a real peer: a wrong caller gets a code and changes nothing."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from resbm_pb import stage_pb2
from support.hand_link import (
    DOWN,
    RUN_ID,
    UINT32_MAX,
    UINT64_MAX,
    UP,
    Bench,
    hello,
    latents_frame,
    one_latents,
    refused,
    run,
    status,
    train,
)

from stage_server import links
from stage_server.errors import FrameError, LinkLost
from stage_server.memory_links import MemoryStream
from stage_server.wire import PROTOCOL_VERSION, encode_held
from stage_server.work import Side


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- handshake --------------------------------------------------------------------------------------------------

UNKNOWN_KIND = stage_pb2.HeldMicrobatch(step=1, kind=9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (UP(open=hello(protocol_version=PROTOCOL_VERSION + 1)), 201),
        (UP(open=hello(protocol_version=0)), 201),
        (UP(open=hello(run_id="fedcba9876543210")), 202),
        (UP(open=hello(run_id="")), 202),
        (UP(open=hello(stage=1)), 203),
        (UP(open=hello(stage=2)), 203),
        (UP(open=hello(stage=UINT32_MAX)), 203),
        (UP(status=status()), 204),
        (latents_frame(one_latents()), 204),
        (UP(goodbye=stage_pb2.Goodbye(reason=stage_pb2.Goodbye.REASON_DRAINING)), 204),
        (UP(), 204),
        (UP(open=hello(held=[UNKNOWN_KIND])), 204),
        (UP(open=hello(peer_id="x" * 129)), 206),
        (UP(open=hello(held=encode_held([train(1, 0)] * (links.MAX_HELD + 1)))), 206),
        (UP(open=hello(committed_step=5)), 204),
        (UP(open=hello(committed_step=UINT64_MAX)), 204),
    ],
    ids=["version", "version 0", "run", "no run", "same stage", "next stage", "far stage", "status first",
         "latents first", "goodbye first", "nothing first", "held kind", "long name", "much held",
         "beyond the run", "far beyond"],
)  # fmt: skip
def test_a_wrong_caller_is_refused(first: links.Frame, code: int, tmp_path: Path) -> None:
    run(tmp_path, lambda bench: refused(bench, first, code=code, opened=False))


def test_a_wrong_caller_learns_nothing_but_why(tmp_path: Path) -> None:
    """Refused before anything is said: no Open comes back."""

    async def scenario(bench: Bench) -> None:
        stream = await bench.dial()
        await stream.send(UP(open=hello(run_id="other")))
        with pytest.raises(LinkLost, match="E202"):
            await stream.receive()

    run(tmp_path, scenario)


def test_the_dialling_end_refuses_a_wrong_answer_and_says_so(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        caller, answerer = MemoryStream.pair()
        session = asyncio.create_task(bench.peer.neighbours.run_session(caller, Side.DOWNSTREAM))
        assert (await answerer.receive()).open.stage == 1
        await answerer.send(DOWN(open=hello(stage=0)))
        with pytest.raises(FrameError) as error:
            await session
        assert error.value.code == 203
        with pytest.raises(LinkLost, match="E203"):
            await answerer.receive()

    run(tmp_path, scenario)


def test_what_is_held_is_not_sent_again(tmp_path: Path) -> None:
    """The peer says what it has; the caller is asked for no more."""

    async def scenario(bench: Bench) -> None:
        await bench.still_works()
        stream = await bench.dial()
        await stream.send(UP(open=hello()))
        answer = (await stream.receive()).open
        assert list(answer.held) == encode_held([train(1, 0)])
        assert (answer.run_id, answer.stage, answer.peer_id) == (RUN_ID, 1, "peer-1")
        assert (answer.committed_step, answer.protocol_version) == (0, PROTOCOL_VERSION)

    run(tmp_path, scenario)


def test_a_caller_that_never_speaks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "HANDSHAKE_LIMIT", timedelta(milliseconds=50))

    async def scenario(bench: Bench) -> None:
        await bench.dial()
        error = await bench.ended()
        assert isinstance(error, LinkLost)
        assert "handshake" in error.cause
        await bench.still_works()

    run(tmp_path, scenario)
