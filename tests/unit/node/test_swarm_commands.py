"""What coordinator, status and join say and accept, apart from the network."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import typer
from rich.console import Console

from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry
from coordinator.ticket import Ticket, decode_ticket
from node import invitation, status_view
from node.commands import coordinator, join, options
from node.events import PeerSeen
from node.swarm_view import SwarmView


def way_in(number: int) -> str:
    return f"/ip4/192.0.2.{number}/tcp/31337/p2p/12D3KooWExamplePeer0123456789"


def entry(stage: int, peer_id: str = "12D3KooWExamplePeer0123456789", **values: object) -> PeerEntry:
    fields: dict[str, object] = {
        "run_id": "r",
        "stage": stage,
        "peer_id": peer_id,
        "endpoints": ("127.0.0.1:5",),
        "state": SERVING,
        "throughput": 1.0,
        "reserved_at": 1.0,
        "expires_at": 99.0,
        **values,
    }
    return PeerEntry(**fields)  # type: ignore[arg-type]


SNAPSHOT = DirectorySnapshot.of(
    "r",
    3,
    [
        entry(
            0,
            committed_step=7,
            loss=2.5,
            throughput=3.25,
            tokens_per_second=1500.0,
            wire_compression=113.0,
            round_trip_seconds=0.2,
            link_bytes_per_second=1e7,
        ),
        entry(2, state=COMPLETE),
    ],
    taken_at=50.0,
    num_refused=1,
)


def test_status_for_scripts_names_what_is_unserved_and_refused() -> None:
    view = status_view.as_json(SNAPSHOT, "demo", 100)
    assert (view["unserved_stages"], view["refused_records"], view["steps"]) == ([1], 1, 100)
    assert view["paused"] == "paused: nobody serves stage 1; it resumes by itself when somebody joins"
    first, last = view["peers"]
    assert (first["node_id"], first["stand_in"]) == (first["peer_id"], False)
    assert (first["stage"], first["state"], first["committed_step"], first["loss"]) == (0, "serving", 7, 2.5)
    assert (first["round_trip_seconds"], first["link_bytes_per_second"]) == (0.2, 1e7)
    assert first["microbatches_per_second"] == 3.25
    assert (last["state"], last["wire_compression"], last["round_trip_seconds"]) == ("complete", None, None)
    assert view["swarm"] == {
        "step": 0,
        "loss": 2.5,
        "tokens_per_second": 1500.0,
        "replicas": [1, 0, 1],
        "bottleneck_stage": 1,
        "bottleneck_microbatches_per_second": 0.0,
        "wire_compression": 113.0,
    }
    assert json.loads(json.dumps(view)) == view


def test_status_for_people_has_a_row_for_every_stage() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(status_view.as_table(SNAPSHOT, "demo", 100))
    text = out.getvalue()
    for words in (
        "paused: nobody serves stage 1; it resumes by itself when somebody joins",
        "7/100",
        "2.500",
        "113x",
        "complete",
        "12D3KooW..456789",
        "80 Mbit/s",
        "200 ms",
        "1.5k tokens/s",
    ):
        assert words in text


def test_status_marks_who_stands_in() -> None:
    snapshot = DirectorySnapshot.of("r", 2, [entry(0, "a"), entry(1, "b", node_id="a", stand_in=True)], taken_at=50.0)
    out = io.StringIO()
    Console(file=out, width=160).print(status_view.as_table(snapshot, "demo", 100))
    assert "standing in" in out.getvalue()
    assert "every stage is served" in out.getvalue()
    peers = status_view.as_json(snapshot, "demo", 100)["peers"]
    assert [(peer["node_id"], peer["stand_in"]) for peer in peers] == [("a", False), ("a", True)]


def test_status_names_the_stage_that_holds_the_swarm_back() -> None:
    full = DirectorySnapshot.of(
        "r", 2, [entry(0, throughput=4.0, committed_step=3), entry(1, throughput=2.5, committed_step=4)], taken_at=50.0
    )
    line = status_view.summary(SwarmView.of(full), 100)
    assert line == "step 3/100 · 0 tokens/s · bottleneck: stage 1, 2.5 microbatches/s"


@pytest.mark.parametrize(("rate", "text"), [(10, "80 bit/s"), (1e7, "80 Mbit/s"), (1.25e8, "1.0 Gbit/s")])
def test_rates_are_told_in_bits(rate: float, text: str) -> None:
    assert status_view.short_rate(rate) == text


def test_the_newest_ticket_is_found_where_a_coordinator_or_a_peer_leaves_it(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="neither a coordinator nor a peer"):
        options.kept_ticket(tmp_path)
    (tmp_path / "coordinator").mkdir()
    invitation.write(tmp_path / "coordinator", "resbm1abc")
    assert options.kept_ticket(tmp_path) == options.kept_ticket(tmp_path / "coordinator") == "resbm1abc"
    invitation.write(tmp_path, "resbm1peer")
    os.utime(tmp_path / "coordinator" / "ticket", (1.0, 1.0))
    assert options.kept_ticket(tmp_path) == "resbm1peer"


def test_a_peers_ticket_names_itself_and_then_those_that_serve_longest() -> None:
    ticket = Ticket("r", (way_in(99),), bytes(32))
    peers = [entry(n % 3, f"peer{n}", bootstrap=(way_in(n), way_in(50)), reserved_at=10.0 - n) for n in range(10)]
    renewed = decode_ticket(invitation.of_swarm(ticket, DirectorySnapshot.of("r", 3, peers, taken_at=5.0), "peer2"))
    assert renewed == Ticket("r", tuple(way_in(n) for n in (2, 9, 8, 7, 6, 5, 4, 3)), ticket.publisher)
    few = DirectorySnapshot.of("r", 3, peers[:1], taken_at=5.0)
    assert decode_ticket(invitation.of_swarm(ticket, few, "peer0")).bootstrap == (way_in(0), way_in(99))


def test_a_ticket_is_written_only_when_it_is_another(tmp_path: Path) -> None:
    invitation.keep_fresh(tmp_path, "resbm1a")
    before = (tmp_path / "ticket").stat().st_ino
    invitation.keep_fresh(tmp_path, "resbm1a")
    assert (tmp_path / "ticket").stat().st_ino == before
    invitation.keep_fresh(tmp_path, "resbm1b")
    assert invitation.read(tmp_path) == "resbm1b"
    invitation.keep_fresh(tmp_path / "gone", "resbm1b")  # a warning, no error


def test_who_came_and_who_went_is_told_and_a_move_is_both() -> None:
    events = coordinator.changes({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "d": 1})
    assert events == [
        PeerSeen(state="left", stage=1, peer_id="b"),
        PeerSeen(state="left", stage=2, peer_id="c"),
        PeerSeen(state="joined", stage=2, peer_id="b"),
        PeerSeen(state="joined", stage=1, peer_id="d"),
    ]


def test_a_run_keeps_its_birthday_over_restarts_of_its_coordinator(tmp_path: Path) -> None:
    first = coordinator._created_at(tmp_path, "r")
    assert coordinator._created_at(tmp_path, "r") == first
    assert coordinator._created_at(tmp_path, "other") != first


def test_a_stage_is_auto_or_one_or_several_numbers() -> None:
    assert join._stage_numbers("auto") == (None, ())
    assert join._stage_numbers("3") == (3, ())
    assert join._stage_numbers("3,0, 1,3") == (3, (0, 1))
    for text in ("-1", "first", "1.5", "", "²", "1,", "auto,1"):
        with pytest.raises(typer.BadParameter):
            join._stage_numbers(text)
