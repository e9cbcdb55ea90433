"""When a run goes back to an older step, and to which one. Pure.

A stage whose peers are all gone is restored: by one of them that comes back with what it has on disk, or from a copy
that peers of the next stage keep (`coordinator/custody.py`). The others have gone on meanwhile. What they retain often
lets the restored stage catch up; where it does not, the whole run goes back to the newest step that every stage has a
checkpoint of, and does the steps after it again. That is a new *epoch*: peers of different epochs do not speak with
each other, so that nothing of the steps that are void finds its way into those that are done again.

Nobody decides for all. A peer whose stage cannot go on goes back by itself and says so in its directory record; who
reads it follows, if the record is founded: if nobody serves that stage any further.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from coordinator.directory import COMPLETE, DRAINING, MAX_CHECKPOINTS, SERVING, DirectorySnapshot, PeerEntry


@dataclass(frozen=True, slots=True)
class Epoch:
    """What lies between two times that the run goes back."""

    number: int = 0
    step: int = 0
    """Where it went back to."""

    @property
    def rank(self) -> tuple[int, int]:
        """Of two that begin at once, the one that goes back further counts as the later one."""
        return self.number, -self.step

    def supersedes(self, other: Epoch) -> bool:
        """Whether peers of the other epoch should follow."""
        return self.rank > other.rank

    def named(self, run_id: str) -> str:
        """The run in this epoch, as peers name it to each other."""
        return f"{run_id}/{self.number}.{self.step}" if self.number else run_id


FIRST = Epoch()


def epoch_of(entry: PeerEntry) -> Epoch:
    """The epoch that a peer lives in."""
    return Epoch(entry.epoch, entry.epoch_step)


def newest_epoch(snapshot: DirectorySnapshot, own: Epoch) -> Epoch:
    """The epoch that a peer belongs into that knows of `own`."""
    newest = own
    for epoch in map(epoch_of, snapshot.all_peers()):
        if epoch.supersedes(newest) and _is_founded(epoch, snapshot):
            newest = epoch
    return newest


def _is_founded(epoch: Epoch, snapshot: DirectorySnapshot) -> bool:
    """Some stage is in it that nobody of an earlier epoch serves beyond its step, or has finished."""
    return any(
        any(epoch_of(entry) == epoch for entry in entries)
        and not any(
            epoch.supersedes(epoch_of(entry)) and _serves(entry) and entry.committed_step > epoch.step
            for entry in entries
        )
        for entries in snapshot.peers
    )


def epoch_of_fellows(snapshot: DirectorySnapshot, own: Epoch, stage: int) -> Epoch | None:
    """The newest epoch that a peer of this stage has begun, founded or not; None: none that supersedes `own`."""
    begun = [epoch for epoch in map(epoch_of, snapshot.at(stage)) if epoch.supersedes(own)]
    return max(begun, key=lambda epoch: epoch.rank, default=None)


def next_epoch(snapshot: DirectorySnapshot, own: Epoch) -> Epoch | None:
    """Where the run could go back to; None while a stage has nobody who says what it holds."""
    for entries in snapshot.peers:
        if not any(_serves(entry) and epoch_of(entry) == own for entry in entries):
            return None
    return Epoch(own.number + 1, fallback_step(snapshot, own))


def fallback_step(snapshot: DirectorySnapshot, own: Epoch) -> int:
    """The newest step that every stage has: a peer of its own a checkpoint, or another one a copy. 0: the beginning."""
    common: set[int] | None = None
    for stage, entries in enumerate(snapshot.peers):
        serving = [entry for entry in entries if _serves(entry) and epoch_of(entry) == own]
        copies = {e.copied_step for e in snapshot.all_peers() if e.copied_stage == stage and epoch_of(e) == own}
        # anybody can make the initial weights
        held = {0} | copies | {step for entry in serving for step in entry.checkpoints}
        common = held if common is None else common & held
    return max(common or {0})


def is_left_behind(snapshot: DirectorySnapshot, own: Epoch, stage: int, committed: int) -> bool:
    """Whether other stages have committed more than this peer's, and no replica of it has."""
    ahead = {
        entry.stage
        for entry in snapshot.all_peers()
        if _serves(entry) and epoch_of(entry) == own and entry.committed_step > committed
    }
    return bool(ahead) and stage not in ahead


def told_checkpoints(steps: Iterable[int], common_every: int) -> tuple[int, ...]:
    """The checkpoints that a directory record names: the common ones and the newest."""
    ascending = sorted(steps)
    common = [step for step in ascending if step % common_every == 0][-MAX_CHECKPOINTS // 2 :]
    newest = [step for step in ascending if step not in common][-MAX_CHECKPOINTS // 2 :]
    return tuple(sorted((*common, *newest)))


def _serves(entry: PeerEntry) -> bool:
    return entry.state in (SERVING, DRAINING, COMPLETE)


class Stall:
    """Notices that nothing goes on although others have: how long has it been since anything changed?"""

    def __init__(self) -> None:
        self._seen: Hashable = None
        self._since: float | None = None

    def lasts(self, now: float, progress: Hashable, *, left_behind: bool) -> float | None:
        """For how many seconds; None: others wait too. `now`: monotonic; `progress`: changes with any progress."""
        if not left_behind or progress != self._seen or self._since is None:
            self._since = now if left_behind else None
            self._seen = progress
        return None if self._since is None else now - self._since
