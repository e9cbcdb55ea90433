"""The swarm with its real parts: hivemind, its daemons and separate processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from resbm_pb import records_pb2

from coordinator import identity, records
from coordinator.directory import RESERVED, PeerEntry, run_key, stage_key
from coordinator.errors import (
    ClockSkew,
    DirectoryLost,
    PortTaken,
    RecordInvalid,
    RunNotFound,
    SwarmError,
    TicketUnreachable,
)
from coordinator.swarm import Swarm
from coordinator.ticket import Ticket, decode_ticket

pytestmark = pytest.mark.processes

PROGRAM = Path(__file__).with_name("swarm_process.py")
RUN = {"run_id": "abcd", "config_toml": "abcd", "name": "test run", "num_stages": 4}
OVERVIEW = {"run_id": "abcd", "num_stages": 4}


class PeerProcess:
    """A peer in a process of its own."""

    def __init__(self, folder: Path, bootstrap: list[str], *, seed: bytes | None = None, raw: bool = False) -> None:
        self.seed = seed or os.urandom(32)
        settings = {"seed": self.seed.hex(), "bootstrap": bootstrap, "folder": str(folder), "raw": raw}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.hello: dict[str, Any] = {}

    def wait_ready(self) -> PeerProcess:
        self.hello = self.answer()
        return self

    @property
    def peer_id(self) -> str:
        return str(self.hello["peer_id"])

    @property
    def addresses(self) -> list[str]:
        return list(self.hello["addresses"])

    def request(self, do: str, **values: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer's process ended"
        return json.loads(line)

    def ask(self, do: str, **values: Any) -> Any:
        self.request(do, **values)
        answer = self.answer()
        assert "ok" in answer, answer
        return answer["ok"]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ask_to_stop(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


Spawn = Callable[..., PeerProcess]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts peers in processes of their own; all are gone after the test."""
    peers: list[PeerProcess] = []

    def start(bootstrap: list[str], **options: Any) -> PeerProcess:
        peers.append(PeerProcess(tmp_path / f"peer{len(peers)}", bootstrap, **options))
        return peers[-1]

    yield start
    for peer in peers:
        peer.ask_to_stop()
    for peer in peers:
        peer.stop()


def start_swarm(folder: Path, bootstrap: list[str] | None = None, *, seed: bytes | None = None, port: int = 0) -> Swarm:
    return Swarm.start(
        identity_seed=seed or os.urandom(32),
        listen_host="127.0.0.1",
        announce_host="127.0.0.1",
        port=port,
        bootstrap=bootstrap or [],
        folder=folder,
    )


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """A swarm's first peer, in the test's own process."""
    swarm = start_swarm(tmp_path / "first")
    yield swarm
    swarm.close()


def eventually(condition: Callable[[], bool], seconds: float = 8) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def entry(swarm: Swarm, stage: int = 0) -> PeerEntry:
    return PeerEntry(
        run_id="abcd",
        stage=stage,
        peer_id=swarm.peer_id,
        endpoints=("127.0.0.1:4000",),
        state=RESERVED,
        throughput=2.5,
        reserved_at=time.time(),
    )


def sockets_of(process: psutil.Process) -> list[str]:
    return [argument for argument in process.cmdline() if argument.startswith("-listen=/unix")]


def test_a_second_peer_joins_by_ticket_and_both_are_seen(swarm: Swarm, spawn: Spawn) -> None:
    asyncio.run(swarm.publish_run(created_at=time.time(), **RUN))  # type: ignore[arg-type]
    ticket = swarm.ticket("abcd")
    joiner = spawn(list(decode_ticket(ticket).bootstrap)).wait_ready()
    assert joiner.ask("fetch_run", ticket=ticket) == "test run"
    joiner.ask("publish_peer", run_id="abcd", stage=2)
    asyncio.run(swarm.publish_peer(entry(swarm, stage=0)))

    assert joiner.ask("snapshot", **OVERVIEW) == [[swarm.peer_id], [], [joiner.peer_id], []]
    snapshot = asyncio.run(swarm.snapshot("abcd", 4))
    assert [e.peer_id for e in snapshot.all_peers()] == [swarm.peer_id, joiner.peer_id]
    assert snapshot.at(0)[0].throughput == 2.5
    assert 20 < snapshot.at(0)[0].expires_at - time.time() <= 30
    assert swarm.dht_request_seconds["store"].count == 2
    assert swarm.dht_request_seconds["get"].failures == 0

    told: list[tuple[str, bool, bool]] = []
    swarm.on_dht_request(lambda kind, seconds, failed: told.append((kind, seconds > 0, failed)))
    asyncio.run(swarm.publish_peer(entry(swarm, stage=1)))  # a peer serves one stage: the old entry goes
    assert told == [("store", True, False)] * 2  # the old entry out, the new one in
    joiner.ask("withdraw")
    assert joiner.ask("snapshot", **OVERVIEW) == [[], [swarm.peer_id], [], []]


def test_what_readers_would_refuse_is_not_published(swarm: Swarm) -> None:
    with pytest.raises(RecordInvalid):
        asyncio.run(swarm.publish_peer(replace(entry(swarm), endpoints=())))
    with pytest.raises(RecordInvalid):
        asyncio.run(swarm.publish_run(created_at=0.0, **(RUN | {"config_toml": "#" * 70_000})))  # type: ignore[arg-type]
    assert asyncio.run(swarm.snapshot("abcd", 1)).all_peers() == ()


def test_a_run_is_believed_only_from_its_publisher(swarm: Swarm) -> None:
    asyncio.run(swarm.publish_run(created_at=time.time(), **RUN))  # type: ignore[arg-type]
    true = decode_ticket(swarm.ticket("abcd"))
    assert asyncio.run(swarm.fetch_run(true, lambda text: text)).num_stages == 4
    stranger = Ticket("abcd", true.bootstrap, identity.public_key_of(os.urandom(32)))
    with pytest.raises(RunNotFound):
        asyncio.run(swarm.fetch_run(stranger, lambda text: text))
    with pytest.raises(RunNotFound):  # the config's hash is not the ticket's run id
        asyncio.run(swarm.fetch_run(true, lambda text: text + "?"))
    with pytest.raises(RunNotFound):
        asyncio.run(swarm.fetch_run(Ticket("ffff", true.bootstrap, true.publisher), lambda text: text))


def test_four_simultaneous_joiners_take_four_stages(spawn: Spawn) -> None:
    first = spawn([]).wait_ready()
    peers = [first, *[peer.wait_ready() for peer in [spawn(first.addresses) for _ in range(3)]]]
    for peer in peers:
        peer.request("settle", **OVERVIEW)
    places = [peer.answer()["ok"] for peer in peers]
    assert sorted(place["stage"] for place in places) == [0, 1, 2, 3]
    assert all(place["reason"].startswith(f"stage {place['stage']} of 4: ") for place in places)
    seen = first.ask("snapshot", **OVERVIEW)
    assert all(seen[place["stage"]] == [peer.peer_id] for peer, place in zip(peers, places, strict=True))


def test_a_taken_stage_is_refused_and_its_holder_keeps_it_over_a_crash(spawn: Spawn) -> None:
    first = spawn([]).wait_ready()
    holder = spawn(first.addresses).wait_ready()
    place = holder.ask("settle", stage=1, **OVERVIEW)
    first.request("settle", stage=1, patience=0, **OVERVIEW)
    refusal = first.answer()
    assert (refusal["code"], holder.peer_id in refusal["cause"]) == (310, True)

    os.kill(holder.process.pid, signal.SIGKILL)
    again = spawn(first.addresses, seed=holder.seed).wait_ready()
    assert again.ask("settle", **OVERVIEW)["reserved_at"] == place["reserved_at"]
    assert first.ask("snapshot", **OVERVIEW)[1] == [holder.peer_id]


def test_junk_and_forgeries_are_not_read_back(swarm: Swarm, spawn: Spawn) -> None:
    outlaw = spawn(swarm.addresses(), raw=True).wait_ready()
    key, mine, victim = stage_key("abcd", 0), os.urandom(32), os.urandom(32)
    mine_id, victim_id = (identity.peer_id_of(identity.public_key_of(seed)) for seed in (mine, victim))
    expires_at = time.time() + 30

    def sealed(peer_id: str, *, key: str = key, lives: float = 30) -> bytes:
        message = PeerEntry(
            run_id="abcd",
            stage=0,
            peer_id=peer_id,
            endpoints=("h:1",),
            state=RESERVED,
            throughput=1.0,
            reserved_at=1.0,
        ).to_record()
        return records.seal(message, domain=records.PEER_DOMAIN, key=key, expires_at=expires_at - 30 + lives, seed=mine)

    def store(subkey: str, value: bytes, lives: float = 30) -> Any:
        request = {"key": key, "subkey": subkey, "value_hex": value.hex(), "expires_at": expires_at - 30 + lives}
        outlaw.request("store", **request)
        return outlaw.answer()["ok"]

    def seen() -> list[str]:
        return [e.peer_id for e in asyncio.run(swarm.snapshot("abcd", 1)).all_peers()]

    store(mine_id, b"junk")
    store(victim_id, sealed(victim_id))  # the victim's place, signed by someone else
    store(mine_id, sealed(mine_id, key=stage_key("abcd", 1)))  # moved to another key
    store(mine_id, sealed(mine_id), lives=60)  # kept alive beyond what was signed
    store(mine_id, sealed(mine_id, lives=3600), lives=3600)  # signed for too long
    assert seen() == []
    asyncio.run(swarm.publish_peer(entry(swarm)))
    assert seen() == [swarm.peer_id]  # and the junk at the outlaw hides nobody


def test_a_valid_record_from_an_unchecked_peer_is_read(swarm: Swarm, spawn: Spawn) -> None:
    """The counterpart of the test above: there it is the validator that refuses, not a broken path."""
    outlaw = spawn(swarm.addresses(), raw=True).wait_ready()
    seed, key, expires_at = os.urandom(32), run_key("abcd"), time.time() + 30
    message = records_pb2.RunRecord(run_id="abcd", config_toml="abcd", name="n", num_stages=1)
    sealed = records.seal(message, domain=records.RUN_DOMAIN, key=key, expires_at=expires_at, seed=seed)
    publisher = identity.public_key_of(seed)
    subkey = identity.peer_id_of(publisher)
    outlaw.request("store", key=key, subkey=subkey, value_hex=sealed.hex(), expires_at=expires_at)
    assert outlaw.answer()["ok"] is True
    assert asyncio.run(swarm.fetch_run(Ticket("abcd", (), publisher), lambda text: text)).name == "n"


def test_the_swarm_outlives_its_bootstrap_peer(spawn: Spawn) -> None:
    first = spawn([]).wait_ready()
    ticket = first.ask("publish_run", **RUN)
    second, third = (peer.wait_ready() for peer in [spawn(first.addresses), spawn(first.addresses)])
    for peer in (second, third):
        peer.ask("fetch_run", ticket=ticket)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(5)

    second.ask("publish_peer", run_id="abcd", stage=0)
    third.ask("publish_peer", run_id="abcd", stage=3)
    assert second.ask("snapshot", **OVERVIEW) == [[second.peer_id], [], [], [third.peer_id]]
    late = spawn([*first.addresses, *third.addresses]).wait_ready()  # one address is dead, one lives
    assert late.ask("fetch_run", ticket=ticket) == "test run"
    assert late.ask("snapshot", **OVERVIEW) == [[second.peer_id], [], [], [third.peer_id]]


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_peer(spawn: Spawn, fatal: signal.Signals) -> None:
    peer = spawn([]).wait_ready()
    family = peer.family()
    assert {"p2pd", "torch_shm_manager"} <= {process.name() for process in family} and len(family) == 3
    (daemon,) = (process for process in family if process.name() == "p2pd")
    folder = Path(sockets_of(daemon)[0].removeprefix("-listen=/unix")).parent
    assert folder.is_dir()

    os.kill(peer.process.pid, fatal)
    peer.process.wait(5)
    _, alive = psutil.wait_procs(family, timeout=6)
    assert alive == []
    assert eventually(lambda: not folder.exists())


def test_nothing_outlives_a_peer_killed_while_it_joins(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        peer_id = identity.peer_id_of(identity.public_key_of(os.urandom(32)))
        peer = spawn([f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{peer_id}"])
        assert eventually(lambda: "p2pd" in {process.name() for process in peer.family()}, 30)
        family = peer.family()
        os.kill(peer.process.pid, signal.SIGKILL)
        peer.process.wait(5)
        _, alive = psutil.wait_procs(family, timeout=6)
        assert alive == []


def test_ctrl_c_in_a_terminal_leaves_the_directory_usable(spawn: Spawn) -> None:
    peer = spawn([]).wait_ready()
    daemon = next(process for process in peer.family() if process.name() == "p2pd")
    assert os.getpgid(daemon.pid) != os.getpgid(peer.process.pid)  # the terminal signals the peer's group only
    directory = daemon.parent()
    assert directory is not None
    directory.send_signal(signal.SIGINT)
    peer.ask("publish_peer", run_id="abcd", stage=0)
    assert peer.ask("snapshot", **OVERVIEW)[0] == [peer.peer_id]


@pytest.mark.parametrize("victim", ["p2pd", "directory"])
def test_a_dead_directory_is_noticed_and_swept_up(tmp_path: Path, victim: str) -> None:
    swarm = start_swarm(tmp_path)
    family = psutil.Process().children(recursive=True)
    daemon = next(process for process in family if process.name() == "p2pd")
    directory = daemon.parent()
    assert directory is not None and swarm.is_alive()
    (daemon if victim == "p2pd" else directory).kill()

    assert eventually(lambda: not swarm.is_alive())
    with pytest.raises(DirectoryLost):
        asyncio.run(swarm.snapshot("abcd", 2))
    with pytest.raises(DirectoryLost):
        asyncio.run(swarm.publish_peer(entry(swarm)))
    swarm.close()
    assert eventually(lambda: not daemon.is_running() and not directory.is_running())


def test_a_directory_that_hangs_costs_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = start_swarm(tmp_path)
    daemon = next(p for p in psutil.Process().children(recursive=True) if p.name() == "p2pd")
    directory = daemon.parent()
    assert directory is not None
    monkeypatch.setattr(swarm._directory, "_request_timeout", timedelta(seconds=0.5))
    directory.suspend()
    with pytest.raises(DirectoryLost, match="did not answer"):
        asyncio.run(swarm.snapshot("abcd", 2))
    swarm.close()
    assert eventually(lambda: not daemon.is_running() and not directory.is_running())


def test_only_given_addresses_are_dialled(swarm: Swarm, spawn: Spawn) -> None:
    peer = spawn(swarm.addresses()).wait_ready()
    peer.ask("snapshot", **OVERVIEW)
    daemon = next(process for process in peer.family() if process.name() == "p2pd")
    assert {connection.laddr.ip for connection in daemon.net_connections("inet")} == {"127.0.0.1"}
    remote = {connection.raddr.ip for connection in daemon.net_connections("inet") if connection.raddr}
    assert remote == {"127.0.0.1"}


def test_starting_refusals_are_typed_and_leave_nothing(swarm: Swarm, tmp_path: Path) -> None:
    port = int(swarm.addresses()[0].split("/")[4])
    stranger = identity.peer_id_of(identity.public_key_of(os.urandom(32)))
    before = psutil.Process().children(recursive=True)

    def refused(kind: type[SwarmError], bootstrap: list[str], **options: Any) -> None:
        with pytest.raises(kind):
            start_swarm(tmp_path / "second", bootstrap, **options)

    refused(PortTaken, [], port=port)
    refused(TicketUnreachable, [f"/ip4/127.0.0.1/tcp/9/p2p/{stranger}"])  # nobody listens
    refused(TicketUnreachable, [f"/ip4/127.0.0.1/tcp/{port}/p2p/{stranger}"])  # somebody else listens
    refused(TicketUnreachable, ["/ip4/127.0.0.1/tcp/99999/p2p/nonsense"])
    assert psutil.Process().children(recursive=True) == before
    assert not list((tmp_path / "second").iterdir())  # no key is left lying about
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_wrong_clock_is_named(swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivemind.dht.protocol.get_dht_time", lambda: time.time() - 60)  # inherited by the fork
    with pytest.raises(ClockSkew):
        start_swarm(tmp_path / "second", swarm.addresses())


def test_directories_that_have_lost_each_other_find_each_other_when_called(swarm: Swarm, spawn: Spawn) -> None:
    """hivemind forgets who does not answer for three seconds, on both sides, and calls nobody of its own accord."""
    other = spawn(swarm.addresses()).wait_ready()
    daemon = next(process for process in other.family() if process.name() == "p2pd")
    daemon.suspend()
    for turn in range(2):  # each asks the other, and gives it up
        other.request("snapshot", run_id=f"lost-{turn}", num_stages=1)
        assert asyncio.run(swarm.snapshot(f"lost-{turn}", 1)).peers == ((),)
        other.answer()
    daemon.resume()
    other.ask("publish_peer", run_id="abcd")
    assert asyncio.run(swarm.snapshot("abcd", 1)).find(other.peer_id) is None  # nor will it ever be seen
    assert asyncio.run(swarm.call([*other.addresses, "no address"])) == 1
    other.ask("publish_peer", run_id="abcd")
    assert asyncio.run(swarm.snapshot("abcd", 1)).find(other.peer_id) is not None
