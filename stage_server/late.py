"""Microbatches that are asked for after their step was committed here. Pure.

Someone upstream died with the gradient, or before it had asked. The gradient is computed once more, with the weights
that the step started from: it enters nobody's sum here, and is the same as it would have been then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage_server.ids import MicrobatchId


class LateWork:
    """What is late here, and how far it has come: waiting to be forwarded, then for a gradient, then for backward."""

    def __init__(self) -> None:
        self._waiting: dict[MicrobatchId, Any] = {}
        self._forwarded: set[MicrobatchId] = set()
        self._returns: dict[MicrobatchId, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._waiting or name in self._forwarded

    def __len__(self) -> int:
        return len(self._waiting) + len(self._forwarded)

    def begin(self, unfinished: Mapping[MicrobatchId, Any], returns: Mapping[MicrobatchId, Any]) -> None:
        """A step was committed before these inputs were answered; what was late before is nobody's business now."""
        self._waiting = dict(unfinished)
        self._forwarded.clear()
        self._returns = {name: returned for name, returned in returns.items() if name in unfinished}

    def receive_latents(self, name: MicrobatchId, payload: Any) -> None:
        """Someone asks for a microbatch of the newest committed step."""
        if name not in self:
            self._waiting[name] = payload

    def receive_return(self, name: MicrobatchId, returned: Any) -> None:
        """The next stage's answer, if it was asked."""
        if name in self:
            self._returns.setdefault(name, returned)

    def awaits(self, name: MicrobatchId) -> bool:
        """Forwarded, and not answered by the next stage."""
        return name in self._forwarded and name not in self._returns

    def forwarded(self, name: MicrobatchId) -> None:
        """Computed forward."""
        self._waiting.pop(name, None)
        self._forwarded.add(name)

    def answered(self, name: MicrobatchId) -> Any | None:
        """The next stage's answer to a microbatch that is forwarded here; None while there is none."""
        return self._returns.get(name) if name in self._forwarded else None

    def finished(self, name: MicrobatchId) -> None:
        """Computed, and on its way up."""
        self._waiting.pop(name, None)
        self._forwarded.discard(name)
        self._returns.pop(name, None)

    def next_forward(self) -> tuple[MicrobatchId, Any] | None:
        """The first that waits for its forward."""
        return min(self._waiting.items(), key=lambda item: item[0], default=None)

    def next_answered(self) -> tuple[MicrobatchId, Any] | None:
        """The first that waits for its backward."""
        return min(
            ((n, r) for n, r in self._returns.items() if n in self._forwarded), key=lambda item: item[0], default=None
        )
