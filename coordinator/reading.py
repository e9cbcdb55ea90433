"""From stored bytes to checked values: what a reader makes of the directory's answers. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resbm_pb import records_pb2

from coordinator import records
from coordinator.directory import DirectorySnapshot, PeerEntry, run_key, stage_key
from coordinator.errors import RecordError, RecordInvalid
from coordinator.ticket import Ticket

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """A run as its publisher signed it. The fields are those of resbm.v1.RunRecord."""

    run_id: str
    config_toml: str
    name: str
    num_stages: int
    created_at: float
    """Unix time in seconds of the first publication."""
    sealed: bytes
    """The signed record, to be handed on unchanged with `Swarm.republish_run`."""
    expires_at: float


def snapshot_of(
    found: Mapping[str, Mapping[str, bytes]], run_id: str, num_stages: int, *, now: float
) -> DirectorySnapshot:
    """Checks everything that was found under a run's stages; what is refused is only counted."""
    entries, num_refused = [], 0
    for stage in range(num_stages):
        for sealed in found.get(stage_key(run_id, stage), {}).values():
            try:
                entry = _opened_peer(sealed, run_id, stage, now)
            except RecordError as error:
                log.info("record refused: %s", error)
                num_refused += 1
            else:
                entries += [entry] if entry is not None else []
    return DirectorySnapshot.of(run_id, num_stages, entries, taken_at=now, num_refused=num_refused)


def _opened_peer(sealed: bytes, run_id: str, stage: int, now: float) -> PeerEntry | None:
    """None for a peer that has withdrawn."""
    key = stage_key(run_id, stage)
    if records.parse_envelope(sealed).domain == records.WITHDRAWAL_DOMAIN:
        return None
    opened = records.open_record(
        sealed, domain=records.PEER_DOMAIN, key=key, now=now, message_type=records_pb2.PeerRecord
    )
    return PeerEntry.from_opened(opened, run_id=run_id, stage=stage)


def opened_run(sealed: bytes, ticket: Ticket, run_id_of: Callable[[str], str], *, now: float) -> PublishedRun:
    """Checks what was found as the ticket's run.

    Raises:
        RecordInvalid, RecordForged, RecordExpired
    """
    opened = records.open_record(
        sealed,
        domain=records.RUN_DOMAIN,
        key=run_key(ticket.run_id),
        now=now,
        message_type=records_pb2.RunRecord,
    )
    run = opened.message
    if opened.public_key != ticket.publisher:
        raise RecordInvalid("it was signed by another than the ticket's publisher")
    if run.run_id != ticket.run_id or run_id_of(run.config_toml) != ticket.run_id:
        raise RecordInvalid("its config is not the one the ticket names")
    return PublishedRun(
        run.run_id, run.config_toml, run.name, run.num_stages, run.created_at, sealed, opened.expires_at
    )
