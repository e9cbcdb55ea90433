"""What one look at the directory says of the whole swarm. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.directory import COMPLETE, RESERVED, SERVING, DirectorySnapshot, PeerEntry


@dataclass(frozen=True, slots=True)
class SwarmView:
    """The swarm by stage. Throughput is what peers measured of themselves when they joined, in microbatches/s."""

    replicas: tuple[int, ...]
    """By stage: peers that serve it. One that still loads its weights does not yet."""
    stage_throughput: tuple[float, ...]
    """By stage: the sum over its replicas."""
    step: int
    """The newest step that every stage has committed; 0 while a stage is unserved."""
    loss: float | None
    """Of the newest step that any peer tells of, nats per token."""
    tokens_per_second: float
    """Of the slowest stage. All stages train the same tokens, so they differ only by when they were asked."""
    wire_compression: float
    """Mean over all links that tell; 0: none does."""

    @classmethod
    def of(cls, snapshot: DirectorySnapshot) -> SwarmView:
        """Reads one look at the directory."""
        stages = [[e for e in entries if e.state in (SERVING, COMPLETE)] for entries in snapshot.peers]
        told = [entry for entries in stages for entry in entries]
        covered = bool(stages) and all(stages)
        compressions = [entry.wire_compression for entry in told if entry.wire_compression]
        return cls(
            replicas=tuple(map(len, stages)),
            stage_throughput=tuple(sum(entry.throughput for entry in entries) for entries in stages),
            step=min((max(e.committed_step for e in entries) for entries in stages), default=0) if covered else 0,
            loss=_newest_loss(told),
            tokens_per_second=min((e.tokens_per_second for e in told if e.tokens_per_second), default=0.0),
            wire_compression=sum(compressions) / len(compressions) if compressions else 0.0,
        )

    @property
    def bottleneck(self) -> float:
        """Microbatches per second of the weakest stage, 0 while one is unserved: the swarm cannot be faster."""
        return min(self.stage_throughput, default=0.0)

    @property
    def bottleneck_stage(self) -> int | None:
        """The weakest stage."""
        stages = range(len(self.stage_throughput))
        return min(stages, key=lambda stage: self.stage_throughput[stage], default=None)


def unserved(snapshot: DirectorySnapshot) -> tuple[int, ...]:
    """Stages that nobody serves: the run stands still until somebody does."""
    return tuple(stage for stage, replicas in enumerate(SwarmView.of(snapshot).replicas) if replicas == 0)


def pause(snapshot: DirectorySnapshot) -> str:
    """Why the run stands still, in words for people; empty when every stage is served."""
    empty = unserved(snapshot)
    loading = [stage for stage in empty if any(entry.state == RESERVED for entry in snapshot.at(stage))]
    nobody = [stage for stage in empty if stage not in loading]
    if nobody:
        return f"paused: nobody serves {_stages(nobody)}; it resumes by itself when somebody joins"
    if loading:
        return f"paused: {_stages(loading)} {'has' if len(loading) == 1 else 'have'} a peer that does not serve yet"
    return ""


def _stages(numbers: Sequence[int]) -> str:
    """'stage 2', 'stages 0 and 2', 'stages 0, 1 and 2'."""
    *most, last = map(str, numbers)
    return f"stages {', '.join(most)} and {last}" if most else f"stage {last}"


def contribution(snapshot: DirectorySnapshot, peer_id: str) -> float:
    """The peer's share of its stage's throughput, 0 to 1; 0 while the directory does not show it serving."""
    own = snapshot.find(peer_id)
    if own is None or own.state not in (SERVING, COMPLETE):
        return 0.0
    total = SwarmView.of(snapshot).stage_throughput[own.stage]
    return own.throughput / total if total else 0.0


def _newest_loss(entries: Iterable[PeerEntry]) -> float | None:
    known = [(entry.committed_step, entry.loss) for entry in entries if entry.loss is not None]
    return max(known)[1] if known else None
