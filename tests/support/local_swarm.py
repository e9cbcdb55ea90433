"""A whole swarm of real stages in one process: real ledgers, trainers, checkpoints and links, no directory.

Stages are joined over memory or over gRPC on loopback, through fault plans if there are any, and can be killed and
started again from what they left on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from resbm_pb import stage_pb2

from node.unsplit import UnsplitModel, weights_digest
from stage_server.checkpoint import CheckpointStore
from stage_server.config import StageConfig
from stage_server.errors import RewindNeeded
from stage_server.faults import FaultPlan, FaultyDialer
from stage_server.grpc_links import GrpcDialer
from stage_server.ids import MicrobatchId
from stage_server.ledger import StageLedger
from stage_server.links import FrameStream, LinkIdentity
from stage_server.memory_links import MemoryNetwork
from stage_server.peer import StagePeer
from stage_server.plan import Plan
from stage_server.reports import CompleteReport, EvaluationReport, LinkReport, Report, StepReport
from stage_server.server import ServedStage, StageServer, StageService
from stage_server.trainer import StageTrainer
from stage_server.wire import TokenIds, WireFormat

RUN_ID = "0123456789abcdef"


def token_source(config: StageConfig) -> Callable[[MicrobatchId], TokenIds]:
    """Microbatches of noise: a pure function of the name."""

    def read(name: MicrobatchId) -> TokenIds:
        generator = np.random.default_rng([config.seed, name.step, int(name.kind), name.index])
        shape = (config.plan.batch, config.plan.tokens + 1)
        return generator.integers(0, config.model.vocab_size, shape, dtype=np.int32)

    return read


@dataclass
class Reference:
    """What one process without any network gets."""

    losses: list[float]
    evaluations: dict[int, float]
    digest: str

    @classmethod
    def of(cls, config: StageConfig) -> Reference:
        torch.set_num_threads(1)
        model, source, plan = UnsplitModel(config, RUN_ID), token_source(config), Plan.of(config.plan)
        losses, evaluations = [], {}
        for step in range(1, config.plan.steps + 1):
            if plan.evaluates(step):
                evaluations[step - 1] = model.evaluate(step, source)
            losses.append(model.train_step(step, source))
        if plan.evaluates(config.plan.steps + 1):
            evaluations[config.plan.steps] = model.evaluate(config.plan.steps + 1, source)
        return cls(losses, evaluations, weights_digest(model.parameters_fp32()))


@dataclass
class _Stage:
    task: asyncio.Task[None] | None = None
    peer: StagePeer | None = None
    trainer: StageTrainer | None = None
    serving: set[asyncio.Task[None]] = field(default_factory=set)
    starts: int = 0
    reports: list[Report] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class LocalSwarm:
    """Call `run` within an event loop; `kill` from a `on_report` hook."""

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        *,
        plans: Mapping[int, FaultPlan] | None = None,
        over_grpc: bool = False,
        on_report: Callable[[LocalSwarm, int, Report], None] | None = None,
        activation_budget_bytes: int = 1 << 30,
    ) -> None:
        """`plans`: by link, the fault plan of the link from that stage to the next."""
        torch.set_num_threads(1)
        self.config, self.folder, self.plans = config, folder, plans or {}
        self.over_grpc, self.on_report = over_grpc, on_report
        self.budget = activation_budget_bytes
        self.wire = WireFormat(config)
        self.network = MemoryNetwork()
        self.stages = [_Stage() for _ in range(config.stages)]
        self._servers: list[StageServer] = []
        self._endpoints: list[str] = []

    async def run(self, limit_seconds: float = 60.0) -> None:
        """Until every stage is complete."""
        async with asyncio.timeout(limit_seconds):
            await self._listen()
            for stage in range(self.config.stages):
                self.start(stage)
            try:
                failed = asyncio.create_task(self._watch_for_failures())
                done = asyncio.gather(*(stage.complete.wait() for stage in self.stages))
                await asyncio.wait({failed, done}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    failed.result()
            finally:
                failed.cancel()
                done.cancel()
                await asyncio.gather(failed, done, return_exceptions=True)
                await self._stop()

    def start(self, stage: int) -> None:
        """Starts (again) from the newest checkpoint on disk."""
        entry = self.stages[stage]
        store = CheckpointStore(self.folder / f"stage-{stage}", RUN_ID, stage)
        entry.trainer = StageTrainer(self.config, RUN_ID, stage, activation_budget_bytes=self.budget)
        if store.steps():
            entry.trainer.load_state_tensors(store.load(store.steps()[-1]))
        plan = self.plans.get(stage)
        dialer = GrpcDialer(self.wire.max_frame_bytes) if self.over_grpc else self.network
        entry.complete.clear()
        entry.peer = StagePeer(
            identity=LinkIdentity(RUN_ID, stage, f"peer-{stage}"),
            ledger=StageLedger(
                Plan.of(self.config.plan),
                stage=stage,
                num_stages=self.config.stages,
                checkpoints=store.steps(),
                checkpoint_every=self.config.plan.checkpoint_every,
            ),
            trainer=entry.trainer,
            wire=self.wire,
            checkpoints=store,
            source=token_source(self.config) if stage == 0 else None,
            dialer=FaultyDialer(dialer, plan) if plan else dialer,
            report=lambda report: self._reported(stage, report),
        )
        if stage + 1 < self.config.stages:
            entry.peer.set_next_hop(self._endpoints[stage + 1])
        entry.starts += 1
        entry.task = asyncio.create_task(self._live(stage, entry.peer))

    def kill(self, stage: int) -> None:
        """Ends a stage as SIGKILL would: nothing is saved, nobody is told. It starts again a moment later."""
        entry = self.stages[stage]
        if entry.task is not None:
            entry.task.cancel()
        for link in entry.serving:
            link.cancel()
        entry.peer = None
        asyncio.get_running_loop().call_later(0.02, self.start, stage)

    def digest(self) -> str:
        """Over the weights of all stages."""
        trainers = [stage.trainer for stage in self.stages if stage.trainer is not None]
        return weights_digest(pair for trainer in trainers for pair in trainer.parameters_fp32())

    def losses(self, stage: int) -> list[float]:
        """By step. A step told twice (replayed after a kill) must have been told with the same loss."""
        steps: dict[int, float] = {}
        for report in self.stages[stage].reports:
            if isinstance(report, StepReport):
                assert steps.setdefault(report.step, report.loss) == report.loss
        return [steps[step] for step in sorted(steps)]

    def evaluations(self, stage: int) -> dict[int, float]:
        reports = [r for r in self.stages[stage].reports if isinstance(r, EvaluationReport)]
        return {report.committed_step: report.loss for report in reports}

    def links_lost(self) -> int:
        return sum(isinstance(r, LinkReport) and not r.open for stage in self.stages for r in stage.reports)

    def _reported(self, stage: int, report: Report) -> None:
        self.stages[stage].reports.append(report)
        if isinstance(report, CompleteReport):
            self.stages[stage].complete.set()
        if self.on_report is not None:
            self.on_report(self, stage, report)

    async def _live(self, stage: int, peer: StagePeer) -> None:
        try:
            await peer.run()
        except RewindNeeded as error:
            peer.go_back(error.to_step)
            self.start(stage)

    async def _watch_for_failures(self) -> None:
        while True:
            for stage in self.stages:
                if stage.task is not None and stage.task.done() and not stage.task.cancelled():
                    stage.task.result()
            await asyncio.sleep(0.05)

    async def _listen(self) -> None:
        for stage in range(self.config.stages):
            if not self.over_grpc:
                self._endpoints.append(f"stage-{stage}")
                self.network.listen(f"stage-{stage}", lambda stream, s=stage: self._serve(s, stream))
                continue
            service = StageService()
            store = CheckpointStore(self.folder / f"stage-{stage}", RUN_ID, stage)
            service.attach(
                ServedStage(RUN_ID, stage_pb2.DescribeReply, lambda stream, s=stage: self._serve(s, stream), store)
            )
            server = StageServer(service, self.wire.max_frame_bytes)
            self._endpoints.append(f"127.0.0.1:{await server.start('127.0.0.1', 0)}")
            self._servers.append(server)

    async def _serve(self, stage: int, stream: FrameStream) -> None:
        entry, task = self.stages[stage], asyncio.current_task()
        assert task is not None
        entry.serving.add(task)
        try:
            if entry.peer is not None:
                await entry.peer.serve_link(stream)
        except asyncio.CancelledError:
            return  # killed: a process that dies ends its streams, so this call must end too
        finally:
            entry.serving.discard(task)
            await stream.close()

    async def _stop(self) -> None:
        tasks = [stage.task for stage in self.stages if stage.task is not None]
        for stage in self.stages:
            if stage.peer is not None:
                stage.peer.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.network.close()
        for server in self._servers:
            await server.stop(0)
