"""The whole benchmark: one lab, each system started once, its links reshaped from point to point while it trains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from node.bench.common import Watcher
from node.bench.wan.limits import is_equivalent, next_rate
from node.bench.wan.measurement import Measurement, TransportCost, told
from node.bench.wan.plan import CALM, Effort, Point, Sweep, System
from node.bench.wan.systems import lab_names, start
from node.bench.wan.visit import Visitor
from node.lab.namespaces import NamespaceLab
from node.lab.shapes import UNSHAPED
from node.processes import become_subreaper
from node.supervisor import stop_on_signals
from node.tasks import first_of

if TYPE_CHECKING:
    from node.config import RunConfig

STEPS = 100_000  # more than any benchmark lasts
CHECKPOINT_EVERY = 20
EQUIVALENT_PATIENCE = 4.0
"""The point that the headline rests on is measured over whole steps, however slow."""
FLUSH_PATIENCE = 2.0
"""Steps are up to four times as long there, and only whole ones tell."""


@dataclass(frozen=True, slots=True)
class Task:
    """All that is to be measured."""

    config: RunConfig  # of ours; the dense pipelines are cut from it
    systems: Sequence[System]
    sweep: Sweep
    effort: Effort
    flush_plans: Sequence[int]  # further microbatches per step, for the cost of the flush
    flush_at: Point | None  # with delay; None: not measured


@dataclass
class Findings:
    """What was measured so far."""

    measurements: list[Measurement] = field(default_factory=list)
    pairs: list[tuple[Measurement, Measurement]] = field(default_factory=list)  # ours: unshaped, equivalent
    flushes: list[tuple[Measurement, Measurement]] = field(default_factory=list)  # ours: without delay, with
    transport: list[TransportCost] = field(default_factory=list)
    equivalent_mbit: float | None = None

    def told(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "equivalent_mbit": self.equivalent_mbit,
            "measurements": [told(m) for m in self.measurements],
            "pairs": [[told(m) for m in pair] for pair in self.pairs],
            "flushes": [[told(m) for m in pair] for pair in self.flushes],
            "transport": [asdict(cost) for cost in self.transport],
        }

    def speed(self, system: System, point: Point) -> Measurement | None:
        """The newest measurement there, with the sweep's own microbatches per step."""
        found = [m for m in self.measurements if m.system is system and m.point == point]
        return found[-1] if found else None

    def ratios(self, system: System) -> dict[float, float]:
        """Share of its unshaped speed that a system keeps, by bandwidth, without delay and loss.

        From whole steps where there are any: bytes alone tell too much, because a link is not full all through a step.
        """
        calm = self.speed(system, CALM)
        found = [m for m in self.measurements if m.system is system and m.point == Point(m.point.rate_mbit)]
        shaped = [m for m in found if m.point.rate_mbit]
        told = [m for m in shaped if not m.estimated] or shaped
        return {
            m.point.rate_mbit: m.tokens_per_second / calm.tokens_per_second for m in told if calm and m.point.rate_mbit
        }


def config_of(system: System, config: RunConfig, microbatches: int | None = None) -> RunConfig:
    """The run that a system trains: for ever, without validation; the dense ones without a bottleneck, in bf16."""
    from node.config import validated

    values = config.model_dump()
    values["plan"] |= {"steps": STEPS, "evaluation_microbatches": 0, "checkpoint_every": CHECKPOINT_EVERY}
    if microbatches is not None:
        values["plan"]["microbatches_per_step"] = microbatches
    if system is not System.OURS:
        values["bottleneck"]["enabled"] = False
        values["codec"] |= {"forward": "bf16", "backward": "bf16"}
    return validated(values, "benchmark")


def run(task: Task, watcher: Watcher) -> Findings:
    """Measures everything. Call it in the main thread; nothing is left behind, however it ends.

    Raises:
        PrivilegeMissing, ToolMissing, KernelLacks, LabFailed: no lab on this machine.
        PeerFailed: a system gave up.
        KeyboardInterrupt: someone asked to stop.
    """
    from node.data import load_corpus

    become_subreaper()
    with NamespaceLab(lab_names(task.config.stages), UNSHAPED) as lab:
        watcher.doing("reading text", 0.0)
        load_corpus(config_of(System.OURS, task.config))  # all processes then find it in the cache
        return asyncio.run(_until_done_or_stopped(_Bench(task, lab, watcher)))


async def _until_done_or_stopped(bench: _Bench) -> Findings:
    stopping = asyncio.Event()
    with stop_on_signals(stopping.set):
        await first_of(bench.measure(), stopping.wait())
    if stopping.is_set():
        raise KeyboardInterrupt
    return bench.findings


class _Bench:
    def __init__(self, task: Task, lab: NamespaceLab, watcher: Watcher) -> None:
        self.findings = Findings()
        self._task, self._lab, self._watcher = task, lab, watcher
        self._visits_done = 0

    async def measure(self) -> None:
        for system in self._task.systems:
            await self._with(system, None, self._sweep)
        if System.OURS in self._task.systems:
            for microbatches in self._task.flush_plans:
                await self._with(System.OURS, microbatches, self._flush)

    async def _with(self, system: System, microbatches: int | None, work: Callable[[Visitor], Awaitable[None]]) -> None:
        """Starts a system, works with it, stops it; then nothing is shaped any more."""
        config = config_of(system, self._task.config, microbatches)
        self._tell(f"{system}: starting")
        async with start(system, config, self._lab) as running:
            visitor = Visitor(system, config, running, self._lab, self._task.effort)
            try:
                await first_of(work(visitor), asyncio.shield(running.failed))
            finally:
                visitor.reshape(CALM)

    # -- parts --------------------------------------------------------------------------------------------------

    async def _sweep(self, visitor: Visitor) -> None:
        for point in self._task.sweep.points:
            await self._visit(visitor, point)
        if visitor.system is System.DENSE:
            await self._find_equivalent(visitor)
        elif self.findings.equivalent_mbit is not None:
            equivalent = Point(self.findings.equivalent_mbit)
            if visitor.system is System.OURS:
                await self._pairs(visitor, equivalent)
            else:
                await self._visit(visitor, equivalent, patience=EQUIVALENT_PATIENCE)

    async def _find_equivalent(self, visitor: Visitor) -> None:
        """Measures where the dense pipeline should keep the paper's share of its speed, until it does."""
        for _ in range(self._task.effort.bisections):
            ratios = self.findings.ratios(visitor.system)
            if not ratios:
                return
            rate = float(f"{next_rate(ratios):.3g}")
            await self._visit(visitor, Point(rate), patience=EQUIVALENT_PATIENCE)
            self.findings.equivalent_mbit = rate
            if is_equivalent(self.findings.ratios(visitor.system).get(rate, 0.0)):
                return

    async def _pairs(self, visitor: Visitor, equivalent: Point) -> None:
        """Takes turns, so that whatever else slows the machine down slows both."""
        for _ in range(self._task.effort.pairs):
            calm = await self._visit(visitor, CALM, times=2)
            self.findings.pairs.append((calm, await self._visit(visitor, equivalent, times=2)))

    async def _flush(self, visitor: Visitor) -> None:
        at = self._task.flush_at
        if at is None:
            return
        near = await self._visit(visitor, Point(at.rate_mbit), times=2, patience=FLUSH_PATIENCE)
        far = await self._visit(visitor, at, times=2, patience=FLUSH_PATIENCE)
        self.findings.flushes.append((near, far))

    async def _visit(self, visitor: Visitor, point: Point, times: int = 1, *, patience: float = 1.0) -> Measurement:
        self._tell(f"{visitor.system}: {point}")
        visited = await visitor.visit(point, times, patience=patience)
        self._visits_done += 1
        findings, measured = self.findings, visited.measured
        if visitor.microbatches == self._task.config.plan.microbatches_per_step:
            findings.measurements.append(measured)
        if visited.transport is not None and all(cost.system is not visitor.system for cost in findings.transport):
            findings.transport.append(visited.transport)
        self._note(measured)
        return measured

    # -- telling ------------------------------------------------------------------------------------------------

    def _tell(self, text: str) -> None:
        task = self._task
        visits = len(task.systems) * (len(task.sweep.points) + 1) + 2 * task.effort.pairs + 2 * len(task.flush_plans)
        self._watcher.doing(text, min(0.99, self._visits_done / visits))

    def _note(self, m: Measurement) -> None:
        about = " (from bytes)" if m.estimated else ""
        self._watcher.note(
            {
                "event": "point",
                "system": m.system.value,
                "microbatches": m.microbatches_per_step,
                "rate_mbit": m.point.rate_mbit,
                "round_trip_ms": m.point.round_trip_ms,
                "loss": m.point.loss,
                "tokens_per_second": m.tokens_per_second,
                "estimated": m.estimated,
                "text": f"{m.system}, {m.point}: {m.tokens_per_second:,.0f} tokens/s{about}",
            }
        )
