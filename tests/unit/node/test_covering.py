"""What the first worker asks its supervisor for, and when a stand-in leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from coordinator.coverage import Policy
from coordinator.directory import RESERVED, SERVING, DirectorySnapshot, PeerEntry
from node import covering
from node.covering import ASK_AGAIN, Covering, Room, until_relieved
from node.events import Cover, Coverage, Event

NOW = 1000.0


def peer(stage: int, peer_id: str, **values: Any) -> PeerEntry:
    usual: dict[str, Any] = {"state": SERVING, "throughput": 2.5, "reserved_at": 1.0, "expires_at": 1e10}
    return PeerEntry(run_id="r", stage=stage, peer_id=peer_id, endpoints=("h:1",), **usual | values)


def seen(*entries: PeerEntry, stages: int = 3) -> DirectorySnapshot:
    return DirectorySnapshot.of("r", stages, entries, taken_at=NOW)


class Directory:
    """The part of a swarm that is used, in memory."""

    def __init__(self, entries: Iterable[PeerEntry] = ()) -> None:
        self.entries = list(entries)

    async def snapshot(self, run_id: str, num_stages: int, max_age: timedelta) -> DirectorySnapshot:
        return DirectorySnapshot.of(run_id, num_stages, self.entries, taken_at=time.time())


ME = peer(0, "me", max_stages=3)


def covering_of(room: Room, told: list[Event]) -> Covering:
    return Covering(Directory(), ME, 3, room=room, tell=told.append, policy=Policy(grace=timedelta(seconds=10)))


def test_it_tells_once_what_nobody_serves_and_asks_for_workers_after_a_while() -> None:
    told: list[Event] = []
    subject = covering_of(Room(stands_in=True), told)
    alone = seen(ME)
    for now in (NOW, NOW + 9.9):
        subject.look(alone, now)
    text = "paused: nobody serves stages 1 and 2; it resumes by itself when somebody joins"
    assert told == [Coverage(unserved=(1, 2), detail=text)]
    subject.look(alone, NOW + 10)
    subject.look(alone, NOW + 12)  # they are starting
    asked = [event for event in told if isinstance(event, Cover)]
    assert [(event.stage, event.reason) for event in asked] == [(1, "nobody serves it"), (2, "nobody serves it")]
    assert (asked[0].beside.node_id, asked[0].beside.throughput, asked[0].beside.stand_in) == ("me", 2.5, True)
    subject.look(alone, NOW + 10 + ASK_AGAIN.total_seconds())
    assert len([event for event in told if isinstance(event, Cover)]) == 4
    subject.look(seen(ME, peer(1, "a"), peer(2, "b")), NOW + 60)
    assert told[-1] == Coverage(unserved=(), detail="")


def test_who_does_not_stand_in_asks_for_nothing_but_what_a_person_wanted() -> None:
    told: list[Event] = []
    subject = covering_of(Room(also=(2,)), told)
    for seconds in range(0, 60, 2):
        subject.look(seen(ME, *([peer(2, "me2", node_id="me")] if seconds > 20 else [])), NOW + seconds)
    (asked,) = [event for event in told if isinstance(event, Cover)]
    assert (asked.stage, asked.reason, asked.beside.stand_in) == (2, "asked for", False)


@dataclass
class Group:
    """The part of a replica group that is used."""

    serving: bool = True
    heard: set[str] = field(default_factory=set)

    def level(self) -> set[str]:
        return self.heard


STAND_IN = peer(1, "me1", node_id="me", stand_in=True)


def leaves(directory: Directory, group: Group, monkeypatch: pytest.MonkeyPatch, change: Any = None) -> str | None:
    """To whom the stand-in leaves within a moment. `change`: what happens after half of it."""
    monkeypatch.setattr(covering, "LOOK", timedelta(milliseconds=5))

    async def run() -> str | None:
        waiting = until_relieved(directory, STAND_IN, 3, group, Policy(sure=timedelta(seconds=0.1)))
        task = asyncio.create_task(waiting)
        await asyncio.sleep(0.06)
        if change is not None:
            change()
        done, _ = await asyncio.wait({task}, timeout=0.4)
        task.cancel()
        return task.result() if done else None

    return asyncio.run(run())


def test_a_stand_in_leaves_once_another_one_has_served_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    other = peer(1, "other")
    both = Directory([STAND_IN, other])
    assert leaves(both, Group(heard={"other"}), monkeypatch) == "other"
    assert leaves(both, Group(), monkeypatch) is None  # a record is not enough
    assert leaves(both, Group(serving=False), monkeypatch) == "other"  # nobody would miss it
    assert leaves(Directory([STAND_IN, replace(other, state=RESERVED)]), Group(heard={"other"}), monkeypatch) is None
    group = Group(heard={"other"})
    assert leaves(both, group, monkeypatch, group.heard.clear) is None  # it went silent just in time
