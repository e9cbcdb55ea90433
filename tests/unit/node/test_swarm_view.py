"""What one look at the directory says of the whole swarm."""

from __future__ import annotations

import pytest
from resbm_pb import records_pb2

from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from node.swarm_view import SwarmView, contribution, pause, unserved


def entry(
    peer_id: str, stage: int, throughput: float, state: records_pb2.PeerState.ValueType = SERVING, **values: float
) -> PeerEntry:
    return PeerEntry(
        run_id="r",
        stage=stage,
        peer_id=peer_id,
        endpoints=("127.0.0.1:5",),
        state=state,
        throughput=throughput,
        reserved_at=1.0,
        expires_at=99.0,
        **values,  # type: ignore[arg-type]
    )


def snapshot(*entries: PeerEntry, stages: int = 3) -> DirectorySnapshot:
    return DirectorySnapshot.of("r", stages, entries, taken_at=50.0)


FULL = snapshot(
    entry("a", 0, 4.0, committed_step=7, loss=2.5, tokens_per_second=90.0, wire_compression=100.0),
    entry("b", 1, 1.0, committed_step=8, loss=2.25, tokens_per_second=100.0, wire_compression=140.0),
    entry("c", 1, 2.0, committed_step=6),
    entry("d", 2, 5.0, COMPLETE, committed_step=8),
)


def test_the_swarm_is_as_fast_as_its_weakest_stage() -> None:
    view = SwarmView.of(FULL)
    assert view.replicas == (1, 2, 1)
    assert view.stage_throughput == (4.0, 3.0, 5.0)
    assert (view.bottleneck, view.bottleneck_stage) == (3.0, 1)


def test_progress_is_what_all_stages_have_and_loss_is_the_newest() -> None:
    view = SwarmView.of(FULL)
    assert (view.step, view.loss, view.tokens_per_second, view.wire_compression) == (7, 2.25, 90.0, 120.0)


def test_a_peer_that_loads_its_weights_serves_nobody_yet() -> None:
    view = SwarmView.of(snapshot(entry("a", 0, 4.0), entry("b", 1, 9.0, RESERVED), entry("c", 2, 3.0)))
    assert view.replicas == (1, 0, 1)
    assert (view.bottleneck, view.bottleneck_stage, view.step) == (0.0, 1, 0)


def test_an_empty_directory_has_nothing_to_tell() -> None:
    view = SwarmView.of(snapshot())
    assert (view.replicas, view.bottleneck, view.loss, view.tokens_per_second) == ((0, 0, 0), 0.0, None, 0.0)


@pytest.mark.parametrize(("peer_id", "share"), [("a", 1.0), ("b", 1 / 3), ("c", 2 / 3), ("nobody", 0.0)])
def test_a_contribution_is_a_share_of_the_stage(peer_id: str, share: float) -> None:
    assert contribution(FULL, peer_id) == pytest.approx(share)


def test_who_only_reserved_a_place_or_has_no_speed_contributes_nothing() -> None:
    assert contribution(snapshot(entry("a", 0, 4.0, RESERVED)), "a") == 0.0
    assert contribution(snapshot(entry("a", 0, 0.0)), "a") == 0.0


def test_a_run_whose_stages_are_not_all_served_is_paused_and_says_why() -> None:
    assert (unserved(FULL), pause(FULL)) == ((), "")
    away = snapshot(entry("a", 1, 1.0), entry("b", 2, 1.0, DRAINING), stages=3)
    assert unserved(away) == (0, 2)
    assert pause(away) == "paused: nobody serves stages 0 and 2; it resumes by itself when somebody joins"
    coming = snapshot(entry("a", 0, 1.0), entry("b", 1, 1.0, RESERVED), entry("c", 2, 1.0))
    assert pause(coming) == "paused: stage 1 has a peer that does not serve yet"
