"""Who keeps copies of which stage's checkpoints, for the day when all its peers are gone with their disks. Pure.

The peers of the next stage do (those of the first stage for the last): the two with the oldest claims, so that a change
of others changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.directory import SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import Epoch, epoch_of

COPIES = 2
"""Peers that keep a copy of a stage."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that peers have."""

    stage: int
    step: int
    endpoints: tuple[str, ...]


def stage_in_custody(snapshot: DirectorySnapshot, peer_id: str) -> int | None:
    """The stage that this peer keeps copies of; None: of none."""
    if snapshot.num_stages < 2:
        return None
    for stage, entries in enumerate(snapshot.peers):
        keepers = sorted((e for e in entries if e.state == SERVING), key=lambda e: (e.reserved_at, e.peer_id))[:COPIES]
        if peer_id in [entry.peer_id for entry in keepers]:
            return (stage - 1) % snapshot.num_stages
    return None


def newest_common(snapshot: DirectorySnapshot, epoch: Epoch, stage: int, common_every: int) -> Source | None:
    """The newest checkpoint to copy: of a stage's own peers, at a step at which all stages keep theirs for longer."""
    serving = [e for e in snapshot.at(stage) if e.state == SERVING and epoch_of(e) == epoch]
    steps = {step for entry in serving for step in entry.checkpoints if step and step % common_every == 0}
    if not steps:
        return None
    return _source(stage, max(steps), [entry for entry in serving if max(steps) in entry.checkpoints])


def newest_copy(snapshot: DirectorySnapshot, epoch: Epoch, stage: int) -> Source | None:
    """The newest copy of a stage that others keep."""
    keepers = [e for e in snapshot.all_peers() if e.copied_stage == stage and e.copied_step and epoch_of(e) == epoch]
    newest = max((entry.copied_step for entry in keepers), default=0)
    return _source(stage, newest, [entry for entry in keepers if entry.copied_step == newest]) if newest else None


def newest_to_keep(snapshot: DirectorySnapshot, epoch: Epoch, stage: int, me: str, common_every: int) -> Source | None:
    """What to copy next: from the stage's own peers, unless other keepers have a newer one than they.

    A stage that stands behind may have lost its common checkpoints, so that its copies are all that there is of them:
    they must outlive those who keep them.
    """
    own = newest_common(snapshot, epoch, stage, common_every)
    kept = newest_copy(snapshot.where(lambda entry: entry.peer_id != me), epoch, stage)
    return kept if own is None or (kept is not None and kept.step > own.step) else own


def _source(stage: int, step: int, entries: Sequence[PeerEntry]) -> Source:
    return Source(stage, step, tuple(entry.endpoints[0] for entry in entries))
