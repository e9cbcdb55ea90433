"""One node at work: the asynchronous half of joining, then the stage with its place in the directory.

This is the wiring. It builds the rooms' parts and joins them; it decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

from resbm_pb import stage_pb2

from coordinator.assignment import MachineProfile
from coordinator.averaging import ReplicaAveraging, Wire
from coordinator.averaging_launch import Launcher
from coordinator.directory import MAX_KEPT_STAGES, RESERVED, PeerEntry
from coordinator.epochs import Epoch, epoch_of
from coordinator.errors import RunNotFound, StageUnavailable
from coordinator.rebalancing import Move
from coordinator.settlement import Place, Rules
from coordinator.swarm import Swarm
from coordinator.ticket import Ticket
from node import speed
from node.addresses import announced_host
from node.assembly import (
    StageParts,
    build_stage,
    common_steps,
    recall_run,
    remember_run,
    stage_with_state,
    stages_kept_beside,
)
from node.config import RunConfig, load_toml
from node.covering import Covering, Room, policy_of, until_relieved
from node.custody import Custodian
from node.epochs import EpochBegins, EpochWatch, enter_epoch
from node.events import Assigned, Live, Moving, Relieved, Rewind, WorkerSpec, emit
from node.join_steps import JoinSteps
from node.metrics import NodeInfo, WorkerMetrics
from node.metrics_server import MetricsServer
from node.moving import MovedAway, Mover, recall_move
from node.presence import Presence, Shared, claiming
from node.replication.calls import GrpcLine, ReplicaService
from node.replication.group import Means, Member, ReplicaGroup
from node.replication.record import StepRecorder
from node.reporting import EventReporter
from node.restoring import TakenUp, take_up
from node.sampling import keep_sampling
from node.tcp_links import LinkWatch
from node.version import __version__
from stage_server.concurrency import cancelled, until_first_ends
from stage_server.errors import LinkLost, PortTaken, RewindNeeded
from stage_server.grpc_links import describe
from stage_server.links import LinkIdentity
from stage_server.peer import StagePeer
from stage_server.replica_trainer import ReplicaTrainer
from stage_server.server import ServedStage, StageServer, StageService
from stage_server.state_serving import StateLimits
from stage_server.wire import PROTOCOL_VERSION, WireFormat

log = logging.getLogger(__name__)

REACH_LIMIT = timedelta(seconds=3)
PATIENCE_WITH_STATE = timedelta(minutes=2)


class StageNode:
    """From a ticket to a served stage, until it is told to drain. A finished run's weights are served till then."""

    def __init__(
        self, spec: WorkerSpec, swarm: Swarm, ticket: Ticket, *, device: str, steps: JoinSteps, launcher: Launcher
    ) -> None:
        self._spec = spec
        self._swarm = swarm
        self._ticket = ticket
        self._peer_id = swarm.peer_id
        self._device = device
        self._steps = steps
        self._launcher = launcher
        self._host = announced_host(spec.host, spec.announce)
        self._service = StageService(StateLimits(bytes_per_second=spec.state_rate_mbit * 1e6 / 8 or None))
        self._replica_service = ReplicaService()
        self._peer: StagePeer | None = None
        self._metrics: WorkerMetrics | None = None
        self._reporter: EventReporter | None = None
        self._machine: MachineProfile | None = None
        self._moving: Move | None = None
        self._room = Room()
        self._asked_to_drain = asyncio.Event()

    def drain(self) -> None:
        """Finish the task at hand, save, say goodbye, leave the directory; `run` returns then."""
        self._asked_to_drain.set()
        if self._metrics is not None:
            self._metrics.set_state("draining")
        self._drain_peer()

    async def run(self) -> None:
        """Joins and serves. Raises the typed errors of all rooms, and RewindNeeded for a restart."""
        serving = asyncio.ensure_future(self._join_and_serve())
        leaving = asyncio.ensure_future(self._asked_to_drain.wait())
        await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not serving.done() and self._peer is None:  # asked to leave before there was anything to drain
            await cancelled(serving)
        else:
            await serving

    async def _join_and_serve(self) -> None:
        config = await self._fetch_config()
        also = [self._replica_service.add_to] if config.replicas.max_replicas is None else []
        server = StageServer(self._service, WireFormat(config).max_frame_bytes, also)
        try:
            entry = await self._settle(config, await self._listen(server))
            await self._build_and_serve(config, entry)
        finally:
            await server.stop()

    async def _fetch_config(self) -> RunConfig:
        """The run as published or, for a peer that has worked on it, as kept. Raises RunNotFound, DirectoryLost."""
        try:
            run = await self._swarm.fetch_run(self._ticket, lambda text: load_toml(text).run_id)
        except RunNotFound:
            kept = recall_run(self._spec.state_folder, self._ticket.run_id)
            if kept is None:
                raise
            log.warning("the run is not published any more: going on with the run file kept here")
            return kept
        config = load_toml(run.config_toml)
        remember_run(self._spec.state_folder, config, run.config_toml)
        await self._swarm.republish_run(run.sealed)
        return config

    # -- joining ------------------------------------------------------------------------------------------------

    async def _listen(self, server: StageServer) -> str:
        """Returns the endpoint that others dial."""
        with self._steps.step("reach") as note:
            endpoint = f"{self._host}:{await self._bind(server)}"
            try:
                await describe(endpoint, REACH_LIMIT)
                note(f"{endpoint} answers")
            except LinkLost:
                note(f"! {endpoint} does not answer from here; other peers may not reach it either")
        return endpoint

    async def _bind(self, server: StageServer) -> int:
        """The port asked for; else that of the life before, so that neighbours find a restarted peer at once."""
        remembered = self._spec.state_folder / "port"
        if self._spec.port == 0 and remembered.exists():
            try:
                return await server.start(self._spec.host, int(remembered.read_text()))
            except (PortTaken, ValueError):
                log.info("the port of the life before is taken")
        port = await server.start(self._spec.host, self._spec.port)
        try:
            remembered.write_text(str(port))
        except OSError as error:
            log.warning("the port is not remembered for a restart: %s", error)
        return port

    async def _settle(self, config: RunConfig, endpoint: str) -> PeerEntry:
        with self._steps.step("speed") as note:
            machine, capacity = await self._measure(config, note)
        shared, beside = config.replicas.max_replicas is None, self._spec.beside
        also = self._spec.also[: capacity - 1]
        self._room = Room(also, stands_in=shared and capacity > 1 and self._spec.stage is None)
        entry = PeerEntry(
            run_id=config.run_id,
            stage=0,
            peer_id=self._peer_id,
            endpoints=(endpoint,),
            state=RESERVED,
            throughput=machine.throughput,
            reserved_at=time.time(),
            software_version=__version__,
            bootstrap=tuple(self._swarm.addresses()),
            node_id=beside.node_id if beside else "",
            stand_in=beside.stand_in if beside else False,
            claimed_at=beside.claimed_at if beside else 0.0,
            max_stages=capacity if self._room.stands_in else 1,
            kept_stages=stages_kept_beside(self._spec.state_folder, config.run_id)[:MAX_KEPT_STAGES],
        )
        with self._steps.step("stage") as note:
            place = await self._take_place(config, entry, machine)
            note(place.reason)
        emit(Assigned(stage=place.stage, num_stages=config.stages, reason=place.reason))
        throughput = machine.rates[place.stage]
        return replace(entry, stage=place.stage, reserved_at=place.reserved_at, throughput=throughput)

    async def _measure(self, config: RunConfig, note: Callable[[str], None]) -> tuple[MachineProfile, int]:
        """What the machine is to this worker, and how many stages it would serve. Only its first worker measures."""
        spec = self._spec
        if spec.beside is not None:
            note(f"{spec.beside.throughput:.1f} microbatches/s, as measured before")
            return MachineProfile(self._peer_id, spec.beside.throughput, (True,) * config.stages), 1
        measured = await asyncio.to_thread(speed.measure, config, self._device, spec.activation_budget_bytes)
        room = max(1, measured.num_stages + spec.num_beside)
        left_out = spec.also[room - 1 :]
        may_share = config.replicas.max_replicas is None
        wanted = (spec.max_stages or config.stages) if may_share else 1
        words = f"{measured.throughput:.1f} microbatches/s on one stage"
        if left_out:
            words = f"! {words}; no memory for stage {', '.join(map(str, left_out))}"
        elif wanted > 1 or spec.also:
            words = f"{words}, memory for {min(room, config.stages)} of {config.stages}"
        note(words)
        machine = MachineProfile(self._peer_id, measured.throughput, measured.fits)
        return machine, min(room, len(spec.also) + 1 if spec.also else wanted)

    async def _take_place(self, config: RunConfig, entry: PeerEntry, machine: MachineProfile) -> Place:
        asked = self._spec.stage
        self._machine = machine
        moved = recall_move(self._spec.state_folder / config.run_id)
        held = moved.stage if moved else stage_with_state(self._spec.state_folder, config.run_id)
        wanted = held if asked is None else asked
        # Who holds a stage's weights waits for its place when someone else has taken it meanwhile.
        patience = PATIENCE_WITH_STATE if held is not None and held == wanted else timedelta(0)
        limit = config.replicas.max_replicas
        try:
            rules = Rules(wanted=wanted, max_replicas=limit, patience=patience)
            return await self._swarm.settle(entry, machine, config.stages, rules)
        except StageUnavailable:
            if asked is not None:
                raise
            return await self._swarm.settle(entry, machine, config.stages, Rules(max_replicas=limit))

    # -- serving ------------------------------------------------------------------------------------------------

    async def _build_and_serve(self, config: RunConfig, entry: PeerEntry) -> None:
        info = NodeInfo(config.run_id, config.name, entry.stage, config.stages, __version__, self._device)
        metrics = self._metrics = WorkerMetrics(info)
        self._swarm.on_dht_request(metrics.add_dht_request)
        port = self._spec.metrics_port
        server = None if port is None else MetricsServer(metrics, self._spec.host, port)
        try:
            await self._build_and_work(config, entry, metrics, server.endpoint if server else None)
        finally:
            if server is not None:
                server.close()

    async def _build_and_work(
        self, config: RunConfig, entry: PeerEntry, metrics: WorkerMetrics, metrics_endpoint: str | None
    ) -> None:
        reporter = self._reporter = EventReporter(entry.stage, metrics, emit)
        links = LinkWatch(int(entry.endpoints[0].rpartition(":")[2]))
        folder = self._spec.state_folder
        with self._steps.step("state") as note:
            taken_up = await take_up(self._swarm, config, entry, folder, on_progress=reporter.transfer)
            epoch = taken_up.epoch
            if epoch != epoch_of(entry):
                entry = replace(entry, epoch=epoch.number, epoch_step=epoch.step)
                await self._swarm.publish_peer(entry)  # others follow while this peer builds its stage
            parts = await self._build(config, entry)
            reporter.base_bytes = parts.base_bytes
            identity = LinkIdentity(epoch.named(config.run_id), entry.stage, self._peer_id)
            self._peer = parts.joined(identity, reporter)
            committed = parts.ledger.committed
            whence = " from a copy that peers of the next stage keep" if taken_up.restored else ""
            note(f"step {committed} of {config.plan.steps}{whence}" if committed else "initial weights")
        shared = self._shared(config, entry, parts, reporter, taken_up)
        presence = Presence(
            self._swarm,
            entry,
            self._peer,
            reporter,
            links=links,
            state_folder=folder,
            ticket=self._ticket,
            shared=shared,
        )
        with self._steps.step("live") as note:
            served = ServedStage(config.run_id, self._describe, self._peer.serve_link, parts.checkpoints)
            if shared is not None:
                served = replace(served, copies=shared.custodian.copies)
                self._replica_service.attach(shared.group)
            self._service.attach(served)
            await presence.announce()
            note(f"serving stage {entry.stage} at {entry.endpoints[0]}")
        live = Live(
            stage=entry.stage,
            peer_id=self._peer_id,
            endpoint=entry.endpoints[0],
            metrics_endpoint=metrics_endpoint,
            committed_step=committed,
            run=config.name,
            steps=config.plan.steps,
        )
        metrics.observe(live)
        emit(live)
        others = [keep_sampling(self._peer, links, metrics, folder)]
        if self._spec.beside is None:
            policy = policy_of(self._spec.cover_after_seconds)
            others.append(Covering(self._swarm, entry, config.stages, room=self._room, tell=emit, policy=policy).run())
        if shared is not None:
            group = shared.group
            others += [group.run(), shared.custodian.keep(epoch)]
            if entry.stand_in:
                others.append(self._stand_in(entry, config.stages, group))
            if self._spec.stage is None:
                run_folder = folder / config.run_id
                mover = Mover(
                    swarm=self._swarm,
                    presence=presence,
                    group=group,
                    entry=entry,
                    machine=self._require_machine(),
                    folder=run_folder,
                )
                others.append(self._move(mover))
        await self._work(presence, *others)
        if self._moving is not None:
            raise MovedAway(self._moving.reason)

    def _shared(
        self, config: RunConfig, entry: PeerEntry, parts: StageParts, reporter: EventReporter, taken_up: TakenUp
    ) -> Shared | None:
        """What a peer has besides where stages are shared."""
        group = self._group(config, entry, parts, reporter)
        if group is None:
            return None
        run_folder = self._spec.state_folder / config.run_id
        every = common_steps(config)
        watch = EpochWatch(
            self._peer_id,
            taken_up.epoch,
            parts.ledger,
            restored=taken_up.restored,
            unobtainable=taken_up.unobtainable,
        )
        return Shared(
            group,
            watch,
            Custodian(self._swarm, config.run_id, config.stages, run_folder, common_every=every),
            parts.told_checkpoints,
        )

    def _group(
        self, config: RunConfig, entry: PeerEntry, parts: StageParts, reporter: EventReporter
    ) -> ReplicaGroup | None:
        """This peer among the replicas of its stage, where a stage may have several."""
        trainer, host = parts.trainer, self._spec.host
        if not isinstance(trainer, ReplicaTrainer):
            self._launcher.close()  # there will be nothing to average
            return None
        named = epoch_of(entry).named(config.run_id)
        endpoint = entry.endpoints[0]
        announce = endpoint.rpartition(":")[0]
        member = Member(config.run_id, named, entry.stage, self._peer_id, endpoint, entry.reserved_at, entry.throughput)
        means = Means(
            line=lambda endpoint: GrpcLine(endpoint, named, entry.stage),
            averaging=lambda: ReplicaAveraging.start(
                num_values=trainer.num_values,
                listen_host=host,
                announce_host=announce,
                wire=Wire(config.replicas.wire),
                launcher=self._launcher,
            ),
            recorder=StepRecorder.from_environment(entry.stage, self._peer_id),
            on_serving=lambda _: reporter.state_changed.set(),
            on_transfer=reporter.transfer,
        )
        return ReplicaGroup(member, self._require_peer(), trainer, parts.checkpoints, means)

    async def _build(self, config: RunConfig, entry: PeerEntry) -> StageParts:
        """In a thread, while the claim is renewed: weights and text may take longer than a claim lives."""
        async with claiming(self._swarm, entry):
            return await asyncio.to_thread(
                build_stage,
                config,
                entry.stage,
                state_folder=self._spec.state_folder,
                device=self._device,
                activation_budget_bytes=self._spec.activation_budget_bytes,
            )

    async def _work(self, presence: Presence, *others: Coroutine[Any, Any, None]) -> None:
        peer = self._require_peer()
        towards: Epoch | None = None
        try:
            errors = await until_first_ends(peer.run(), presence.keep(), presence.follow(), *others)
            if errors:
                raise errors[0]
        except EpochBegins as error:
            self._tell_rewind(error)
            towards = error.epoch
            run_folder = self._spec.state_folder / presence.run_id
            await asyncio.to_thread(enter_epoch, run_folder, presence.run_id, towards)
            raise
        except RewindNeeded as error:
            peer.go_back(error.to_step)
            raise
        finally:
            await presence.leave(towards)

    def _tell_rewind(self, begins: EpochBegins) -> None:
        """Tells people which steps are void."""
        ledger = self._require_peer().ledger
        redone = max(0, ledger.committed - begins.to_step)
        emit(Rewind(stage=ledger.stage, to_step=begins.to_step, redone=redone, reason=begins.cause))

    async def _move(self, mover: Mover) -> None:
        """Leaves in good order once this peer is needed more elsewhere; `run` raises MovedAway then."""
        self._moving = await mover.wanted()
        log.info("moving: %s", self._moving.reason)
        emit(Moving(stage=self._require_peer().ledger.stage, to_stage=self._moving.target, reason=self._moving.reason))
        self._drain_peer()
        await asyncio.Event().wait()  # until the peer has left

    async def _stand_in(self, entry: PeerEntry, num_stages: int, group: ReplicaGroup) -> None:
        """Leaves in good order, and for good, once somebody else serves the stage."""
        relief = await until_relieved(self._swarm, entry, num_stages, group)
        log.info("relieved by %s", relief)
        emit(Relieved(stage=entry.stage, peer_id=relief))
        self._drain_peer()
        await asyncio.Event().wait()  # until the peer has left

    def _drain_peer(self) -> None:
        """The stage is left, whatever becomes of the node."""
        if self._peer is not None:
            self._peer.drain()
        if self._reporter is not None:
            self._reporter.state_changed.set()  # nobody is to send anything here any more

    def _require_machine(self) -> MachineProfile:
        if self._machine is None:
            raise RuntimeError("the machine is measured before it serves")
        return self._machine

    def _require_peer(self) -> StagePeer:
        if self._peer is None:
            raise RuntimeError("the peer is built before it is served")
        return self._peer

    def _describe(self) -> stage_pb2.DescribeReply:
        peer = self._require_peer()
        return stage_pb2.DescribeReply(
            protocol_version=PROTOCOL_VERSION,
            run_id=self._ticket.run_id,
            stage=peer.identity.stage,
            num_stages=peer.ledger.num_stages,
            peer_id=self._peer_id,
            committed_step=peer.ledger.committed,
            software_version=__version__,
            durable_step=peer.ledger.durable,
        )
