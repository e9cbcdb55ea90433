"""How the replicas of one stage take an optimizer step together: who counts what, and when it is done. Pure.

The promise: whoever dies, and whatever is lost, doubled or late on the way, a committed step holds the gradient of
each of its microbatches exactly once, and replicas that live on hold the same weights.

    tally      every replica tells the others what its gradient sum holds and what it has averaged. A tally says how
               things stand, not what has changed: the newest one is enough, so any may be lost.
    round      once the tallies together hold every microbatch, the leader gives each microbatch to one of those that
               hold it: a share for each replica. Who holds more than its share computes its sum again without the
               rest, from retained frames.
    averaging  the shares are summed over all replicas. Each member checks that the sum holds as many microbatches as
               the step has, and that it holds what the members put in, and tells the digest of what it got.
    commit     a member that has the sum commits when every member in sight has told the same digest of the same round,
               or when it sees that another has committed that very sum. A member that failed, or that is gone before
               the sum is here, voids the round, and the leader proposes the next. Once a member has told its digest,
               others may have committed on its word: it does not go back behind it because it has lost sight of one.

Where replicas average only now and then, most rounds add nothing up: they settle whose gradient each microbatch enters,
and their digest names the shares (`digest_of_shares`). Replicas of one lineage then hold different weights in between,
but agree on all that was ever added up.

The leader is whoever has the best claim among those in sight. Two leaders at once, because they do not see each other,
are harmless: a round is only as good as its digests. Where two parts of a stage, cut off from each other, have both
committed a step, both sums are right but differ in rounding: the part without the best claim takes over the other's
weights (`Resync`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

PeerId = str
Indices = frozenset[int]


@dataclass(frozen=True, slots=True)
class Averaged:
    """The sum of one round, as one member got it."""

    round: int
    digest: str


@dataclass(frozen=True, slots=True)
class Tally:
    """How one replica stands."""

    peer: PeerId
    version: int  # later tallies of a peer have larger ones
    committed: int  # steps
    lineage: str  # digest of all sums committed so far: replicas that agree on it hold the same weights
    counted: Indices  # microbatches of step committed + 1 that its gradient sum holds
    round: int = 0  # newest round of that step it has seen
    averaged: Averaged | None = None  # newest sum of that step it has got
    failed: int = 0  # newest round of that step that failed here
    resyncing: bool = False  # it takes over another replica's state, and takes part in nothing until then


@dataclass(frozen=True, slots=True)
class Round:
    """What the leader proposes for one step."""

    step: int
    number: int
    lineage: str  # of the weights that the step starts from
    shares: Mapping[PeerId, Indices]  # by member; a member may have an empty one


@dataclass(frozen=True, slots=True)
class Tell:
    """To all replicas of the stage: this peer's newest tally."""

    tally: Tally


@dataclass(frozen=True, slots=True)
class Propose:
    """To these members of the round; the proposer is one of them when it is new."""

    round: Round
    to: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Average:
    """Make the gradient sum hold exactly the share, and average it with the members; then call `averaged`.

    A newer one replaces one that is still under way.
    """

    round: Round
    share: Indices


@dataclass(frozen=True, slots=True)
class Commit:
    """Take the optimizer step with the sum of that round."""

    step: int
    averaged: Averaged


@dataclass(frozen=True, slots=True)
class Resync:
    """Take over weights and optimizer state of that peer, at that step; then call `resynced`."""

    peer: PeerId
    step: int


Action = Tell | Propose | Average | Commit | Resync

INITIAL = "initial"
"""Lineage of the weights that a run starts from."""


def descend(lineage: str, digest: str) -> str:
    """The lineage after one more step with the sum of that digest."""
    return hashlib.sha256(f"{lineage}/{digest}".encode()).hexdigest()[:32]


def digest_of_shares(proposed: Round) -> str:
    """Stands for the sum of a round in which nothing is added up: each member keeps its share to itself.

    It names the shares, so that nobody takes a step as agreed on whose shares it has not heard of.
    """
    shares = sorted((peer, sorted(share)) for peer, share in proposed.shares.items())
    return hashlib.sha256(json.dumps([proposed.number, shares]).encode()).hexdigest()


def leader_of(peers: Iterable[PeerId], claims: Mapping[PeerId, float]) -> PeerId:
    """Who leads: the earliest claim to its place in the stage, then the smallest peer id."""
    return min(peers, key=lambda peer: (claims.get(peer, float("inf")), peer))


def shares_of(tallies: Iterable[Tally], microbatches: int) -> dict[PeerId, Indices] | None:
    """Each microbatch given to one replica that holds it; None while one is held by nobody.

    Replicas that hold most are served first, so that those who must compute their sums again hold least.
    """
    left = set(range(microbatches))
    shares: dict[PeerId, Indices] = {}
    for tally in sorted(tallies, key=lambda tally: (-len(tally.counted), tally.peer)):
        shares[tally.peer] = frozenset(tally.counted & left)
        left -= tally.counted
    return None if left else shares


@dataclass(slots=True)
class _Step:
    """Work on one step."""

    counted: set[int] = field(default_factory=set)
    round: Round | None = None  # the newest accepted
    seen: int = 0  # number of the newest round heard of
    averaging: int = 0  # round that is being averaged; 0: none
    averaged: Averaged | None = None
    failed: int = 0


class StageAgreement:
    """One replica's part. Every method returns what is to be done now; messages may come late, twice or never.

    Args:
        peer: who this is.
        microbatches: how many a step has, by step; 0 beyond the last.
        committed: steps that this replica's weights hold.
        lineage: digest of those steps.
        version: what its tallies are numbered from; more than any that an earlier life of this peer has told.
    """

    def __init__(
        self,
        peer: PeerId,
        microbatches: Callable[[int], int],
        committed: int = 0,
        lineage: str = INITIAL,
        version: int = 0,
    ) -> None:
        self.peer, self._microbatches = peer, microbatches
        self.committed, self.lineage = committed, lineage
        self._step = _Step()
        self._version = version
        self._tallies: dict[PeerId, Tally] = {}
        self._in_sight: frozenset[PeerId] = frozenset({peer})
        self._claims: Mapping[PeerId, float] = {}
        self._resyncing = False

    # -- what is so ---------------------------------------------------------------------------------------------

    @property
    def microbatches(self) -> int:
        """How many the present step has."""
        return self._microbatches(self.committed + 1)

    @property
    def is_frozen(self) -> bool:
        """A round is under way: what the gradient sum holds is fixed, and nothing more may be counted."""
        return self._step.round is not None or self._resyncing

    @property
    def counted(self) -> Indices:
        """Microbatches of the present step that this replica's gradient sum holds."""
        return frozenset(self._step.counted)

    @property
    def missing(self) -> Indices:
        """Microbatches of the present step that nobody in sight is known to hold."""
        held = set(self._step.counted).union(*(tally.counted for tally in self._peers_at_this_step()))
        return frozenset(range(self.microbatches)) - held

    def tally(self) -> Tally:
        """How this replica stands now."""
        step = self._step
        return Tally(
            peer=self.peer,
            version=self._version,
            committed=self.committed,
            lineage=self.lineage,
            counted=frozenset(step.counted),
            round=step.seen,
            averaged=step.averaged,
            failed=step.failed,
            resyncing=self._resyncing,
        )

    # -- what happened here -------------------------------------------------------------------------------------

    def count(self, index: int) -> list[Action]:
        """The gradient of a microbatch of the present step was added to the sum."""
        if self.is_frozen:
            raise ValueError("nothing is counted while a round is under way")
        self._step.counted.add(index)
        return self._changed()

    def averaged(self, number: int, digest: str | None, num_microbatches: int) -> list[Action]:
        """The averaging of a round ended: with a sum that holds so many microbatches, or (None) without one.

        The caller has verified that the sum is what all members put in: it may be committed without hearing from them.
        """
        step = self._step
        if step.averaging != number:
            return []
        step.averaging = 0
        if digest is None or num_microbatches != self.microbatches:
            step.failed = max(step.failed, number)
        else:
            step.averaged = Averaged(number, digest)
        return self._changed()

    def resynced(self, committed: int, lineage: str) -> list[Action]:
        """Weights and optimizer state are those of another replica now or, where that failed, those of before."""
        self._resyncing = False
        self._enter(committed, lineage)
        return self._changed()

    def in_sight(self, peers: Iterable[PeerId], claims: Mapping[PeerId, float]) -> list[Action]:
        """The replicas of the stage that can be reached now, and their claims. This peer is always in sight."""
        self._in_sight = frozenset(peers) | {self.peer}
        self._claims = dict(claims)
        for peer in self._tallies.keys() - self._in_sight:
            del self._tallies[peer]
        return [Tell(self.tally()), *self._decide()]

    # -- what came in -------------------------------------------------------------------------------------------

    def receive_tally(self, tally: Tally) -> list[Action]:
        """Another replica's newest tally. An older one than that known is ignored; tell tallies again now and then."""
        known = self._tallies.get(tally.peer)
        if tally.peer == self.peer or tally.peer not in self._in_sight:
            return []
        if known is not None and known.version >= tally.version:
            return self._remind(tally) if known.version == tally.version else []
        self._tallies[tally.peer] = tally
        return [*self._remind(tally), *self._decide()]

    def receive_round(self, proposed: Round) -> list[Action]:
        """A leader's proposal. One that is stale, or that gives this replica what it does not hold, is not accepted."""
        step = self._step
        if self._resyncing or proposed.step != self.committed + 1 or proposed.lineage != self.lineage:
            return []
        if proposed.number <= step.seen or self.peer not in proposed.shares:
            return []
        step.seen = proposed.number
        share = proposed.shares[self.peer]
        if not share <= step.counted:
            step.failed = proposed.number
            return self._changed()
        step.round, step.averaging = proposed, proposed.number
        step.counted = set(share)
        return [Average(proposed, share), *self._changed()]

    def _remind(self, tally: Tally) -> list[Action]:
        """A member that has not heard of the round: the proposal was lost on its way to it."""
        round_ = self._step.round
        if round_ is None or tally.peer not in round_.shares or not self._stands_here(tally):
            return []
        return [Propose(round_, (tally.peer,))] if tally.round < round_.number else []

    # -- decisions ----------------------------------------------------------------------------------------------

    def _changed(self) -> list[Action]:
        self._version += 1
        decided = self._decide()
        return [Tell(self.tally()), *decided]

    def _decide(self) -> list[Action]:
        if self._resyncing:
            return []
        return self._catch_up() or self._commit() or self._unfreeze() or self._lead()

    def _catch_up(self) -> list[Action]:
        """Someone is ahead: take the same step if the same sum is here, else take over its state."""
        ahead = [tally for tally in self._tallies.values() if tally.committed > self.committed]
        for tally in ahead:
            mine = self._step.averaged
            if mine and tally.committed == self.committed + 1 and tally.lineage == descend(self.lineage, mine.digest):
                return self._take(mine)
        strays = [tally for tally in self._tallies.values() if self._is_better(tally)]
        if not ahead and not strays:
            return []
        # the furthest, then the best claim: replicas that see the same choose the same
        best = min(
            ahead or strays,
            key=lambda tally: (-tally.committed, self._claims.get(tally.peer, float("inf")), tally.peer),
        )
        self._resyncing = True
        self._version += 1
        return [Tell(self.tally()), Resync(best.peer, best.committed)]

    def _is_better(self, tally: Tally) -> bool:
        """As far as this replica, with other weights and a better claim to being right."""
        if tally.committed != self.committed or tally.lineage == self.lineage:
            return False
        return leader_of((tally.peer, self.peer), self._claims) == tally.peer

    def _commit(self) -> list[Action]:
        """Every member of the round that is in sight has the same sum.

        One that is not may have committed it: only by committing it too is nobody left with another one. And if it is
        dead, its share is in the sum.
        """
        mine, round_ = self._step.averaged, self._step.round
        if mine is None or round_ is None or mine.round != round_.number:
            return []
        others = [self._tallies.get(peer) for peer in round_.shares.keys() & self._in_sight - {self.peer}]
        same = all(tally is not None and self._stands_here(tally) and tally.averaged == mine for tally in others)
        return self._take(mine) if same else []

    def _stands_here(self, tally: Tally) -> bool:
        return (tally.committed, tally.lineage) == (self.committed, self.lineage)

    def _take(self, averaged: Averaged) -> list[Action]:
        step = self.committed + 1
        self._enter(step, descend(self.lineage, averaged.digest))
        self._version += 1
        return [Commit(step, averaged), Tell(self.tally()), *self._decide()]

    def _enter(self, committed: int, lineage: str) -> None:
        self.committed, self.lineage = committed, lineage
        self._step = _Step()

    def _unfreeze(self) -> list[Action]:
        """The round is void: go on counting what is missing until the next one."""
        round_ = self._step.round
        if round_ is None or not self._is_void(round_):
            return []
        self._step.failed = max(self._step.failed, round_.number)
        self._step.round, self._step.averaging = None, 0
        return self._changed()

    def _is_void(self, round_: Round) -> bool:
        """A member works on something else, failed, heard of a newer round, got another sum, or is gone.

        Not the latter where the sum is here: this replica has told so, and who is gone may have committed on its word.
        """
        has_sum = self._step.averaged is not None and self._step.averaged.round == round_.number
        is_whole = self._in_sight.issuperset(round_.shares)
        if self._step.failed >= round_.number or not (is_whole or has_sum):
            return True
        members = [tally for peer in round_.shares if (tally := self._tallies.get(peer)) is not None]
        return any(
            not self._stands_here(tally)
            or tally.resyncing
            or max(tally.failed, tally.round - 1) >= round_.number
            or self._disagrees(tally, round_.number)
            for tally in members
        )

    def _disagrees(self, tally: Tally, number: int) -> bool:
        mine, theirs = self._step.averaged, tally.averaged
        both = mine is not None and theirs is not None and mine.round == theirs.round == number
        return both and mine != theirs

    def _lead(self) -> list[Action]:
        if (
            self.is_frozen
            or not self.microbatches
            or self._is_awaited()
            or leader_of(self._eligible(), self._claims) != self.peer
        ):
            return []
        others = self._peers_at_this_step()
        shares = shares_of((self.tally(), *others), self.microbatches)
        if shares is None:
            return []
        newest = max((tally.round for tally in others), default=0)
        number = max(newest, self._step.seen) + 1
        return [Propose(Round(self.committed + 1, number, self.lineage, shares), tuple(shares))]

    def _is_awaited(self) -> bool:
        """Someone has not told how it stands, or is a message away from standing here.

        Who runs ahead of it makes it take over its state, which costs much more than to wait. One that takes over a
        state already, as joiners do, is not waited for.
        """
        told = [self._tallies.get(peer) for peer in self._in_sight if peer != self.peer]
        return any(tally is None or not (tally.resyncing or self._stands_here(tally)) for tally in told)

    def _eligible(self) -> list[PeerId]:
        """Who may lead this step: those in sight that stand where this replica stands."""
        return [self.peer, *(tally.peer for tally in self._peers_at_this_step())]

    def _peers_at_this_step(self) -> list[Tally]:
        told = tuple(self._tallies.values())  # all at once: what is missing is asked for on another thread too
        return [tally for tally in told if self._stands_here(tally) and not tally.resyncing]
