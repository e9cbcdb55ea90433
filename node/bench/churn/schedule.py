"""What goes wrong when, and to whom. Pure: a seed decides."""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Blow(StrEnum):
    """What happens to a machine. After each a new machine joins."""

    KILL = "kill"  # SIGKILL to all of the peer's processes; it never comes back
    STOP = "stop"  # SIGSTOP for a while: a machine that sleeps
    CUT = "cut"  # its network is gone for a while


@dataclass(frozen=True, slots=True)
class ChurnPlan:
    """One run of the benchmark."""

    peers: int
    quiet_seconds: float  # before the first blow: the undisturbed speed
    churn_seconds: float
    every_seconds: float  # between two blows
    stop_seconds: float  # for how long a peer sleeps, or has no network
    blows: Sequence[Blow] = tuple(Blow)
    seed: int = 0
    num_spared: int = 0
    """Peers, the first ones, to whom nothing happens: what long life does to a peer is seen in them."""

    @property
    def num_joins(self) -> int:
        """Peers that there ever are."""
        return self.peers + self.num_blows

    @property
    def num_blows(self) -> int:
        return max(0, round(self.churn_seconds / self.every_seconds))


def choose_victim(
    serving: Mapping[str, int], chance: random.Random, spared: Container[str] = frozenset()
) -> str | None:
    """Who is hit next: anybody who serves a stage that someone else serves too.

    The last up-to-date peer of a stage is never hit: it is the only place where the stage's newest state is.

    Args:
        serving: stage by name of each peer that serves now.
        chance: decides.
        spared: names of peers to whom nothing happens.
    """
    stages = list(serving.values())
    candidates = sorted(name for name, at in serving.items() if stages.count(at) > 1 and name not in spared)
    return chance.choice(candidates) if candidates else None
