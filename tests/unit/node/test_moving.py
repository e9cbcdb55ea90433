"""A peer that is needed more at another stage: decided, claimed, looked at again, remembered."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from coordinator.assignment import MachineProfile
from coordinator.directory import RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.rebalancing import Policy
from node import moving
from node.moving import PLACE_FILE, LastMove, Mover, recall_move, remember_move


def test_a_move_is_remembered(tmp_path: Path) -> None:
    assert recall_move(tmp_path) is None
    remember_move(tmp_path, LastMove(3, 1234.5))
    assert recall_move(tmp_path) == LastMove(3, 1234.5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": 1}', '{"stage": "x", "at": 1}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / PLACE_FILE).write_text(text)
    assert recall_move(tmp_path) is None


class Directory:
    """The part of a swarm that a mover uses, in memory."""

    def __init__(self, entries: list[PeerEntry]) -> None:
        self.entries = {(entry.peer_id, entry.stage): entry for entry in entries}
        self.meanwhile: list[PeerEntry] = []  # appear once a claim was published

    async def snapshot(self, run_id: str, num_stages: int, max_age: timedelta = timedelta(0)) -> DirectorySnapshot:
        return DirectorySnapshot.of(run_id, num_stages, self.entries.values(), taken_at=time.time())

    async def publish_beside(self, entry: PeerEntry) -> None:
        for one in (entry, *self.meanwhile):
            self.entries[one.peer_id, one.stage] = replace(one, expires_at=time.time() + 60)

    async def release(self, run_id: str, stage: int) -> None:
        del self.entries[ME, stage]


@dataclass
class Place:
    """Stands for `Presence` and `ReplicaGroup`."""

    beside: int | None = None
    serving: bool = True
    fellows: frozenset[str] = frozenset({"other"})
    fellows_heard_at: float = math.inf

    def level(self, *, since: float) -> frozenset[str]:
        return self.fellows if self.fellows_heard_at >= since else frozenset()


ME = "me"


def serving(peer_id: str, stage: int) -> PeerEntry:
    now = time.time()
    return PeerEntry(
        run_id="run",
        stage=stage,
        peer_id=peer_id,
        endpoints=("host:1",),
        state=SERVING,
        throughput=10.0,
        reserved_at=now - 3600,
        expires_at=now + 60,
    )


def mover(directory: Directory, folder: Path, place: Place) -> Mover:
    policy = Policy(cool_down=timedelta(0), turn=timedelta(milliseconds=100))
    return Mover(
        swarm=directory,  # type: ignore[arg-type]
        presence=place,  # type: ignore[arg-type]
        group=place,  # type: ignore[arg-type]
        entry=serving(ME, 0),
        machine=MachineProfile(ME, 10.0, (True, True)),
        folder=folder,
        policy=policy,
    )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "SETTLE_WAIT", timedelta(milliseconds=5))
    monkeypatch.setattr(moving, "SETTLE_JITTER", timedelta(0))


def test_a_peer_goes_where_it_is_needed_and_says_so_first(tmp_path: Path) -> None:
    directory, place = Directory([serving(ME, 0), serving("other", 0)]), Place()  # nobody serves stage 1

    async def scenario() -> None:
        async with asyncio.timeout(20):
            move = await mover(directory, tmp_path, place).wanted()
        assert (move.source, move.target) == (0, 1)
        assert directory.entries[ME, 1].state == RESERVED
        assert place.beside == 1
        noted = recall_move(tmp_path)
        assert noted is not None
        assert noted.stage == 1

    asyncio.run(scenario())


def test_a_move_that_somebody_else_makes_first_is_taken_back(tmp_path: Path) -> None:
    directory, place = Directory([serving(ME, 0), serving("other", 0)]), Place()
    directory.meanwhile = [replace(serving("quicker", 1), reserved_at=time.time() - 60)]

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await mover(directory, tmp_path, place).wanted()
        assert (ME, 1) not in directory.entries
        assert place.beside is None
        assert recall_move(tmp_path) is None

    asyncio.run(scenario())


def test_who_alone_has_what_the_run_would_go_back_to_does_not_move(tmp_path: Path) -> None:
    me = replace(serving(ME, 0), checkpoints=(20, 30), copied_stage=1, copied_step=20)
    newcomer = replace(serving("other", 0), checkpoints=(33,))
    directory = Directory([me, newcomer])  # stage 1 is lost

    async def moves(folder: Path) -> bool:
        try:
            async with asyncio.timeout(1.0):
                await mover(directory, folder, Place()).wanted()
            return True
        except TimeoutError:
            return False

    assert not asyncio.run(moves(tmp_path))
    directory.entries["other", 0] = replace(newcomer, checkpoints=(20, 33), copied_stage=1, copied_step=20)
    assert asyncio.run(moves(tmp_path))


@pytest.mark.parametrize(
    "place",
    [
        Place(serving=False),  # it takes over a state
        Place(fellows=frozenset()),  # the other one is in the directory, and asleep
        Place(fellows_heard_at=0.0),  # it fell asleep a moment ago
    ],
)
def test_who_cannot_be_spared_does_not_move(place: Place, tmp_path: Path) -> None:
    directory = Directory([serving(ME, 0), serving("other", 0)])

    async def scenario() -> None:
        wanted = asyncio.create_task(mover(directory, tmp_path, place).wanted())
        await asyncio.sleep(0.3)
        async with asyncio.timeout(5):
            while (ME, 1) in directory.entries:  # noqa: ASYNC110 - it looks again and again, and gives each claim back
                await asyncio.sleep(0)
        assert not wanted.done()
        wanted.cancel()

    asyncio.run(scenario())
