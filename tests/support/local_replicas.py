"""A swarm with many replicas a stage in one process: real ledgers, trainers, links and calls over gRPC, real state
transfers. The directory is a list, and averaging adds up in memory unless a test brings the real one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resbm_pb import stage_pb2

from coordinator.averaging import AveragingFailed, Reason, StageSum
from node.replication.calls import GrpcLine, ReplicaService
from node.replication.group import Averaging, Means, Member, ReplicaGroup
from stage_server.checkpoint import CheckpointStore
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, OptimizerConfig, PlanConfig, StageConfig
from stage_server.grpc_links import GrpcDialer
from stage_server.ledger import StageLedger
from stage_server.links import LinkIdentity
from stage_server.peer import StagePeer
from stage_server.plan import Plan
from stage_server.replica_trainer import ReplicaTrainer
from stage_server.reports import CompleteReport, EvaluationReport, Report, StepReport
from stage_server.server import ServedStage, StageServer, StageService
from stage_server.wire import WireFormat
from support.local_swarm import RUN_ID, token_source

NewAveraging = Callable[[int], Awaitable[Averaging]]


def tiny(stages: int = 2, codec: str = "none", **plan: int) -> StageConfig:
    """A run of seconds."""
    values = {"steps": 6, "microbatches_per_step": 6, "batch": 1, "tokens": 8, "evaluation_microbatches": 2}
    return StageConfig(
        stages=stages,
        model=ModelConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=stages,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        ),
        bottleneck=BottleneckConfig(width=4),
        codec=CodecConfig(forward=codec, backward=codec),
        optimizer=OptimizerConfig(muon_lr=1e-3, adamw_lr=1e-3),
        plan=PlanConfig(**(values | {"checkpoint_every": 2} | plan)),
    )


class Hub:
    """Where averagings in memory meet."""

    def __init__(self) -> None:
        self.rounds: dict[str, dict[str, tuple[np.ndarray, int]]] = {}
        self.arrived = asyncio.Condition()
        self.addresses = itertools.count(1)

    async def averaging(self, num_values: int) -> Averaging:
        return MemoryAveraging(self, f"averager {next(self.addresses)} of {num_values} values", num_values)


class MemoryAveraging:
    """Stands in for the averaging process; tests/integration/test_averaging.py has the real one."""

    def __init__(self, hub: Hub, address: str, num_values: int) -> None:
        self.hub, self.address = hub, address
        self.values = np.zeros(num_values, np.float32)
        self.total = np.zeros(num_values, np.float32)

    async def sum(self, key: str, members: Sequence[str], count: int, within: timedelta) -> StageSum:
        gathered = self.hub.rounds.setdefault(key, {})
        async with self.hub.arrived:
            gathered[self.address] = self.values.copy(), count
            self.hub.arrived.notify_all()
            try:
                async with asyncio.timeout(min(5.0, within.total_seconds())):
                    await self.hub.arrived.wait_for(lambda: gathered.keys() >= set(members))
            except TimeoutError:
                missing = sorted(set(members) - gathered.keys())
                raise AveragingFailed(Reason.TIMED_OUT, f"{', '.join(missing)} never came") from None
        self.total[:] = np.sum([gathered[member][0] for member in sorted(members)], axis=0)
        counted = sum(gathered[member][1] for member in members)
        digest = hashlib.sha256(self.total.tobytes()).hexdigest()
        return StageSum(counted, digest, 0.0, 0, 0)

    async def close(self) -> None:
        return


@dataclass
class LocalReplica:
    """One peer."""

    name: str
    stage: int
    folder: Path
    peer: StagePeer
    trainer: ReplicaTrainer
    group: ReplicaGroup
    server: StageServer
    endpoint: str
    reports: list[Report] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    totals: dict[int, torch.Tensor] = field(default_factory=dict)  # the gradient that each step was taken with

    def losses(self) -> dict[int, float]:
        steps = (report for report in self.reports if isinstance(report, StepReport))
        return {report.step: report.loss for report in steps if report.loss is not None}

    def evaluations(self) -> dict[int, float]:
        return {r.committed_step: r.loss for r in self.reports if isinstance(r, EvaluationReport)}


class LocalReplicas:
    """Call everything within one event loop."""

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        new_averaging: NewAveraging | None = None,
        new_trainer: Callable[..., ReplicaTrainer] = ReplicaTrainer,
    ) -> None:
        torch.set_num_threads(1)
        self.new_trainer = new_trainer
        self.config, self.folder = config, folder
        self.new_averaging = new_averaging or Hub().averaging
        self.replicas: dict[str, LocalReplica] = {}
        self.wire = WireFormat(config)
        self._numbers = itertools.count(1)
        self.failures: list[BaseException] = []

    def of(self, stage: int) -> list[LocalReplica]:
        return [replica for replica in self.replicas.values() if replica.stage == stage]

    async def join(self, stage: int, name: str | None = None) -> LocalReplica:
        """A new peer, or one that comes back under its name with what it has on disk."""
        number = next(self._numbers)
        name = name or f"r{number}"
        folder = self.folder / name
        store = CheckpointStore(folder, RUN_ID, stage)
        trainer = self.new_trainer(self.config, RUN_ID, stage, activation_budget_bytes=1 << 30)
        if store.steps():
            trainer.load_state_tensors(store.load(store.steps()[-1]))
        ledger = StageLedger(
            Plan.of(self.config.plan),
            stage=stage,
            num_stages=self.config.stages,
            checkpoints=store.steps(),
            checkpoint_every=self.config.plan.checkpoint_every,
            shared=True,
        )
        service, replicas = StageService(), ReplicaService()
        server = StageServer(service, self.wire.max_frame_bytes, also=[replicas.add_to])
        endpoint = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        reports: list[Report] = []
        peer = StagePeer(
            identity=LinkIdentity(RUN_ID, stage, name),
            ledger=ledger,
            trainer=trainer,
            wire=self.wire,
            checkpoints=store,
            source=token_source(self.config) if stage == 0 else None,
            dialer=GrpcDialer(self.wire.max_frame_bytes),
            report=reports.append,
        )
        means = Means(
            line=lambda endpoint: GrpcLine(endpoint, RUN_ID, stage),
            averaging=lambda: self.new_averaging(trainer.num_values),
        )
        member = Member(RUN_ID, RUN_ID, stage, name, endpoint, reserved_at=float(number), throughput=1.0)
        group = ReplicaGroup(member, peer, trainer, store, means)
        replica = LocalReplica(name, stage, folder, peer, trainer, group, server, endpoint, reports)
        self._record_totals(replica)
        service.attach(ServedStage(RUN_ID, stage_pb2.DescribeReply, peer.serve_link, store))
        replicas.attach(group)
        self.replicas[name] = replica
        replica.task = asyncio.create_task(self._live(replica))
        return replica

    def _record_totals(self, replica: LocalReplica) -> None:
        commit = replica.trainer.commit

        def recorded(step: int):
            total = torch.empty(replica.trainer.num_values)
            replica.trainer.write_gradients(total)
            replica.totals[step] = total
            return commit(step)

        replica.trainer.commit = recorded  # type: ignore[method-assign]

    async def kill(self, name: str) -> None:
        """As SIGKILL would: nothing is saved, nobody is told."""
        replica = self.replicas.pop(name)
        assert replica.task is not None
        replica.task.cancel()
        await asyncio.gather(replica.task, return_exceptions=True)
        await replica.server.stop(0)

    async def _live(self, replica: LocalReplica) -> None:
        parts = [asyncio.create_task(part) for part in (replica.peer.run(), replica.group.run(), self._follow(replica))]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            self.failures += [error for p in parts if p.done() and not p.cancelled() and (error := p.exception())]
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _follow(self, replica: LocalReplica) -> None:
        """What the directory would tell."""
        while True:
            serving = [r for r in self.of(replica.stage + 1) if r.group.serving]
            replica.peer.neighbours.set_next_hops({r.name: r.endpoint for r in serving})
            others = [r for r in self.of(replica.stage) if r is not replica]
            replica.group.listed({r.name: r.endpoint for r in others})
            if any(isinstance(report, CompleteReport) for report in replica.reports):
                replica.complete.set()
            await asyncio.sleep(0.05)

    async def until_complete(self, seconds: float) -> None:
        """Until every replica that lives has finished the run."""
        async with asyncio.timeout(seconds):
            while not all(replica.complete.is_set() for replica in self.replicas.values()):
                if self.failures:
                    raise self.failures[0]
                await asyncio.sleep(0.05)

    async def until_step(self, step: int, seconds: float = 60.0) -> None:
        """Until some replica of every stage has committed it."""
        async with asyncio.timeout(seconds):
            stages = range(self.config.stages)
            while not all(any(r.peer.ledger.committed >= step for r in self.of(stage)) for stage in stages):
                if self.failures:
                    raise self.failures[0]
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        for name in list(self.replicas):
            await self.kill(name)


def run(
    scenario: Callable[[LocalReplicas], Awaitable[None]], config: StageConfig, folder: Path, **options: Any
) -> None:
    """Plays a scenario to its end."""

    async def whole() -> None:
        swarm = LocalReplicas(config, folder, **options)
        try:
            await scenario(swarm)
        finally:
            await swarm.close()

    asyncio.run(whole())
