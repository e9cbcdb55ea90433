"""Builds a stage from its configuration and from what is on disk. Blocking: weights, checkpoints and text are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coordinator.epochs import told_checkpoints
from node import resident
from node.config import RunConfig, load_toml
from node.data import load_corpus
from node.errors import NodeError
from node.folders import BESIDE
from stage_server.checkpoint import CheckpointStore
from stage_server.diloco_trainer import DilocoTrainer
from stage_server.errors import CheckpointInvalid
from stage_server.grpc_links import GrpcDialer
from stage_server.ids import MicrobatchId
from stage_server.ledger import StageLedger
from stage_server.links import LinkIdentity
from stage_server.peer import StagePeer
from stage_server.plan import Plan
from stage_server.replica_trainer import ReplicaTrainer
from stage_server.reports import Report
from stage_server.trainer import StageTrainer
from stage_server.wire import TokenIds, WireFormat

log = logging.getLogger(__name__)

RUN_FILE = "run.toml"


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a peer is made of, ready to be joined to its neighbours."""

    config: RunConfig
    trainer: StageTrainer
    checkpoints: CheckpointStore
    ledger: StageLedger
    source: Callable[[MicrobatchId], TokenIds] | None
    base_bytes: int  # resident when all was there but the weights

    def told_checkpoints(self) -> tuple[int, ...]:
        """Steps of those that the directory is told of."""
        return told_checkpoints(self.checkpoints.steps(), common_steps(self.config))

    def joined(self, identity: LinkIdentity, report: Callable[[Report], None]) -> StagePeer:
        """The peer over gRPC. Call on the event loop."""
        wire = WireFormat(self.config, self.trainer.profile)
        return StagePeer(
            identity=identity,
            ledger=self.ledger,
            trainer=self.trainer,
            wire=wire,
            checkpoints=self.checkpoints,
            source=self.source,
            dialer=GrpcDialer(wire.max_frame_bytes),
            report=report,
        )


def common_steps(config: RunConfig) -> int:
    """Every so many steps all stages write a checkpoint that is kept for longer."""
    return config.plan.checkpoint_every * config.replicas.common_every


def stage_folder(state_folder: Path, run_id: str, stage: int) -> Path:
    """Where a stage's checkpoints lie."""
    return state_folder / run_id / f"stage-{stage}"


def stage_with_state(state_folder: Path, run_id: str) -> int | None:
    """The stage of this run that this machine holds checkpoints of, the newest if several: it is worth most there."""
    folders = [
        path
        for path in (state_folder / run_id).glob("stage-*")
        if _stage_of(path) is not None and any(path.glob("step-*"))
    ]
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else _stage_of(newest)


def stages_kept_beside(state_folder: Path, run_id: str) -> tuple[int, ...]:
    """Stages of this run that workers beside the first one have left checkpoints of, ascending."""
    steps = state_folder.glob(f"{BESIDE}*/{run_id}/stage-*/step-*")
    return tuple(sorted({stage for step in steps if (stage := _stage_of(step.parent)) is not None}))


def _stage_of(folder: Path) -> int | None:
    number = folder.name.removeprefix("stage-")
    return int(number) if number.isdecimal() else None


def remember_run(state_folder: Path, config: RunConfig, config_toml: str) -> None:
    """Keeps a run's file beside its checkpoints, so that a peer that holds state needs nobody to tell it the run."""
    path = state_folder / config.run_id / RUN_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config_toml)
    except OSError as error:
        log.warning("the run file is not kept: %s", error)


def recall_run(state_folder: Path, run_id: str) -> RunConfig | None:
    """The run file kept by `remember_run`. It vouches for itself: its hash is the run id."""
    try:
        config = load_toml((state_folder / run_id / RUN_FILE).read_text())
    except (OSError, NodeError):
        return None
    return config if config.run_id == run_id else None


def build_stage(
    config: RunConfig, stage: int, *, state_folder: Path, device: str, activation_budget_bytes: int
) -> StageParts:
    """Weights, optimizer and ledger as of the newest checkpoint, or the initial ones.

    Raises:
        CheckpointUnwritable: the state folder cannot be used.
        DataUnreadable: this is the first stage and there is no text.
    """
    run_id = config.run_id
    source = _source(config) if stage == 0 else None
    resident.give_back_freed()  # of the speed measurement and of reading the text
    base_bytes = resident.now_bytes()
    shared = config.replicas.max_replicas is None
    common_every = common_steps(config) if shared else 0
    checkpoints = CheckpointStore(stage_folder(state_folder, run_id, stage), run_id, stage, common_every=common_every)
    trainer = _new_trainer(config)(
        config, run_id, stage, device=device, activation_budget_bytes=activation_budget_bytes
    )
    load_newest(checkpoints, trainer)
    ledger = StageLedger(
        Plan.of(config.plan),
        stage=stage,
        num_stages=config.stages,
        checkpoints=checkpoints.steps(),
        checkpoint_every=config.plan.checkpoint_every,
        shared=shared,
    )
    return StageParts(config, trainer, checkpoints, ledger, source, base_bytes)


def _new_trainer(config: RunConfig) -> Callable[..., StageTrainer]:
    match config.replicas.averaging:
        case "none":
            return StageTrainer
        case "sync":
            return ReplicaTrainer
        case "diloco":
            return partial(DilocoTrainer, diloco=config.replicas.diloco)


def load_newest(checkpoints: CheckpointStore, trainer: StageTrainer) -> None:
    """Loads the newest checkpoint that is whole. Broken ones are discarded: neighbours replay what they held."""
    for step in reversed(checkpoints.steps()):
        try:
            trainer.load_state_tensors(checkpoints.load(step, trainer.device))
            return
        except CheckpointInvalid as error:
            log.warning("the checkpoint of step %d is not used: %s", step, error)
            checkpoints.discard_after(step - 1)


def _source(config: RunConfig) -> Callable[[MicrobatchId], TokenIds]:
    corpus = load_corpus(config, lambda text, share: log.info("data: %s (%.0f %%)", text, 100 * share))
    return corpus.microbatch
