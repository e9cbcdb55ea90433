"""A running system is brought to a point, left to settle, and measured over whole steps."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from node.bench.cpu_account import CpuAccount, sample
from node.bench.cpu_account import between as cpu_between
from node.bench.wan.limits import link_limit
from node.bench.wan.measurement import Cut, Measurement, TransportCost, between, received_per_token
from node.bench.wan.plan import CALM, Effort, Point, System
from node.bench.wan.systems import Running, StepEnd, lab_names
from node.errors import LabFailed

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.lab.namespaces import NamespaceLab

LONG_ENOUGH_SECONDS = 10.0  # one whole step will do where steps are so slow


@dataclass(frozen=True, slots=True)
class Visited:
    """What a visit gave; `transport` where it was measured, on unshaped links."""

    measured: Measurement
    transport: TransportCost | None = None


class Visitor:
    """Takes one running system from point to point."""

    def __init__(self, system: System, config: RunConfig, running: Running, lab: NamespaceLab, effort: Effort) -> None:
        self.system, self.config = system, config
        self._running, self._lab, self._effort = running, lab, effort
        plan = config.plan
        self.microbatches = plan.microbatches_per_step
        self._tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
        self._point = CALM
        self._bytes_per_token: float | None = None  # on the busiest down-link; known from the first point

    async def visit(self, point: Point, times: int = 1, *, patience: float = 1.0) -> Visited:
        """Measures `times` as long as usual, or where a step would take too long, counts bytes for a while.

        `patience`: as a multiple of the usual.
        """
        farther = point.round_trip_ms != self._point.round_trip_ms
        self.reshape(point)
        patience_seconds = patience * self._effort.patience_seconds
        if self._step_seconds(point) > patience_seconds:
            return Visited(await self._crawl(point))
        try:
            async with asyncio.timeout(self._effort.settle_seconds + 3 * patience_seconds):
                await self._settle(farther=farther)
                return await self._measure(point, times)
        except TimeoutError:
            return Visited(await self._crawl(point))

    def reshape(self, point: Point) -> None:
        """The coordinator's link stays as it is: it carries no data."""
        if point == self._point:
            return
        self._point = point
        for name in lab_names(self.config.stages)[1:]:
            self._lab.reshape(name, point.shape)

    def _step_seconds(self, point: Point) -> float:
        """What the links alone ask for."""
        if self._bytes_per_token is None:
            return 0.0
        return self._tokens_per_step / link_limit(point.rate_mbit, self._bytes_per_token)

    async def _settle(self, *, farther: bool) -> None:
        """Until the step into which the change fell is over; after another round trip, until that is known to all."""
        follows = farther and self.system is not System.TORCH  # which has no window to adapt
        until = time.monotonic() + (self._effort.settle_seconds if farther else 0.0)
        steps_left = self._effort.settle_steps if follows else 1
        while steps_left > 0 or time.monotonic() < until:
            await self._running.steps.next()
            steps_left -= 1

    async def _crawl(self, point: Point) -> Measurement:
        """From bytes alone. What is still under way from faster links gets time to arrive.

        Raises LabFailed: not even the first point could be measured, so nobody knows what a token takes.
        """
        if self._bytes_per_token is None:
            raise LabFailed(
                f"{self.system} has not done a step in time",
                remedy="leave the machine to the benchmark, or ask for less: --microbatches, --batch, --preset",
            )
        await asyncio.sleep(self._effort.crawl_seconds / 2)
        before = self._cut_now()
        await asyncio.sleep(self._effort.crawl_seconds)
        return self._between(point, before, self._cut_now(), self._bytes_per_token)

    async def _measure(self, point: Point, times: int) -> Visited:
        workers = self._running.workers()
        cpu_before, before = sample(workers), self._cut(self._running.steps.newest)
        while True:
            after = await self._running.steps.next()
            steps, seconds = after.step - before.steps, after.at - before.at
            enough = steps >= times * self._effort.min_steps and seconds >= times * self._effort.min_seconds
            if enough or seconds >= times * LONG_ENOUGH_SECONDS:
                break
        cut = self._cut(after)
        measured = self._between(point, before, cut)
        if self._bytes_per_token is None:
            self._bytes_per_token = received_per_token(measured)
        if point != CALM or self.system is System.TORCH:
            return Visited(measured)
        return Visited(measured, self._transport(measured, cpu_between(cpu_before, sample(workers)), before, cut))

    def _between(self, point: Point, before: Cut, after: Cut, bytes_per_token: float | None = None) -> Measurement:
        return between(
            self.system,
            point,
            before,
            after,
            tokens_per_step=self._tokens_per_step,
            microbatches=self.microbatches,
            shaping=self._lab.shaping(self._running.names()[0]),
            bytes_per_token=bytes_per_token,
        )

    def _cut_now(self) -> Cut:
        """In the middle of a step."""
        return replace(self._cut(self._running.steps.newest), at=time.monotonic())

    def _cut(self, end: StepEnd) -> Cut:
        counters = [self._lab.counters(name) for name in self._running.names()]
        return Cut(end.at, end.step, end.stages, counters)

    def _transport(self, measured: Measurement, cpu: CpuAccount, before: Cut, after: Cut) -> TransportCost:
        encoding = sum(
            now.work["encode"].cpu_seconds - then.work["encode"].cpu_seconds
            for then, now in zip(before.stages, after.stages, strict=True)
            if "encode" in then.work
        )
        outside_torch = cpu.event_loops + cpu.transport_threads + encoding
        through = sum(stage.tx_bytes + stage.rx_bytes for stage in measured.stages) * 8 / 1e6
        return TransportCost(self.system, outside_torch / cpu.wall_seconds, through / measured.seconds)
