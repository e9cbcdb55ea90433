"""The findings of `bench wan` as tables and as a summary. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from node.bench.common import Table
from node.bench.wan.limits import PAPER_DENSE_RATIO, link_limit
from node.bench.wan.measurement import Measurement, pooled
from node.bench.wan.plan import CALM, LATENCY_MS, REFERENCE_MBIT, Point, System
from node.bench.wan.run import Findings

if TYPE_CHECKING:
    from node.config import RunConfig

NAMES = {System.OURS: "ours", System.DENSE: "ours, dense bf16", System.TORCH: "torch, dense bf16"}
NOTHING = "–"


def summary_of(findings: Findings) -> dict[str, Any]:
    """What the project promises, as numbers; None where it was not measured."""
    dense = at_equivalent(findings, System.DENSE)
    ours = at_equivalent(findings, System.OURS)
    torch = at_equivalent(findings, System.TORCH)
    pair = _latency_pair(findings)
    return {
        "equivalent_mbit": findings.equivalent_mbit,
        "dense_over_unshaped": _ratio(dense, findings.speed(System.DENSE, CALM)),
        "shaped_over_unshaped": pair_ratio(findings),
        "ours_over_dense": _ratio(ours, dense),
        "ours_over_torch": _ratio(ours, torch),
        "latency_100ms_ratio": _inside_steps(findings),
        "core_per_100_mbit": next((c.per_100_mbit for c in findings.transport if c.system is System.DENSE), None),
        "core_per_100_mbit_bytes_alone": cost_of_bytes(findings),
        "latency_100ms_step_ratio": _ratio(pair[1], pair[0]) if pair else None,
    }


def pair_ratio(findings: Findings) -> float | None:
    """Ours at the equivalent bandwidth / ours unshaped, over all pairs together."""
    if not findings.pairs:
        return None
    return _ratio(at_equivalent(findings, System.OURS), _calm(findings, System.OURS))


def at_equivalent(findings: Findings, system: System) -> Measurement | None:
    """Of ours all measurements there together."""
    rate = findings.equivalent_mbit
    if system is System.OURS and findings.pairs:
        return pooled([shaped for _, shaped in findings.pairs])
    return None if rate is None else findings.speed(system, Point(rate))


def _calm(findings: Findings, system: System) -> Measurement | None:
    """What to compare that with: of ours, what was measured in turn with it."""
    if system is System.OURS and findings.pairs:
        return pooled([calm for calm, _ in findings.pairs])
    return findings.speed(system, CALM)


def _ratio(over: Measurement | None, under: Measurement | None) -> float | None:
    return over.tokens_per_second / under.tokens_per_second if over and under else None


def _inside_steps(findings: Findings) -> float | None:
    """Pace inside the longest steps measured, at 100 ms / without delay; None where none has an inside."""
    ratios = (_inside(pair) for pair in reversed(_pairs_by_length(findings)))
    return next((ratio for ratio in ratios if ratio is not None), None)


def _pairs_by_length(findings: Findings) -> list[tuple[Measurement, Measurement]]:
    """Without delay and at 100 ms, for each number of microbatches per step, from few to many."""
    own = _latency_pair(findings)
    whole = [pair for pair in findings.flushes if not any(m.estimated for m in pair)]
    return sorted([*whole, *([own] if own else [])], key=lambda pair: pair[0].microbatches_per_step)


def _inside(pair: tuple[Measurement, Measurement]) -> float | None:
    """Pace inside steps at 100 ms / without delay; None where one of them is never between fill and drain."""
    near, far = (m.steady_tokens_per_second for m in pair)
    return far / near if near and far else None


def _latency_pair(findings: Findings) -> tuple[Measurement, Measurement] | None:
    """Ours at the bandwidth nearest to the paper's, without delay and at 100 ms."""
    pairs = [
        (near, far)
        for far in findings.measurements
        if far.system is System.OURS and far.point.round_trip_ms == LATENCY_MS and not far.point.loss
        if (near := findings.speed(System.OURS, Point(far.point.rate_mbit))) and not near.estimated | far.estimated
    ]
    return min(pairs, key=lambda pair: abs((pair[1].point.rate_mbit or math.inf) - REFERENCE_MBIT), default=None)


def cost_of_bytes(findings: Findings) -> float | None:
    """Cores for 100 Mbit/s: what the dense pipeline takes more than ours does for as many, but small, messages."""
    costs = {cost.system: cost for cost in findings.transport}
    dense, ours = costs.get(System.DENSE), costs.get(System.OURS)
    if dense is None or ours is None or dense.mbit_per_second <= ours.mbit_per_second:
        return None
    return (dense.core_share - ours.core_share) / (dense.mbit_per_second - ours.mbit_per_second) * 100


def tables_of(findings: Findings, config: RunConfig) -> list[Table]:
    tables = [_speed(findings), _links(findings), _bytes(findings), _equivalent(findings, config)]
    tables += [_latency(findings), _transport(findings)]
    return [table for table in tables if table.rows]


def _systems(findings: Findings) -> list[System]:
    present = {m.system for m in findings.measurements}
    return [system for system in NAMES if system in present]


def _points(findings: Findings) -> list[Point]:
    """In the order of the tables: by loss, delay, then from fast to slow."""
    points = {m.point for m in findings.measurements}
    return sorted(points, key=lambda p: (p.loss, p.round_trip_ms, -(p.rate_mbit or float("inf"))))


def _point_cells(point: Point) -> list[str]:
    return [point.rate_text, f"{point.round_trip_ms:g} ms", f"{100 * point.loss:g} %"]


_POINT_COLUMNS = ["up-link, down-link", "round trip", "loss"]


def _speed(findings: Findings) -> Table:
    systems = _systems(findings)
    rows = []
    for point in _points(findings):
        found = {system: findings.speed(system, point) for system in systems}
        cells = [_speed_cell(findings, system, point) for system in systems]
        over = [_over(found.get(System.OURS), found[system]) for system in systems if system is not System.OURS]
        rows.append([*_point_cells(point), *cells, *over])
    columns = [*_POINT_COLUMNS, *(NAMES[system] for system in systems)]
    columns += [f"ours / {NAMES[system]}" for system in systems if system is not System.OURS]
    title = (
        "tokens/s (share of the same system's unshaped speed); ≈: a step takes too long, told from bytes that arrived"
    )
    return Table(title, columns, rows)


def _speed_cell(findings: Findings, system: System, point: Point) -> str:
    m, calm = findings.speed(system, point), findings.speed(system, CALM)
    if m is None or calm is None:
        return NOTHING
    about = "≈ " if m.estimated else ""
    return f"{about}{m.tokens_per_second:,.0f} ({m.tokens_per_second / calm.tokens_per_second:.3f})"


def _over(over: Measurement | None, under: Measurement | None) -> str:
    ratio = _ratio(over, under)
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _links(findings: Findings) -> Table:
    def cell(m: Measurement | None) -> list[str]:
        if m is None:
            return [NOTHING, NOTHING]
        link = NOTHING if m.utilisation is None else f"{100 * m.utilisation:.0f} %"
        return [link, NOTHING if m.estimated else f"{100 * m.efficiency:.0f} %"]

    systems = _systems(findings)
    rows = [
        [*_point_cells(point), *(text for s in systems for text in cell(findings.speed(s, point)))]
        for point in _points(findings)
    ]
    columns = [f"{NAMES[s]}: {what}" for s in systems for what in ("link", "stage")]
    return Table(
        "how busy the busiest direction of a link and the busiest stage are (share of wall time)",
        [*_POINT_COLUMNS, *columns],
        rows,
    )


def _bytes(findings: Findings) -> Table:
    """All systems where links are not limited and at the slowest link that each has finished."""
    rows = []
    for system in _systems(findings):
        calm = findings.speed(system, CALM)
        slow = [m for m in findings.measurements if m.system is system and m.point.rate_mbit and not m.estimated]
        slowest = min(slow, key=lambda m: (m.point.rate_mbit or 0.0, m.point), default=None)
        for m in (calm, slowest):
            if m is not None:
                counted, sent = m.counted_bytes / m.tokens, m.interface_bytes / m.tokens
                busiest = [m.busiest_frame_bytes / m.tokens, m.busiest_bytes / m.tokens]
                cells = [f"{value:,.1f}" for value in (counted, sent, *busiest)]
                rows.append([NAMES[system], str(m.point), *cells, f"{sent / counted:.3f}"])
    columns = ["system", "link", "all peers: ours", "interfaces", "busiest direction: ours", "interfaces"]
    return Table("bytes a token, by our own counters and by the kernel's", [*columns, "interfaces / ours"], rows)


def _equivalent(findings: Findings, config: RunConfig) -> Table:
    rate = findings.equivalent_mbit
    rows = []
    for system in _systems(findings) if rate is not None else []:
        m, calm = at_equivalent(findings, system), _calm(findings, system)
        if m is None or calm is None:
            continue
        carried = calm.busiest_frame_bytes / calm.tokens
        ratio = _ratio(m, calm)
        limit = link_limit(rate, carried)
        ours = at_equivalent(findings, System.OURS)
        rows.append(
            [
                NAMES[system],
                f"{calm.tokens_per_second:,.0f}",
                f"{m.tokens_per_second:,.0f}",
                NOTHING if ratio is None else f"{ratio:.3f}",
                f"{limit:,.0f}",
                _over(ours, m),
            ]
        )
    model, plan = config.model, config.plan
    title = (
        f"the equivalent of the paper's setting: {'' if rate is None else Point(rate).rate_text}, where the dense "
        f"pipeline should keep {PAPER_DENSE_RATIO:.3f} of its speed (H = {model.hidden_size}, {config.stages} stages, "
        f"{plan.microbatches_per_step} microbatches of {plan.batch * plan.tokens} tokens, {config.compute.precision})"
    )
    columns = [
        "system",
        "unshaped, tokens/s",
        "there, tokens/s",
        "ratio",
        "the link carries at most",
        "ours is faster by",
    ]
    return Table(title, columns, rows)


def _latency(findings: Findings) -> Table:
    pairs = _pairs_by_length(findings)
    rows = []
    for near, far in pairs:
        inside, whole = _inside((near, far)), far.tokens_per_second / near.tokens_per_second
        extra = far.step_seconds - near.step_seconds
        rows.append(
            [
                str(near.microbatches_per_step),
                NOTHING if inside is None else f"{inside:.3f}",
                f"{whole:.3f}",
                f"{near.step_seconds:.2f} s",
                f"{far.step_seconds:.2f} s",
                f"{extra:.2f} s",
                f"{100 * extra / far.step_seconds:.1f} %",
            ]
        )
    link = f" at {pairs[0][1].point.rate_text}" if pairs else ""
    columns = ["microbatches a step", "speed inside steps", "whole steps", "a step at 0 ms", "a step at 100 ms"]
    columns += ["longer by", "share of the step"]
    return Table(f"ours at {LATENCY_MS:g} ms a link against 0 ms{link}", columns, rows)


def _transport(findings: Findings) -> Table:
    rows: Sequence[Sequence[str]] = [
        [
            NAMES[cost.system],
            f"{100 * cost.core_share:.1f} %",
            f"{cost.mbit_per_second:,.1f}",
            f"{100 * cost.per_100_mbit:.1f} %",
        ]
        for cost in findings.transport
    ]
    if (of_bytes := cost_of_bytes(findings)) is not None:
        rows = [*rows, ["bytes alone (dense - ours)", NOTHING, NOTHING, f"{100 * of_bytes:.1f} %"]]
    columns = ["system", "of one core, all workers", "Mbit/s sent and received by all", "of one core for 100 Mbit/s"]
    return Table("processor time outside torch: event loops, gRPC's threads, encoding", columns, rows)
