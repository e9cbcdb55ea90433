"""Once a second: what no event tells, from where it is known to the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from datetime import timedelta
from pathlib import Path

from node.metrics import Load, WorkerMetrics
from node.tcp_links import LinkWatch
from stage_server.peer import StagePeer

PERIOD = timedelta(seconds=1)


async def keep_sampling(
    peer: StagePeer, links: LinkWatch, metrics: WorkerMetrics, state_folder: Path, period: timedelta = PERIOD
) -> None:
    """For ever; and once more when it is cancelled, so that the last counts are told."""
    try:
        while True:
            sample(peer, links, metrics, state_folder)
            await asyncio.sleep(period.total_seconds())
    finally:
        sample(peer, links, metrics, state_folder)


def sample(peer: StagePeer, links: LinkWatch, metrics: WorkerMetrics, state_folder: Path) -> None:
    """One look: well below a millisecond, on the event loop."""
    ledger = peer.ledger
    metrics.follow(peer.totals)
    metrics.set_codec_errors(peer.codec_errors)
    metrics.set_load(Load(ledger.queue_depth, ledger.in_flight, ledger.window if ledger.is_first else None))
    metrics.set_links_open(peer.neighbours.links_open)
    metrics.set_links(links.look(next(iter(peer.neighbours.next_hops.values()), None)))
    with contextlib.suppress(OSError):  # a disk that fails is the checkpoint's to report
        metrics.set_free_bytes(shutil.disk_usage(state_folder).free)
