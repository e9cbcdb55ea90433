"""What coordinator, status and join say and accept, apart from the network."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry
from node.commands import coordinator, join, status
from node.events import PeerSeen


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
    [entry(0, committed_step=7, loss=2.5, wire_compression=113.0), entry(2, state=COMPLETE)],
    taken_at=50.0,
    num_refused=1,
)


def test_status_for_scripts_names_what_is_unserved_and_refused() -> None:
    view = status.as_json(SNAPSHOT, "demo", 100)
    assert (view["unserved_stages"], view["refused_records"], view["steps"]) == ([1], 1, 100)
    first, last = view["peers"]
    assert (first["stage"], first["state"], first["committed_step"], first["loss"]) == (0, "serving", 7, 2.5)
    assert (last["state"], last["wire_compression"]) == ("complete", None)


def test_status_for_people_has_a_row_for_every_stage() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(status.as_table(SNAPSHOT, "demo", 100))
    text = out.getvalue()
    for words in ("nobody serves stage 1", "7/100", "2.500", "113x", "complete", "12D3KooW..456789"):
        assert words in text


def test_the_last_ticket_is_found_where_a_coordinator_leaves_it(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no coordinator"):
        status._last_ticket(tmp_path)
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator" / "ticket").write_text("resbm1abc\n")
    assert status._last_ticket(tmp_path) == "resbm1abc"
    assert status._last_ticket(tmp_path / "coordinator") == "resbm1abc"


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


def test_a_stage_is_auto_or_a_number() -> None:
    assert join._stage_number("auto") is None
    assert join._stage_number("3") == 3
    for text in ("-1", "first", "1.5", "", "²"):
        with pytest.raises(typer.BadParameter):
            join._stage_number(text)
