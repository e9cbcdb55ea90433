"""Peers that claim places at the same moment, and how they share the stages. Pure.

All choose from what they saw before the others' claims were visible, and so may choose the same stage. Having looked
again, all compute the same shares: in the order of the claims, each goes where it is needed most, given those before.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from coordinator.directory import RESERVED, DirectorySnapshot, PeerEntry
from coordinator.placement import ALIKE, StageCosts, claims_of, counted

SETTLING = timedelta(seconds=10)
"""How long a claim may be unseen by some, or be taken back: a slow directory, the settlement's wait, unequal clocks."""


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Fresh claims of peers that serve nothing yet, and the swarm that they come to."""

    settled_rates: tuple[float, ...]
    """By stage, of everyone else."""
    claims: tuple[PeerEntry, ...]
    """The best first: earliest reservation, then smallest peer id."""

    @classmethod
    def of(cls, snapshot: DirectorySnapshot, *, now: float) -> Newcomers:
        """Sorts out who is new."""
        claims = claims_of(snapshot, now=now)
        established = {e.peer_id for e in snapshot.all_peers() if e.state != RESERVED and e.is_live(now)}
        rates, fresh = [0.0] * snapshot.num_stages, list[PeerEntry]()
        for entry in counted(snapshot, claims, now=now):
            if is_fresh(entry, now) and entry.peer_id not in established:
                fresh.append(entry)
            else:
                rates[entry.stage] += entry.throughput
        fresh.sort(key=lambda claim: (claim.reserved_at, claim.peer_id))
        return cls(tuple(rates), tuple(fresh))

    def rates_before(self, peer_id: str, costs: StageCosts) -> tuple[float, ...]:
        """By stage, the rates once everyone whose claim is better than this peer's has gone where it is needed most.

        Who has claimed a stage that is needed as much as any stays there, so that the shares are the same again when
        they are computed from the claims that follow from them.
        """
        rates = list(self.settled_rates)
        lowest = [(rate, stage) for stage, rate in enumerate(rates)]
        heapq.heapify(lowest)
        for claim in self.claims:
            if claim.peer_id == peer_id:
                break
            while rates[lowest[0][1]] != lowest[0][0]:
                heapq.heappop(lowest)  # has risen since
            rate, stage = lowest[0]
            if rates[claim.stage] <= rate * (1 + ALIKE):
                stage = claim.stage
            rates[stage] += costs.rate_elsewhere(claim, stage)
            heapq.heappush(lowest, (rates[stage], stage))
        return tuple(rates)

    def share_of(self, peer_id: str, own_rates: Sequence[float], costs: StageCosts) -> int | None:
        """The stage at which a newcomer should be; None when it is none, or no stage fits."""
        claim = next((claim for claim in self.claims if claim.peer_id == peer_id), None)
        able = [stage for stage, rate in enumerate(own_rates) if rate > 0]
        if claim is None or not able:
            return None
        rates = self.rates_before(peer_id, costs)
        lowest = min(able, key=lambda stage: (rates[stage], stage))
        return claim.stage if rates[claim.stage] <= rates[lowest] * (1 + ALIKE) else lowest


def is_fresh(claim: PeerEntry, now: float) -> bool:
    """Whether a reservation may still be unseen by some, or be taken back."""
    return claim.state == RESERVED and claim.reserved_at > now - SETTLING.total_seconds()
