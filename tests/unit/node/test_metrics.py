"""What a scrape returns, and that every name obeys Prometheus' rules."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from node.errors import PortTaken
from node.events import Checkpoint, Complete, Evaluation, Link, LinkTraffic, Live, StageStep
from node.metrics import Load, NodeInfo, WorkerMetrics
from node.metrics_server import MetricsServer
from node.swarm_view import SwarmView
from node.tcp_links import LinkQuality
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.totals import Result, Totals
from stage_server.work import Side

PEER_ID = "12D3KooWExamplePeer"
INFO = NodeInfo("0123456789abcdef", "demo", stage=1, num_stages=3, version="0.1.0", device="cpu")


def step(number: int, loss: float | None = 2.5) -> StageStep:
    return StageStep(
        stage=1,
        step=number,
        loss=loss,
        tokens=4096,
        seconds=2.0,
        microbatches=8,
        compute_seconds=1.25,
        wait_seconds=0.5,
        gradient_norm=0.75,
        link=LinkTraffic(dense_bytes=1000, wire_bytes_forward=6, wire_bytes_backward=4),
    )


def scrape(endpoint: str) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=5) as reply:
        return {family.name: family for family in text_string_to_metric_families(reply.read().decode())}


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics(INFO)


@pytest.fixture
def server(metrics: WorkerMetrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def totals() -> Totals:
    totals = Totals(dense_bytes_forward=700, dense_bytes_backward=300)
    totals.sent_bytes.update({Side.UPSTREAM: 5, Side.DOWNSTREAM: 6})
    totals.received_bytes.update({Side.UPSTREAM: 7, Side.DOWNSTREAM: 4})
    totals.microbatches.update({Result.TRAINED: 16, Result.EVALUATED: 2, Result.REPLAYED: 3, Result.REFUSED: 1})
    name = MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, 0)
    totals.hops.sent(name, 1.0)
    totals.hops.returned(name, 1.25)
    return totals


def link(busy_seconds: float = 2.0, retransmits: int = 3) -> LinkQuality:
    return LinkQuality(
        round_trip_seconds=0.2,
        least_round_trip_seconds=0.1,
        bytes_per_second=1e6,
        busy_seconds=busy_seconds,
        retransmits=retransmits,
        num_bytes=1,
    )


def feed(metrics: WorkerMetrics) -> None:
    """At least one sample of each family."""
    live = Live(
        stage=1, peer_id=PEER_ID, endpoint="127.0.0.1:1", metrics_endpoint=None, committed_step=0, run="r", steps=9
    )
    for event in (
        live,
        Link(stage=1, side="upstream", state="open", detail=PEER_ID),
        Link(stage=1, side="downstream", state="open", detail=PEER_ID),
        step(1),
        step(2),
        Evaluation(stage=1, step=2, loss=3.0),
        Link(stage=1, side="downstream", state="lost", detail=PEER_ID),
        Checkpoint(stage=1, step=2, seconds=0.2, size_bytes=12345),
    ):
        metrics.observe(event)
    metrics.follow(totals())
    metrics.set_links_open({Side.UPSTREAM: True, Side.DOWNSTREAM: False})
    metrics.set_load(Load(queued=3, in_flight=2, window=5))
    metrics.set_codec_errors({"forward": 0.1, "backward": 0.2})
    metrics.set_links({Side.UPSTREAM: link(), Side.DOWNSTREAM: link()})
    metrics.set_free_bytes(10**9)
    metrics.set_swarm(SwarmView((1, 2, 1), (3.0, 4.0, 2.0), 2, 2.5, 100.0, 128.0), contribution=0.25)
    metrics.add_dht_request("store", 0.01, failed=True)


def samples(metrics: WorkerMetrics) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def test_a_scrape_shows_what_happened(metrics: WorkerMetrics, server: MetricsServer) -> None:
    feed(metrics)
    families = scrape(server.endpoint)
    seen = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    expected = {
        ("resbm_node_stage",): 1,
        ("resbm_node_step",): 2,
        ("resbm_node_planned_steps",): 9,
        ("resbm_node_loss_nats",): 2.5,
        ("resbm_node_validation_loss_nats",): 3.0,
        ("resbm_node_tokens_total",): 8192,
        ("resbm_node_microbatches_total", "trained"): 16,
        ("resbm_node_microbatches_total", "evaluated"): 2,
        ("resbm_node_microbatches_total", "replayed"): 3,
        ("resbm_node_microbatches_total", "refused"): 1,
        ("resbm_node_compute_seconds_total",): 2.5,
        ("resbm_node_wait_seconds_total",): 1.0,
        ("resbm_node_idle_seconds_total",): 0.5,
        ("resbm_node_hop_seconds_count",): 1,
        ("resbm_node_hop_seconds_sum",): 0.25,
        ("resbm_node_dense_bytes_total", "forward"): 700,
        ("resbm_node_dense_bytes_total", "backward"): 300,
        ("resbm_node_wire_bytes_total", "downstream", "forward"): 6,
        ("resbm_node_wire_bytes_total", "backward", "downstream"): 4,
        ("resbm_node_wire_bytes_total", "forward", "upstream"): 7,
        ("resbm_node_wire_bytes_total", "backward", "upstream"): 5,
        ("resbm_node_codec_error_ratio", "forward"): 0.1,
        ("resbm_node_link_up", "upstream"): 1,
        ("resbm_node_link_up", "downstream"): 0,
        ("resbm_node_links_lost_total", "downstream"): 1,
        ("resbm_node_links_lost_total", "upstream"): 0,
        ("resbm_node_link_round_trip_seconds", "downstream"): 0.2,
        ("resbm_node_link_least_round_trip_seconds", "downstream"): 0.1,
        ("resbm_node_link_rate_bytes_per_second", "upstream"): 1e6,
        ("resbm_node_link_busy_seconds_total", "upstream"): 2.0,
        ("resbm_node_link_retransmits_total", "upstream"): 3,
        ("resbm_node_queue_microbatches",): 3,
        ("resbm_node_in_flight_microbatches",): 2,
        ("resbm_node_window_microbatches",): 5,
        ("resbm_node_checkpoint_seconds_count",): 1,
        ("resbm_node_dht_request_seconds_count", "store"): 1,
        ("resbm_node_dht_request_seconds_count", "get"): 0,
        ("resbm_node_dht_failures_total", "store"): 1,
        ("resbm_node_stage_replicas", "1"): 2,
        ("resbm_node_stage_microbatches_per_second", "2"): 2.0,
        ("resbm_node_bottleneck_microbatches_per_second",): 2.0,
        ("resbm_node_contribution_ratio",): 0.25,
        ("resbm_node_state_folder_free_bytes",): 1e9,
        ("resbm_node_state", "serving"): 1,
        ("resbm_node_state", "joining"): 0,
        ("resbm_node_info", "0.1.0", "0123456789abcdef", "1", "cpu", "demo"): 1,
    }
    assert {key: seen.get(key) for key in expected} == expected
    assert seen["process_resident_memory_bytes",] > 1_000_000


def test_what_is_not_known_has_no_sample(metrics: WorkerMetrics) -> None:
    """A loss of 0 and no loss yet are two things; counters show 0 from the start, so that their increase is seen."""
    before = samples(metrics)
    for name in (
        "loss_nats",
        "validation_loss_nats",
        "step",
        "window_microbatches",
        "bottleneck_microbatches_per_second",
    ):
        assert ("resbm_node_" + name,) not in before
    assert not [
        key
        for key in before
        if key[0] in ("resbm_node_link_round_trip_seconds", "resbm_node_link_rate_bytes_per_second")
    ]
    for result in Result:
        assert before["resbm_node_microbatches_total", result.value] == 0
    assert before["resbm_node_links_lost_total", "upstream"] == 0
    assert before["resbm_node_link_up", "upstream"] == 0


def test_a_link_that_is_gone_has_no_quality(metrics: WorkerMetrics) -> None:
    metrics.set_links({Side.UPSTREAM: link(), Side.DOWNSTREAM: link()})
    metrics.set_links({Side.UPSTREAM: link()})
    metrics.set_links({Side.UPSTREAM: link()})
    seen = samples(metrics)
    assert ("resbm_node_link_round_trip_seconds", "upstream") in seen
    assert ("resbm_node_link_round_trip_seconds", "downstream") not in seen
    assert seen["resbm_node_link_busy_seconds_total", "downstream"] == 2.0


def test_counters_go_on_over_a_new_connection(metrics: WorkerMetrics) -> None:
    for busy in (2.0, 5.0, 0.5, 1.0):  # the third is a new connection's
        metrics.set_links({Side.UPSTREAM: link(busy)})
    assert samples(metrics)["resbm_node_link_busy_seconds_total", "upstream"] == 6.0


def test_the_ends_have_one_neighbour(server: MetricsServer) -> None:
    for stage, side in ((0, "downstream"), (2, "upstream")):
        metrics = WorkerMetrics(replace(INFO, stage=stage))
        metrics.follow(totals())
        keys = samples(metrics)
        assert {key[1] for key in keys if key[0] == "resbm_node_link_up"} == {side}
        assert bool([key for key in keys if key[0] == "resbm_node_dense_bytes_total"]) == (stage == 0)


def test_every_name_obeys_the_rules(metrics: WorkerMetrics, server: MetricsServer) -> None:
    feed(metrics)
    for family in scrape(server.endpoint).values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert family.documentation
        if not family.name.startswith("process_"):
            assert family.name.startswith("resbm_node_")
        for unit in ("milliseconds", "_ms", "_kb", "_mb", "kilobytes", "megabytes", "minutes", "percent"):
            assert unit not in family.name
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            assert not sample.name.endswith("_created")
            assert PEER_ID not in str(sample.labels)
            assert len(sample.labels) <= 5


def test_a_finished_run_shows_as_complete(metrics: WorkerMetrics, server: MetricsServer) -> None:
    metrics.observe(Complete(stage=1, step=9))
    states = {sample.labels["state"]: sample.value for sample in scrape(server.endpoint)["resbm_node_state"].samples}
    assert states == {"joining": 0, "serving": 0, "draining": 0, "complete": 1}


def test_a_loss_that_is_not_told_leaves_the_one_before(metrics: WorkerMetrics) -> None:
    metrics.observe(step(1))
    metrics.observe(step(2, loss=None))
    assert samples(metrics)["resbm_node_loss_nats",] == 2.5


def test_a_taken_port_is_a_typed_error(metrics: WorkerMetrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)) as caught:
            MetricsServer(metrics, "127.0.0.1", port)
    assert caught.value.code == 105
    assert "--metrics-port" in caught.value.remedy


def test_an_address_that_is_not_ours_is_a_typed_error(metrics: WorkerMetrics) -> None:
    with pytest.raises(PortTaken):
        MetricsServer(metrics, "203.0.113.1", 0)


def test_closing_frees_the_port(metrics: WorkerMetrics) -> None:
    first = MetricsServer(metrics, "127.0.0.1", 0)
    port = int(first.endpoint.rpartition(":")[2])
    first.close()
    second = MetricsServer(metrics, "127.0.0.1", port)
    second.close()
