"""A link's handshake and its rules, spoken by hand to a real peer: each breach has its code and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from resbm_pb import stage_pb2

from node.unsplit import weights_digest
from stage_server import links
from stage_server.checkpoint import CheckpointStore
from stage_server.codec import clip_for, forward_encoding, pack
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.errors import FrameError, LinkLost, StageError, StateLost
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import Side, StageLedger
from stage_server.links import LinkIdentity, LinkSession
from stage_server.memory_links import MemoryNetwork, MemoryStream
from stage_server.peer import StagePeer
from stage_server.plan import Plan
from stage_server.reports import LinkReport, Report
from stage_server.trainer import StageTrainer
from stage_server.wire import PROTOCOL_VERSION, WireFormat, _latents_checksum, encode_held

RUN_ID = "0123456789abcdef"
UINT32_MAX, UINT64_MAX = 2**32 - 1, 2**64 - 1
CONFIG = StageConfig(
    stages=3,
    model=ModelConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    ),
    bottleneck=BottleneckConfig(width=4),
    codec=CodecConfig(forward="none", backward="none"),
    plan=PlanConfig(steps=4, microbatches_per_step=2, batch=1, tokens=4, evaluation_microbatches=0, checkpoint_every=2),
)  # fmt: skip
WIRE = WireFormat(CONFIG)
UP, DOWN = stage_pb2.UpstreamFrame, stage_pb2.DownstreamFrame


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def hello(stage: int = 0, **changes: object) -> stage_pb2.Open:
    values = {"protocol_version": PROTOCOL_VERSION, "run_id": RUN_ID, "stage": stage, "peer_id": "by hand"}
    return stage_pb2.Open(**(values | changes))  # type: ignore[arg-type]


@cache
def one_latents(step: int = 1, index: int = 0) -> stage_pb2.Latents:
    ids = np.random.default_rng(index).integers(0, 61, (1, 5), dtype=np.int32)
    encoding = forward_encoding(CONFIG.codec)
    values = torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(index))
    latents = pack(values, encoding, clip_for(CONFIG.codec, encoding))
    return WIRE.encode_latents(train(step, index), WIRE.encode_token_ids(ids), latents)


def latents_frame(*messages: stage_pb2.Latents, sequence: int = 1) -> stage_pb2.UpstreamFrame:
    return UP(latents=stage_pb2.LatentsFrame(microbatches=messages, sequence=sequence))


def changed(**fields: object) -> stage_pb2.UpstreamFrame:
    """A frame with one microbatch whose named fields are changed after its checksum was made."""
    message = stage_pb2.Latents()
    message.CopyFrom(one_latents())
    for name, value in fields.items():
        setattr(message, name, value)
    return latents_frame(message)


def status(sequence: int = 1, **fields: int) -> stage_pb2.LinkStatus:
    return stage_pb2.LinkStatus(sequence=sequence, **fields)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for has no event; the scenario's limit bounds it
        await asyncio.sleep(0.002)


@dataclass
class Bench:
    """A real peer of one stage in memory; the test plays its upstream neighbour."""

    peer: StagePeer
    trainer: StageTrainer
    checkpoints: CheckpointStore
    network: MemoryNetwork
    reports: list[Report] = field(default_factory=list)
    raised: list[BaseException | None] = field(default_factory=list)  # how each session ended

    @classmethod
    def of(cls, folder: Path, stage: int = 1) -> Bench:
        store = CheckpointStore(folder, RUN_ID, stage)
        trainer = StageTrainer(CONFIG, RUN_ID, stage, activation_budget_bytes=1 << 30)
        if not store.steps():
            store.save(0, trainer.state_tensors())
        ledger = StageLedger(
            Plan.of(CONFIG.plan), stage=stage, num_stages=3, checkpoints=store.steps(), checkpoint_every=2
        )
        network, reports = MemoryNetwork(), list[Report]()
        peer = StagePeer(
            identity=LinkIdentity(RUN_ID, stage, f"peer-{stage}"),
            ledger=ledger,
            trainer=trainer,
            wire=WIRE,
            checkpoints=store,
            source=None,
            dialer=network,
            report=reports.append,
        )
        bench = cls(peer, trainer, store, network, reports)
        network.listen("peer", bench._serve)
        return bench

    async def _serve(self, stream: links.FrameStream) -> None:
        session = self.peer._run_session(stream, Side.UPSTREAM)
        try:
            await session
        except StageError as error:
            self.raised.append(error)
            return
        except BaseException as error:
            self.raised.append(error)
            raise

    def state(self) -> tuple[object, ...]:
        """What a refused frame must not change: the weights, the ledger, the disk."""
        ledger = self.peer.ledger
        seen = {name: getattr(ledger, name) for name in vars(ledger) if name != "_neighbours"}
        return weights_digest(self.trainer.parameters_fp32()), repr(seen), self.checkpoints.steps()

    async def dial(self) -> MemoryStream:
        stream = await self.network.dial("peer")
        assert isinstance(stream, MemoryStream)
        return stream

    async def open(self, **changes: object) -> MemoryStream:
        """A stream whose handshake is done."""
        stream = await self.dial()
        await stream.send(UP(open=hello(**changes)))  # type: ignore[arg-type]
        assert (await stream.receive()).WhichOneof("body") == "open"
        return stream

    async def ended(self, count: int = 1) -> BaseException | None:
        """How the session number `count` ended."""
        await until(lambda: len(self.raised) >= count)
        return self.raised[count - 1]

    async def still_works(self) -> None:
        """A good link is accepted, and what it sends is kept and known at the next handshake."""
        stream = await self.open()
        await stream.send(latents_frame(one_latents()))
        await until(lambda: bool(self.peer.ledger.holdings(Side.UPSTREAM)))
        assert self.peer.ledger.holdings(Side.UPSTREAM) == [train(1, 0)]
        await stream.close()


Scenario = Callable[[Bench], Awaitable[None]]


def run(folder: Path, scenario: Scenario, stage: int = 1) -> Bench:
    async def bounded() -> Bench:
        async with asyncio.timeout(15):
            bench = Bench.of(folder, stage)
            await scenario(bench)
            await bench.network.close()
            return bench

    return asyncio.run(bounded())


async def refused(bench: Bench, *frames: links.Frame, code: int, opened: bool) -> None:
    """Sends frames on a fresh stream; the last costs the stream, with this code, and nothing else happens."""
    before = bench.state()
    stream = await (bench.open() if opened else bench.dial())
    for frame in frames:
        await stream.send(frame)
    error = await bench.ended()
    assert isinstance(error, FrameError), error
    assert error.code == code
    assert error.cause
    assert error.remedy
    with pytest.raises(LinkLost, match=f"E{code}"):  # the sender is told why
        while True:
            await stream.receive()
    assert bench.state() == before
    assert bench.peer.totals.frames_refused == 1
    assert not bench.peer.links_open[Side.UPSTREAM]
    await bench.still_works()


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
        (UP(open=hello(committed_step=5)), 204),
        (UP(open=hello(committed_step=UINT64_MAX)), 204),
    ],
    ids=["version", "version 0", "run", "no run", "same stage", "next stage", "far stage", "status first",
         "latents first", "goodbye first", "nothing first", "held kind", "beyond the run", "far beyond"],
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
        session = asyncio.create_task(bench.peer._run_session(caller, Side.DOWNSTREAM))
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
        session = asyncio.create_task(bench.peer._run_session(caller, Side.DOWNSTREAM))
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
        assert bench.peer.ledger._neighbours[Side.UPSTREAM].durable == 2

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
        assert bench.peer.links_open[Side.UPSTREAM]
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
        session = bench.peer._sessions[Side.UPSTREAM]
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
