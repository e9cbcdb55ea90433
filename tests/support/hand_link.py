"""A real peer of one stage in memory, and what is needed to speak to it by hand, frame by frame."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
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
from stage_server.errors import FrameError, LinkLost, StageError
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import StageLedger
from stage_server.links import LinkIdentity
from stage_server.memory_links import MemoryNetwork, MemoryStream
from stage_server.peer import StagePeer
from stage_server.plan import Plan
from stage_server.reports import Report
from stage_server.trainer import StageTrainer
from stage_server.wire import PROTOCOL_VERSION, WireFormat
from stage_server.work import Side

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
        session = self.peer.neighbours.run_session(stream, Side.UPSTREAM)
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
        seen = {name: getattr(ledger, name) for name in vars(ledger) if name != "_peers"}
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
    assert not bench.peer.neighbours.links_open[Side.UPSTREAM]
    await bench.still_works()
