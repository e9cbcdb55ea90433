"""What a scrape returns, and that every name obeys Prometheus' rules."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from node.errors import PortTaken
from node.events import Checkpoint, Complete, Evaluation, Link, LinkTraffic, Live, StageStep
from node.metrics import MetricsServer, WorkerMetrics

PEER_ID = "12D3KooWExamplePeer"


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
    return WorkerMetrics(run_id="0123456789abcdef", version="0.1.0", device="cpu")


@pytest.fixture
def server(metrics: WorkerMetrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield server
    server.close()


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
    metrics.set_load(queued=3, in_flight=2)
    metrics.add_microbatches("refused")
    metrics.add_dht_request(0.01)


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
        ("resbm_node_microbatches_total", "refused"): 1,
        ("resbm_node_compute_seconds_total",): 2.5,
        ("resbm_node_wait_seconds_total",): 1.0,
        ("resbm_node_idle_seconds_total",): 0.5,
        ("resbm_node_dense_bytes_total", "forward"): 1000,
        ("resbm_node_wire_bytes_total", "forward"): 12,
        ("resbm_node_wire_bytes_total", "backward"): 8,
        ("resbm_node_link_up", "upstream"): 1,
        ("resbm_node_link_up", "downstream"): 0,
        ("resbm_node_links_lost_total", "downstream"): 1,
        ("resbm_node_queue_microbatches",): 3,
        ("resbm_node_in_flight_microbatches",): 2,
        ("resbm_node_checkpoint_seconds_count",): 1,
        ("resbm_node_dht_request_seconds_count",): 1,
        ("resbm_node_state", "serving"): 1,
        ("resbm_node_state", "joining"): 0,
        ("resbm_node_info", "0.1.0", "0123456789abcdef", "cpu"): 1,
    }
    assert {key: seen.get(key) for key in expected} == expected
    assert seen["process_resident_memory_bytes",] > 1_000_000


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
            assert len(sample.labels) <= 3


def test_a_finished_run_shows_as_complete(metrics: WorkerMetrics, server: MetricsServer) -> None:
    metrics.observe(Complete(stage=1, step=9))
    states = {sample.labels["state"]: sample.value for sample in scrape(server.endpoint)["resbm_node_state"].samples}
    assert states == {"joining": 0, "serving": 0, "draining": 0, "complete": 1}


def test_a_relayed_loss_is_optional(metrics: WorkerMetrics, server: MetricsServer) -> None:
    metrics.observe(step(1, loss=None))
    assert scrape(server.endpoint)["resbm_node_loss_nats"].samples[0].value == 0


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
