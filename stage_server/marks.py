"""How far the peers on one side of a stage have come, as they have told. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Mark:
    """What is known of a peer. `durable` and `settled` speak for all stages on its side; None: unknown."""

    committed: int = 0
    durable: int | None = None
    settled: int | None = None

    @property
    def settled_at_least(self) -> int:
        """Before its first status there is no reason to think that stages beyond the peer's lag behind."""
        return self.committed if self.settled is None else self.settled


class SideMarks:
    """The peers of one side that are linked, or were where there is but one."""

    def __init__(self) -> None:
        self._marks: dict[str, Mark] = {}

    def __iter__(self) -> Iterator[Mark]:
        return iter(self._marks.values())

    def __len__(self) -> int:
        return len(self._marks)

    def of(self, peer: str) -> Mark:
        """Of one peer; of one that has told nothing, the beginning."""
        return self._marks.get(peer) or Mark()

    def opened(self, peer: str, committed: int) -> None:
        """A link is new. What the peer had on disk before may be gone since: it says so in its first status."""
        self._marks[peer] = Mark(committed=committed)

    def forget(self, peer: str) -> None:
        """The peer is gone, and others may serve in its place."""
        self._marks.pop(peer, None)

    def doubt(self, peer: str) -> None:
        """The link is gone. The peer may go back to an older checkpoint now, so no floor rests on its word."""
        if peer in self._marks:
            self._marks[peer].durable = None

    def told(self, peer: str, committed: int, durable: int | None, settled: int | None) -> None:
        """The peer's newest status. `durable` may fall: a stage on that side went back to an older checkpoint."""
        mark = self._marks.setdefault(peer, Mark())
        mark.committed = max(mark.committed, committed)
        mark.durable = durable
        mark.settled = committed if settled is None else min(settled, committed)

    @property
    def durable(self) -> int | None:
        """What all peers here are known to have on disk."""
        told = [mark.durable for mark in self]
        known = [durable for durable in told if durable is not None]
        return min(known) if known and len(known) == len(told) else None
