"""From what stages say to what a run did: steps in order, exactly once, and totals by stage. Pure.

A restarted worker repeats steps since its last checkpoint. They are the same steps with the same loss (training is
exact), so the first report of a stage about a step counts and later ones do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from node.events import StageStep, Step, WorkTime


@dataclass(frozen=True, slots=True)
class StageTotals:
    """What one stage did, in the steps that counted."""

    microbatches: int = 0
    seconds: float = 0.0
    steady_seconds: float = 0.0
    steady_microbatches: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    dense_bytes: int = 0
    wire_bytes_forward: int = 0
    wire_bytes_backward: int = 0
    work: Mapping[str, WorkTime] = field(default_factory=dict)  # by kind of work

    def plus(self, step: StageStep) -> StageTotals:
        link = step.link
        return replace(
            self,
            microbatches=self.microbatches + step.microbatches,
            seconds=self.seconds + step.seconds,
            steady_seconds=self.steady_seconds + step.steady_seconds,
            steady_microbatches=self.steady_microbatches + step.steady_microbatches,
            compute_seconds=self.compute_seconds + step.compute_seconds,
            wait_seconds=self.wait_seconds + step.wait_seconds,
            dense_bytes=self.dense_bytes + (link.dense_bytes if link else 0),
            wire_bytes_forward=self.wire_bytes_forward + (link.wire_bytes_forward if link else 0),
            wire_bytes_backward=self.wire_bytes_backward + (link.wire_bytes_backward if link else 0),
            work=_sum(self.work, step.work),
        )

    @property
    def wire_bytes(self) -> int:
        return self.wire_bytes_forward + self.wire_bytes_backward


def _sum(one: Mapping[str, WorkTime], other: Mapping[str, WorkTime]) -> dict[str, WorkTime]:
    """Times by kind of work, of both together."""
    none = WorkTime(seconds=0.0, cpu_seconds=0.0)
    pairs = {kind: (one.get(kind, none), other.get(kind, none)) for kind in one.keys() | other.keys()}
    return {
        kind: WorkTime(seconds=a.seconds + b.seconds, cpu_seconds=a.cpu_seconds + b.cpu_seconds)
        for kind, (a, b) in pairs.items()
    }


class StepAggregator:
    """Makes one `Step` of the reports of all stages about it. Times are seconds of one monotonic clock."""

    def __init__(self, num_stages: int) -> None:
        self.stages = [StageTotals() for _ in range(num_stages)]
        self.seconds = 0.0
        self.tokens = 0
        self._next = 1
        self._cut: float | None = None
        self._reports: dict[int, dict[int, StageStep]] = {}

    @property
    def num_steps(self) -> int:
        """Steps that are complete."""
        return self._next - 1

    @property
    def dense_bytes(self) -> int:
        return sum(totals.dense_bytes for totals in self.stages)

    @property
    def wire_bytes(self) -> int:
        return sum(totals.wire_bytes for totals in self.stages)

    @property
    def wire_compression(self) -> float | None:
        """Dense bytes / wire bytes over all links; None when nothing crossed."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def cut(self, now: float) -> None:
        """The time until now belongs to no step: nobody trained yet, or validation ran."""
        self._cut = now

    def add(self, report: StageStep, now: float) -> list[Step]:
        """The steps that this report completes, in order. One that is known already changes nothing."""
        reports = self._reports.setdefault(report.step, {}) if report.step >= self._next else {}
        if report.step < self._next or report.stage in reports or not 0 <= report.stage < len(self.stages):
            return []
        reports[report.stage] = report
        self.stages[report.stage] = self.stages[report.stage].plus(report)
        complete = []
        while len(self._reports.get(self._next, {})) == len(self.stages):
            complete.append(self._complete(self._reports.pop(self._next), now))
            self._next += 1
        return complete

    def _complete(self, reports: dict[int, StageStep], now: float) -> Step:
        last = reports[len(self.stages) - 1]
        seconds = now - self._cut if self._cut is not None else last.seconds
        if last.loss is None:
            raise ValueError(f"the last stage told no loss of step {last.step}")
        self._cut = now
        self.tokens += last.tokens
        self.seconds += seconds
        links = [report.link for report in reports.values() if report.link]
        return Step(
            step=self._next,
            loss=last.loss,
            tokens=self.tokens,
            seconds=seconds,
            dense_bytes=sum(link.dense_bytes for link in links),
            wire_bytes=sum(link.wire_bytes for link in links),
        )
