"""Who is addressed with a microbatch, and who waits for its gradient, where stages are shared. Pure.

A microbatch's latents have one addressee at a time, its *route*. When that peer is gone, or cannot compute them any
more, they need another. Its gradient goes to everybody who has asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from stage_server.ids import MicrobatchId


class Routes:
    """Of the microbatches that are kept here. Peers downstream are addressed, peers upstream ask."""

    def __init__(self) -> None:
        self._addressees: dict[MicrobatchId, str] = {}
        self._askers: dict[MicrobatchId, set[str]] = {}
        self._refusals: dict[MicrobatchId, set[str]] = {}

    def __contains__(self, name: object) -> bool:
        """Whether somebody is addressed with it."""
        return name in self._addressees

    def __iter__(self) -> Iterator[MicrobatchId]:
        return iter(self._addressees)

    def to(self, name: MicrobatchId) -> str | None:
        """Whom this microbatch's latents were or will be sent to; None while nobody is chosen."""
        return self._addressees.get(name)

    def send_to(self, name: MicrobatchId, peer: str) -> None:
        """Chooses whom this microbatch's latents go to."""
        self._addressees[name] = peer

    def addressees(self) -> frozenset[str]:
        """Everybody who is addressed with something."""
        return frozenset(self._addressees.values())

    def leave(self, peer: str) -> None:
        """A peer is not waited for any more: what it was sent needs another addressee."""
        for name in [name for name, addressee in self._addressees.items() if addressee == peer]:
            del self._addressees[name]

    def declined(self, name: MicrobatchId, peer: str) -> None:
        """A peer cannot compute this microbatch: somebody else may."""
        self._refusals.setdefault(name, set()).add(peer)
        if self._addressees.get(name) == peer:
            del self._addressees[name]

    def may_ask(self, name: MicrobatchId, peer: str) -> bool:
        """Whether the peer has not declined it."""
        return peer not in self._refusals.get(name, ())

    def asked(self, name: MicrobatchId, peer: str) -> None:
        """A peer upstream wants this microbatch's gradient."""
        self._askers.setdefault(name, set()).add(peer)

    def askers(self, name: MicrobatchId) -> frozenset[str]:
        """Who is to be told of this microbatch's gradient."""
        return frozenset(self._askers.get(name, ()))

    def forget_to(self, step: int) -> None:
        """Nothing of this step and earlier ones is kept any more."""
        for of_steps in (self._addressees, self._askers, self._refusals):
            for name in [name for name in of_steps if name.step <= step]:
                del of_steps[name]


class SoleRoute(Routes):
    """Where one peer serves each stage: everything goes to the one there is, and from it."""

    def __init__(self, peer: str) -> None:
        super().__init__()
        self._peer = peer

    def to(self, name: MicrobatchId) -> str | None:
        return self._peer

    def asked(self, name: MicrobatchId, peer: str) -> None:
        """Known beforehand: nothing to keep."""

    def askers(self, name: MicrobatchId) -> frozenset[str]:
        return frozenset({self._peer})
