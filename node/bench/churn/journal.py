"""What happened in a churned run, from what its peers told. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from node.bench.churn.schedule import Blow

LEVEL = 2
"""Steps by which the newest told of a peer may be behind its stage's."""


@dataclass(frozen=True, slots=True)
class Struck:
    """One blow."""

    at: float  # monotonic seconds
    blow: Blow
    peer: str
    stage: int
    num_running: int
    """Peers on this machine then: those that serve, those that still join, those that sleep or have yet to leave."""


@dataclass(slots=True)
class Journal:
    """Times are seconds of one monotonic clock."""

    num_stages: int
    struck: list[Struck] = field(default_factory=list)
    joined: dict[str, float] = field(default_factory=dict)  # by peer: when it was started
    first_commit: dict[str, float] = field(default_factory=dict)  # by peer: its first step
    newest: dict[str, int] = field(default_factory=dict)  # by peer: its newest step
    stage_steps: list[dict[int, float]] = field(default_factory=list)  # by stage: when a step was first committed
    losses: dict[int, set[float]] = field(default_factory=dict)  # by step, as any peer told it
    evaluations: dict[int, float] = field(default_factory=dict)  # by committed step
    restarts: int = 0

    def __post_init__(self) -> None:
        self.stage_steps = [{} for _ in range(self.num_stages)]

    def committed(self, peer: str, stage: int, step: int, loss: float | None, at: float) -> None:
        """A peer has told of a commit."""
        self.stage_steps[stage].setdefault(step, at)
        self.first_commit.setdefault(peer, at)
        self.newest[peer] = step
        if loss is not None:
            self.losses.setdefault(step, set()).add(loss)

    def is_level(self, peer: str, stage: int) -> bool:
        """Whether a peer holds its stage's newest weights, or those of a step or two before: it is on its way."""
        return self.newest.get(peer, -1) >= max(self.stage_steps[stage], default=0) - LEVEL

    def swarm_step_times(self) -> dict[int, float]:
        """When the last stage to commit a step first did; only steps that all stages have committed."""
        first, *others = self.stage_steps
        common = set(first).intersection(*others)
        return {step: max(times[step] for times in self.stage_steps) for step in sorted(common)}

    def steps_per_second(self, start: float, end: float) -> float:
        """Over a stretch of time."""
        inside = [at for at in self.swarm_step_times().values() if start <= at < end]
        return len(inside) / (end - start) if end > start else 0.0

    def longest_step(self, start: float, end: float) -> float | None:
        """Most seconds between two steps of a stretch of time."""
        inside = sorted(at for at in self.swarm_step_times().values() if start <= at < end)
        return max((later - at for at, later in itertools.pairwise(inside)), default=None)

    def recoveries(self) -> list[float]:
        """For each blow, seconds until the whole swarm had committed two steps more: one of them began after it."""
        times = self.swarm_step_times()
        waits = []
        for struck in self.struck:
            after = [at for at in times.values() if at > struck.at]
            if len(after) >= 2:
                # the first commit after a blow may have been decided before it; the second has not
                waits.append(after[1] - struck.at)
        return waits

    def join_times(self) -> list[float]:
        """Of peers that joined a running swarm: seconds from their start to their first commit."""
        return [self.first_commit[peer] - at for peer, at in sorted(self.joined.items()) if peer in self.first_commit]


@dataclass(frozen=True, slots=True)
class Counted:
    """Every commit's microbatches, counted."""

    commits: int  # different (stage, step) whose shares are known
    lost: int
    duplicated: int
    disagreements: int  # (stage, step) that were committed with different sums


def count_microbatches(
    commits: Iterable[tuple[int, int, str, Sequence[Sequence[int]]]], sizes: Sequence[int]
) -> Counted:
    """Adds up what went into each sum.

    Args:
        commits: (stage, step, lineage, shares) of every commit of every replica; shares may be unknown (empty).
        sizes: microbatches of each step, evaluations included, from step 0 (unused) on.
    """
    shares: dict[tuple[int, int, str], Sequence[Sequence[int]]] = {}
    lineages: dict[tuple[int, int], set[str]] = {}
    for stage, step, lineage, given in commits:
        lineages.setdefault((stage, step), set()).add(lineage)
        if given:
            shares[stage, step, lineage] = given
    lost = duplicated = 0
    for (_, step, _), given in shares.items():
        held = Counter(index for share in given for index in share)
        lost += sum(held[index] == 0 for index in range(sizes[step]))
        duplicated += sum(number - 1 for number in held.values() if number > 1)
    return Counted(len(shares), lost, duplicated, sum(len(different) > 1 for different in lineages.values()))


def percentile(values: Sequence[float], share: float) -> float | None:
    """None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[min(98, max(0, round(share * 100) - 1))]
