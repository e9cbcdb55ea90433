"""What `resbm-node status` shows of one look at the directory: for scripts and for people. Pure."""

from __future__ import annotations

from typing import Any

from resbm_pb import records_pb2
from rich import box
from rich.console import RenderableType
from rich.table import Table

from coordinator.directory import SERVING, DirectorySnapshot, PeerEntry
from node.swarm_view import SwarmView, pause, unserved
from node.ui import short_bytes, short_count


def as_json(snapshot: DirectorySnapshot, name: str, steps: int) -> dict[str, Any]:
    """One view, for scripts."""
    peers = [
        {
            "stage": entry.stage,
            "peer_id": entry.peer_id,
            "state": state_name(entry),
            "node_id": entry.node,
            "stand_in": entry.stand_in,
            "endpoints": list(entry.endpoints),
            "committed_step": entry.committed_step,
            "durable_step": entry.durable_step,
            "loss": entry.loss,
            "tokens_per_second": entry.tokens_per_second,
            "compute_share": entry.compute_share,
            "queue_depth": entry.queue_depth,
            "microbatches": entry.microbatches,
            "microbatches_per_second": entry.throughput,
            "wire_compression": entry.wire_compression or None,
            "round_trip_seconds": entry.round_trip_seconds or None,
            "link_bytes_per_second": entry.link_bytes_per_second or None,
            "software_version": entry.software_version,
        }
        for entry in snapshot.all_peers()
    ]
    return {
        "event": "status",
        "run_id": snapshot.run_id,
        "name": name,
        "num_stages": snapshot.num_stages,
        "steps": steps,
        "unserved_stages": list(unserved(snapshot)),
        "paused": pause(snapshot) or None,
        "refused_records": snapshot.num_refused,
        "swarm": _swarm_json(SwarmView.of(snapshot)),
        "peers": peers,
    }


def _swarm_json(view: SwarmView) -> dict[str, Any]:
    return {
        "step": view.step,
        "loss": view.loss,
        "tokens_per_second": view.tokens_per_second,
        "replicas": list(view.replicas),
        "bottleneck_stage": view.bottleneck_stage,
        "bottleneck_microbatches_per_second": view.bottleneck,
        "wire_compression": view.wire_compression or None,
    }


def as_table(snapshot: DirectorySnapshot, name: str, steps: int) -> RenderableType:
    """One view, for people."""
    caption = pause(snapshot) or "every stage is served"
    title = f"run {name} ({snapshot.run_id})\n{summary(SwarmView.of(snapshot), steps)}"
    table = Table(title=title, caption=caption, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in _COLUMNS:
        table.add_column(column, justify="right" if justify else "left", no_wrap=True)
    for stage in range(snapshot.num_stages):
        for entry in snapshot.at(stage):
            table.add_row(*_row(entry, steps))
        if not snapshot.at(stage):
            table.add_row(str(stage), "[yellow]nobody[/]")
    return table


def summary(view: SwarmView, steps: int) -> str:
    """The whole swarm in one line."""
    parts = [f"step {view.step}/{steps}", f"{short_count(view.tokens_per_second)} tokens/s"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.3f}")
    if view.bottleneck:
        parts.append(f"bottleneck: stage {view.bottleneck_stage}, {view.bottleneck:.1f} microbatches/s")
    if view.wire_compression:
        parts.append(f"wire {view.wire_compression:.0f}x")
    return " · ".join(parts)


_COLUMNS = (
    ("stage", True),
    ("peer", False),
    ("state", False),
    ("step", True),
    ("loss", True),
    ("tokens/s", True),
    ("busy", True),
    ("queue", True),
    ("speed", True),
    ("wire", True),
    ("link", True),
    ("trip", True),
)
"""Busy: share of time spent computing. Speed: microbatches/s that the peer measured of itself when it joined.
Wire (dense bytes / wire bytes), link (what TCP delivers) and trip (there and back): of the link to the next stage."""


def _row(entry: PeerEntry, steps: int) -> tuple[str, ...]:
    return (
        str(entry.stage),
        f"{entry.peer_id[:8]}..{entry.peer_id[-6:]}",
        "standing in" if entry.stand_in and entry.state == SERVING else state_name(entry),
        f"{entry.committed_step}/{steps}",
        "-" if entry.loss is None else f"{entry.loss:.3f}",
        short_count(entry.tokens_per_second),
        f"{100 * entry.compute_share:.0f} %",
        str(entry.queue_depth),
        f"{entry.throughput:.1f}/s",
        f"{entry.wire_compression:.0f}x" if entry.wire_compression else "-",
        short_rate(entry.link_bytes_per_second) if entry.link_bytes_per_second else "-",
        f"{1000 * entry.round_trip_seconds:.0f} ms" if entry.round_trip_seconds else "-",
    )


def short_rate(bytes_per_second: float) -> str:
    """'80 Mbit/s', of bytes."""
    return f"{short_bytes(8 * bytes_per_second).removesuffix('B')}bit/s"


def state_name(entry: PeerEntry) -> str:
    """'serving', from PEER_STATE_SERVING."""
    return records_pb2.PeerState.Name(entry.state).removeprefix("PEER_STATE_").lower()
