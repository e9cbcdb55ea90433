"""How fast a swarm is as its peers stand, and where one more helps most. Pure.

Every microbatch passes every stage, so the swarm is as fast as its slowest stage, and a stage is as fast as its peers
together. What a peer brings differs by stage: the first and the last compute more, and a slow link may carry the frames
of one stage but not those of another. A rate is always in microbatches per second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.directory import COMPLETE, RESERVED, SERVING, DirectorySnapshot, PeerEntry

ALIKE = 0.05
"""Stages whose rates differ by less than this share are equally in need: what is measured is no more exact."""


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What each stage of a run asks of a machine. Everyone derives the same from the run's config."""

    compute: tuple[float, ...]
    """Time for one microbatch, relative to any fixed stage: (1.1, 1, 1, 1.6) for a costly head."""
    link_bytes: tuple[float, ...]
    """What one microbatch moves in the busier direction of the machine's link."""
    memory_bytes: tuple[int, ...]

    @classmethod
    def alike(cls, num_stages: int) -> StageCosts:
        """Stages that do not differ."""
        return cls((1.0,) * num_stages, (0.0,) * num_stages, (0,) * num_stages)

    def rates(
        self, measured: float, *, at: int, link_bytes_per_second: float = 0.0, available_bytes: float = float("inf")
    ) -> tuple[float, ...]:
        """By stage, what a machine serves that computed `measured` microbatches per second of stage `at`.

        Args:
            link_bytes_per_second: measured to real peers; 0 when it is not known, and limits nothing.
            available_bytes: memory; a stage that does not fit is served at 0.
        """
        return tuple(
            served_rate(measured * self.compute[at] / compute, link_bytes_per_second, frame_bytes)
            if memory <= available_bytes
            else 0.0
            for compute, frame_bytes, memory in zip(self.compute, self.link_bytes, self.memory_bytes, strict=True)
        )

    def rate_elsewhere(self, entry: PeerEntry, stage: int) -> float:
        """What a peer would serve at another stage, judged by what it serves at its own."""
        return entry.throughput * self.compute[entry.stage] / self.compute[stage]

    def surely_fits(self, entry: PeerEntry, stage: int) -> bool:
        """Whether a peer has the memory for a stage, as far as others can know: it holds one that needs no less."""
        return self.memory_bytes[stage] <= self.memory_bytes[entry.stage]


def served_rate(compute_rate: float, link_bytes_per_second: float, bytes_per_microbatch: float) -> float:
    """What remains of a computing rate behind a link. A link rate of 0 is an unknown one."""
    if link_bytes_per_second <= 0 or bytes_per_microbatch <= 0:
        return compute_rate
    return min(compute_rate, link_bytes_per_second / bytes_per_microbatch)


@dataclass(frozen=True, slots=True)
class Placement:
    """Who is where, added up by stage."""

    rates: tuple[float, ...]
    """Of peers that serve or have reserved: the rate now, or soon."""
    serving_rates: tuple[float, ...]
    """Of those alone that serve and stay."""
    num_serving: tuple[int, ...]

    @property
    def bottleneck(self) -> float:
        """The swarm's rate."""
        return min(self.rates)


def placement_of(snapshot: DirectorySnapshot, *, now: float) -> Placement:
    """Adds up a snapshot. Peers that drain or whose records have expired count nowhere."""
    rates, serving_rates = [0.0] * snapshot.num_stages, [0.0] * snapshot.num_stages
    num_serving = [0] * snapshot.num_stages
    for entry in counted(snapshot, claims_of(snapshot, now=now), now=now):
        rates[entry.stage] += entry.throughput
        if entry.state != RESERVED:
            serving_rates[entry.stage] += entry.throughput
            num_serving[entry.stage] += 1
    return Placement(tuple(rates), tuple(serving_rates), tuple(num_serving))


def claims_of(snapshot: DirectorySnapshot, *, now: float) -> dict[str, PeerEntry]:
    """By peer id, each peer's newest live reservation."""
    claims: dict[str, PeerEntry] = {}
    for entry in _live(snapshot, now):
        if entry.state == RESERVED:
            known = claims.get(entry.peer_id)
            if known is None or entry.reserved_at > known.reserved_at:
                claims[entry.peer_id] = entry
    return claims


def counted(snapshot: DirectorySnapshot, claims: Mapping[str, PeerEntry], *, now: float) -> Iterator[PeerEntry]:
    """The entries that bring capacity, each peer's once: one that has reserved a place counts there alone.

    Stand-ins bring none: they leave as soon as others come, and others should come to where they are.

    Args:
        claims: the reservations that are taken for serious; those of others are passed over.
    """
    for entry in _live(snapshot, now):
        claim = claims.get(entry.peer_id)
        if entry.stand_in:
            continue
        if entry is claim or (claim is None and entry.state in (SERVING, COMPLETE)):
            yield entry


def _live(snapshot: DirectorySnapshot, now: float) -> Iterator[PeerEntry]:
    for entries in snapshot.peers:
        for entry in entries:
            if entry.expires_at > now:
                yield entry


def neediest(rates: Sequence[float], own_rates: Sequence[float], peer_id: str) -> int | None:
    """The stage that a machine helps most; None where it can serve none.

    Only service at the slowest stage lifts the bottleneck, so that one, or the slowest that the machine can serve.
    Where several are alike, peers scatter by their ids; of uncovered ones, those in the widest gap come first.
    """
    able = [stage for stage, rate in enumerate(own_rates) if rate > 0]
    if not able:
        return None
    lowest = min(rates[stage] for stage in able)
    alike = [stage for stage in able if rates[stage] <= lowest * (1 + ALIKE)]
    if lowest == 0:
        gaps = gap_widths(rates)
        widest = max(gaps[stage] for stage in alike)
        alike = [stage for stage in alike if gaps[stage] == widest]
    return max(alike, key=lambda stage: scatter(peer_id, stage))


def scatter(peer_id: str, *of: object) -> bytes:
    """A number of a peer's own that everyone agrees on: drawn by hash."""
    return hashlib.blake2b("/".join([peer_id, *map(str, of)]).encode(), digest_size=8).digest()


def gap_widths(rates: Sequence[float]) -> list[int]:
    """By stage, the number of neighbouring stages around it that nobody serves, itself included; 0 for served ones."""
    widths = [0] * len(rates)
    first = 0
    for stage, rate in enumerate([*rates, 1.0]):
        if rate > 0:
            widths[first:stage] = [stage - first] * (stage - first)
            first = stage + 1
    return widths
