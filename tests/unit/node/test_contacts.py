"""Who is called, how often, and over which line. The lines are a script; tests/faults has the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from coordinator.agreement import Round
from node.replication import contacts
from node.replication.contacts import DIAL_AGAIN, Contacts
from node.replication.messages import ReplicaWord
from node.tasks import Background
from stage_server.errors import LinkLost


class Lines:
    """Those that were dialled, newest last: each answers nothing until it is told to."""

    def __init__(self) -> None:
        self.open: list[bool] = []
        self.calls = 0

    def dial(self, endpoint: str) -> Line:
        self.open.append(True)
        return Line(self, len(self.open) - 1)

    async def until(self, so: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not so():  # noqa: ASYNC110 - a list
                await asyncio.sleep(0.001)


class Line:
    def __init__(self, lines: Lines, number: int) -> None:
        self.lines, self.number = lines, number

    async def agree(self, word: ReplicaWord, proposed: Round | None, within: timedelta) -> ReplicaWord:
        assert self.lines.open[self.number]
        self.lines.calls += 1
        raise LinkLost("cut")

    async def prepare_state(self) -> Any:
        raise AssertionError("nobody asked for it")

    async def close(self) -> None:
        self.lines.open[self.number] = False


def test_a_line_that_was_cut_is_dialled_again_and_none_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contacts, "HEARTBEAT", timedelta(milliseconds=1))

    async def story() -> None:
        lines, background = Lines(), Background()
        known = Contacts(lambda: None, lambda word: None, lines.dial, background)  # type: ignore[arg-type, return-value]
        known.listed({"other": "127.0.0.1:1"})
        await lines.until(lambda: len(lines.open) == 3)
        assert lines.calls == 2 * DIAL_AGAIN
        assert sum(lines.open) == 1
        known.listed({"other": "127.0.0.1:2"})  # it has moved
        await lines.until(lambda: len(lines.open) > 3 and sum(lines.open) == 1)
        await known.close()
        assert not any(lines.open)
        assert background.failure.done() is False

    asyncio.run(story())
