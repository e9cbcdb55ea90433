"""One system at one point: from two cuts through a run to rates and shares. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from node.bench.wan.plan import Point, System
from node.lab.shapes import InterfaceCounters
from node.progress import StageTotals


@dataclass(frozen=True, slots=True)
class Cut:
    """Everything that grows, at the end of one step."""

    at: float  # monotonic seconds
    steps: int
    stages: Sequence[StageTotals]
    interfaces: Sequence[InterfaceCounters]  # by stage


@dataclass(frozen=True, slots=True)
class StageLoad:
    """One stage between two cuts."""

    compute_seconds: float
    tx_bytes: int  # by its interface
    rx_bytes: int
    up_bytes: int  # by our counters: frames to both neighbours
    down_bytes: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one system did at one point, over whole steps.

    Where a step takes longer than anybody waits, no step ends: `tokens` then follows from the bytes that arrived and
    from what a token takes where links are not limited, `estimated` is true and what only steps tell is 0.
    """

    system: System
    point: Point
    microbatches_per_step: int
    steps: int
    seconds: float
    tokens: float
    steady_seconds: float  # of the first stage: with the pipeline full, neither filling nor draining
    steady_microbatches: int  # done meanwhile; 0 where all of a step was in flight at once
    stages: Sequence[StageLoad]
    shaping: str  # mechanism at work
    estimated: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def steady_tokens_per_second(self) -> float | None:
        """Inside steps, between the fill and the drain; None where there is nothing in between."""
        if not self.steady_microbatches:
            return None
        tokens_per_microbatch = self.tokens / (self.steps * self.microbatches_per_step)
        return tokens_per_microbatch * self.steady_microbatches / self.steady_seconds

    @property
    def step_seconds(self) -> float:
        """Of one step, on average."""
        return self.seconds / self.steps

    @property
    def efficiency(self) -> float:
        """Compute time of the busiest stage / wall time."""
        return max(stage.compute_seconds for stage in self.stages) / self.seconds

    @property
    def busiest_bytes(self) -> int:
        """By the interface counters, in the busier direction of the busiest peer."""
        return max(max(stage.tx_bytes, stage.rx_bytes) for stage in self.stages)

    @property
    def busiest_frame_bytes(self) -> int:
        """The same by our own counters."""
        return max(max(stage.up_bytes, stage.down_bytes) for stage in self.stages)

    @property
    def utilisation(self) -> float | None:
        """Of the busiest direction of a link; None where it is not limited."""
        rate = self.point.rate_mbit
        return None if rate is None else self.busiest_bytes / self.seconds / (rate * 1e6 / 8)

    @property
    def counted_bytes(self) -> int:
        """What all peers sent, by our own counters."""
        return sum(stage.up_bytes for stage in self.stages)

    @property
    def interface_bytes(self) -> int:
        """What all peers sent, by the interface counters: with TCP, IP, Ethernet, acknowledgements, the directory."""
        return sum(stage.tx_bytes for stage in self.stages)


def told(measured: Measurement) -> dict[str, Any]:
    """For the result file: what was measured and what follows from it. None where an estimate cannot tell."""
    whole = not measured.estimated
    return {
        **asdict(measured),
        "tokens_per_second": measured.tokens_per_second,
        "steady_tokens_per_second": measured.steady_tokens_per_second if whole else None,
        "step_seconds": measured.step_seconds if whole else None,
        "efficiency": measured.efficiency if whole else None,
        "utilisation": measured.utilisation,
        "counted_bytes": measured.counted_bytes if whole else None,
        "interface_bytes": measured.interface_bytes,
    }


@dataclass(frozen=True, slots=True)
class TransportCost:
    """Processor time outside torch, of all workers together, unshaped."""

    system: System
    core_share: float  # event loops and transport threads, encoding and decoding; cores
    mbit_per_second: float  # sent and received by all peers

    @property
    def per_100_mbit(self) -> float:
        """Cores for 100 Mbit/s through one peer, in either direction."""
        return self.core_share / self.mbit_per_second * 100


def between(
    system: System,
    point: Point,
    before: Cut,
    after: Cut,
    *,
    tokens_per_step: int,
    microbatches: int,
    shaping: str,
    bytes_per_token: float | None = None,
) -> Measurement:
    """What happened from one cut to the other.

    `bytes_per_token`: as `received_per_token` tells it, for an estimate. Raises ValueError when no step lies between
    the cuts and it is not given.
    """
    steps = after.steps - before.steps
    if steps < 1 and bytes_per_token is None:
        raise ValueError("no whole step lies between the two cuts")
    stages = [_difference(a, b) for a, b in zip(after.stages, before.stages, strict=True)]
    interfaces = [b.since(a) for a, b in zip(before.interfaces, after.interfaces, strict=True)]
    received = max(interface.rx_bytes for interface in interfaces)
    return Measurement(
        system,
        point,
        microbatches,
        steps,
        after.at - before.at,
        steps * tokens_per_step if bytes_per_token is None else received / bytes_per_token,
        stages[0].steady_seconds,
        stages[0].steady_microbatches,
        [
            StageLoad(stage.compute_seconds, interface.tx_bytes, interface.rx_bytes, up_bytes, down_bytes)
            for stage, interface, (up_bytes, down_bytes) in zip(stages, interfaces, _frame_bytes(stages), strict=True)
        ],
        shaping,
        estimated=bytes_per_token is not None,
    )


def pooled(measurements: Sequence[Measurement]) -> Measurement:
    """Several of one system at one point as one, as if they had followed each other. Raises ValueError of none."""
    if not measurements:
        raise ValueError("there is nothing to pool")
    return replace(
        measurements[0],
        steps=sum(m.steps for m in measurements),
        seconds=sum(m.seconds for m in measurements),
        tokens=sum(m.tokens for m in measurements),
        steady_seconds=sum(m.steady_seconds for m in measurements),
        steady_microbatches=sum(m.steady_microbatches for m in measurements),
        stages=[_sum_of(loads) for loads in zip(*(m.stages for m in measurements), strict=True)],
    )


def _sum_of(loads: Sequence[StageLoad]) -> StageLoad:
    return StageLoad(*(sum(values) for values in zip(*map(astuple, loads), strict=True)))


def received_per_token(measured: Measurement) -> float:
    """Bytes on the busiest down-link, by the interface counters."""
    return max(stage.rx_bytes for stage in measured.stages) / measured.tokens


def _difference(after: StageTotals, before: StageTotals) -> StageTotals:
    return StageTotals(
        microbatches=after.microbatches - before.microbatches,
        seconds=after.seconds - before.seconds,
        steady_seconds=after.steady_seconds - before.steady_seconds,
        steady_microbatches=after.steady_microbatches - before.steady_microbatches,
        compute_seconds=after.compute_seconds - before.compute_seconds,
        wire_bytes_forward=after.wire_bytes_forward - before.wire_bytes_forward,
        wire_bytes_backward=after.wire_bytes_backward - before.wire_bytes_backward,
    )


def _frame_bytes(stages: Sequence[StageTotals]) -> list[tuple[int, int]]:
    """(sent, received) by each stage; a stage's totals are those of its link to the next one."""
    nothing = StageTotals()
    pairs = zip([nothing, *stages[:-1]], stages, strict=True)
    return [
        (upper.wire_bytes_backward + lower.wire_bytes_forward, upper.wire_bytes_forward + lower.wire_bytes_backward)
        for upper, lower in pairs
    ]
