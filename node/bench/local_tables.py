"""The figures of `bench local` as tables: speed, where processor and wall time go, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from node.bench.common import Spread, Table
from node.bench.local import CaseResult
from node.bench.swarm_run import StageShare, SwarmRun
from node.events import MemoryUse

MEMORY_FACTOR = 1.25
WORKING_ROOM_BYTES = 128 << 20
"""What a worker takes beside its libraries and what its trainer accounts for: pieces that the C library cannot use
again, results of the microbatch at hand, a checkpoint's shard on its way to disk, the transport's buffers."""
_COMPUTE = ("forward", "backward")
_QUANTISE = ("pack", "unpack")
_DEVICE_WORK = ("data", "forward", "backward", "pack", "unpack", "encode", "optimizer", "checkpoint")


def summary_of(results: Sequence[CaseResult]) -> dict[str, Any]:
    """`ratio` is that of the first case; each case has its own key beside it."""
    ratios = {f"ratio_{r.case.preset}_{r.case.stages}": r.ratio for r in results}
    first = next(iter(ratios.values()))
    return {
        "ratio": first.median,
        "ratio_low": first.low,
        "ratio_high": first.high,
        **{name: spread.median for name, spread in ratios.items()},
        "memory_over_bound": max(
            memory.peak_bytes / bound_bytes(memory) for r in results for run in r.swarm for memory in run.memory
        ),
        "foreign_share": max(result.foreign_share for result in results),
    }


def tables_of(results: Sequence[CaseResult]) -> list[Table]:
    return [_speed(results), _processor(results), *map(_stages, results), _memory(results)]


def _name(result: CaseResult) -> str:
    return f"{result.case.preset}, S={result.case.stages}"


def _speed(results: Sequence[CaseResult]) -> Table:
    rows = []
    for r in results:
        swarm = Spread.of([pair.swarm.tokens_per_second for pair in r.pairs])
        alone = Spread.of([pair.reference.tokens_per_second for pair in r.pairs])
        rows.append(
            [
                _name(r),
                str(r.hidden_size),
                swarm.text(0),
                f"{alone.text(0)} with {r.reference_threads} threads",
                r.ratio.text(3),
                f"{100 * r.foreign_share:.1f} %",
            ]
        )
    columns = ["run", "H", "swarm, tokens/s", "reference, tokens/s", "swarm / reference", "taken by other programs"]
    return Table("speed: median (lowest to highest)", columns, rows)


def _processor(results: Sequence[CaseResult]) -> Table:
    """Processor seconds of all processes together, as shares of cores x wall time."""

    def shares(run: SwarmRun) -> list[float]:
        cpu, whole = run.cpu, run.cpu.cores * run.cpu.wall_seconds
        work = {kind: sum(stage.work[kind].cpu_seconds for stage in run.stages if kind in stage.work) for kind in _ALL}
        device_rest = cpu.device_threads - sum(work[kind] for kind in _DEVICE_WORK)
        parts = [
            sum(work[kind] for kind in _COMPUTE),
            work["optimizer"],
            sum(work[kind] for kind in _QUANTISE),
            work["encode"] + work["decode"],
            work["checkpoint"],
            device_rest + work["data"],
            cpu.event_loops - work["decode"],
            cpu.transport_threads,
            cpu.directory,
            cpu.others_of_ours,
            cpu.foreign,
            cpu.idle,
        ]
        return [part / whole for part in parts]

    names = ["forward and backward", "optimizer", "quantise (pack, unpack)", "serialise (encode, decode)"]
    names += ["checkpoint", "device thread, rest", "event loop: ledger, links, gRPC's Python half"]
    names += ["gRPC's own threads", "directory (DHT)", "supervisors, coordinator, benchmark", "other programs", "idle"]
    columns = [_medians(map(shares, r.swarm)) for r in results]
    rows = [[name, *(f"{100 * column[i]:.2f} %" for column in columns)] for i, name in enumerate(names)]
    return Table("where the swarm's processor time goes (share of all cores)", ["", *map(_name, results)], rows)


_ALL = (*_DEVICE_WORK, "decode")


def _medians(columns: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*columns, strict=True)]


def _stages(result: CaseResult) -> Table:
    """Wall time of each stage, as shares of the step."""

    def wall(*kinds: str) -> Callable[[StageShare], float]:
        return lambda s: sum(s.work[kind].seconds for kind in kinds if kind in s.work)

    parts: dict[str, Callable[[StageShare], float]] = {
        "forward, backward": wall(*_COMPUTE),
        "optimizer": wall("optimizer"),
        "quantise": wall(*_QUANTISE),
        "encode": wall("encode"),
        "decode (event loop)": wall("decode"),
        "checkpoint": wall("checkpoint"),
        "hand-over": lambda s: s.compute_seconds - wall(*_DEVICE_WORK)(s),
        "waiting": lambda s: s.wait_seconds,
        "other": lambda s: s.seconds - s.compute_seconds - s.wait_seconds,
    }
    rows = []
    for stage in range(result.case.stages):
        runs = [run.stages[stage] for run in result.swarm]
        shares = [statistics.median(part(s) / s.seconds for s in runs) for part in parts.values()]
        rows.append([str(stage), *(f"{100 * share:.1f} %" for share in shares)])
    return Table(f"{_name(result)}: wall time of each stage", ["stage", *parts], rows)


def accounted_bytes(memory: MemoryUse) -> int:
    """Parameters, gradients, optimizer state and activations in flight."""
    return memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes + memory.activations_bytes


def bound_bytes(memory: MemoryUse) -> float:
    return MEMORY_FACTOR * accounted_bytes(memory) + memory.base_bytes + WORKING_ROOM_BYTES


def _memory(results: Sequence[CaseResult]) -> Table:
    rows = []
    for r in results:
        for stage in range(r.case.stages):
            runs = [run.memory[stage] for run in r.swarm]
            most = max(runs, key=lambda memory: memory.peak_bytes / bound_bytes(memory))
            parts = [most.parameters_bytes, most.gradients_bytes, most.optimizer_bytes, most.activations_bytes]
            figures = [*parts, accounted_bytes(most), most.base_bytes, bound_bytes(most), most.peak_bytes]
            share = f"{most.peak_bytes / bound_bytes(most):.2f}"
            rows.append([f"{_name(r)}, stage {stage}", *(f"{figure / 1e6:,.0f}" for figure in figures), share])
    columns = ["", "parameters", "gradients", "optimizer", "activations", "sum", "base", "bound", "peak", "peak/bound"]
    return Table(
        f"memory of each worker, MB; bound = {MEMORY_FACTOR} x sum + base + {WORKING_ROOM_BYTES / 1e6:.0f}",
        columns,
        rows,
    )
