"""What a worker tells Prometheus: its own registry. docs/metrics.md explains every name.

Names follow Prometheus' rules: prefix `resbm_node_`, base units, `_total` for counters. Labels have few, fixed values:
a peer id in a label would make a new time series of every peer that ever lived. Whatever is not known has no sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from node.events import Checkpoint, Complete, Evaluation, Event, Link, Live, StageStep
from node.metric_parts import Follower, KnownGauge
from node.swarm_view import SwarmView
from node.tcp_links import LinkQuality
from stage_server.totals import Result, Totals
from stage_server.trainer import Direction
from stage_server.work import Side

PREFIX = "resbm_node"
State = Literal["joining", "serving", "draining", "complete"]
STATES: tuple[State, ...] = ("joining", "serving", "draining", "complete")
_CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DHT_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_HOP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30)
_DHT_REQUESTS = ("get", "store", "call")


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What never changes while a worker lives."""

    run_id: str
    run: str  # its name
    stage: int
    num_stages: int
    version: str
    device: str

    @property
    def sides(self) -> tuple[Side, ...]:
        """The neighbours that this stage has."""
        upstream = (Side.UPSTREAM,) if self.stage > 0 else ()
        downstream = (Side.DOWNSTREAM,) if self.stage < self.num_stages - 1 else ()
        return upstream + downstream


@dataclass(frozen=True, slots=True)
class Described:
    """One metric, for docs and for whoever checks queries: the name that queries use, without _bucket, _sum, _count."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Load:
    """What a stage has to do now, in microbatches. `window` is the first stage's own; None on the others."""

    queued: int
    in_flight: int
    window: int | None


class WorkerMetrics:
    """Fed with the worker's own events (`observe`) and with what is looked at every second (`follow`, `set_...`)."""

    def __init__(self, info: NodeInfo) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self.info = info
        self.described: list[Described] = []
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes, process_cpu_seconds_total, ...
        self._describe(info)
        self._build_progress()
        self._build_time_and_load()
        self._build_bytes()
        self._build_links()
        self._build_swarm()
        self.set_state("joining")

    # -- what there is ------------------------------------------------------------------------------------------

    def _describe(self, info: NodeInfo) -> None:
        names = ("run_id", "run", "stage", "version", "device")
        constant = self._gauge("info", "Constant 1; its labels say what this node is.", *names)
        constant.labels(info.run_id, info.run, info.stage, info.version, info.device).set(1)
        self._state = self._gauge("state", "1 for the state that the node is in, 0 for the others.", "state")
        self._gauge("stage", "Stage served (0: embedding).").set(info.stage)
        self._free = self._known("state_folder_free_bytes", "Free disk space where checkpoints are written.")

    def _build_progress(self) -> None:
        self._step = self._known("step", "Optimizer steps committed.")
        self._planned_steps = self._known("planned_steps", "Optimizer steps of the run.")
        self._loss = self._known("loss_nats", "Training loss of the newest step, nats per token.")
        self._validation_loss = self._known("validation_loss_nats", "Newest validation loss, nats per token.")
        self._gradient_norm = self._known("gradient_norm", "Norm of this stage's newest gradient, before clipping.")
        self._tokens = self._counter("tokens", "Tokens trained on, counted at commits.")
        results = self._counter("microbatches", "Microbatches by what became of them here.", "result")
        self._microbatches = {result: Follower(results.labels(result.value)) for result in Result}

    def _build_time_and_load(self) -> None:
        self._compute = self._counter("compute_seconds", "Time computing, counted at commits.")
        self._wait = self._counter("wait_seconds", "Time waiting for neighbours, counted at commits.")
        self._idle = self._counter("idle_seconds", "Time neither computing nor waiting, counted at commits.")
        self._queue = self._known("queue_microbatches", "Microbatches whose input is here, waiting to be computed.")
        self._in_flight = self._known("in_flight_microbatches", "Microbatches forwarded here and not done yet.")
        self._window = self._known(
            "window_microbatches", "Most that may be in flight: the first stage's credit window."
        )
        text = "Time from handing a microbatch's latents to the downstream link until its gradient is back."
        self._hops = self._histogram("hop_seconds", text, _HOP_BUCKETS)
        self._checkpoint = self._histogram("checkpoint_seconds", "Time to write a checkpoint.", _CHECKPOINT_BUCKETS)
        self._checkpoint_size = self._known("checkpoint_size_bytes", "Size of the newest checkpoint.")

    def _build_bytes(self) -> None:
        dense = self._counter(
            "dense_bytes", "What bf16 activations and gradients would have cost downstream.", "direction"
        )
        wire = self._counter("wire_bytes", "Serialised frames that crossed the link to that side.", "side", "direction")
        if Side.DOWNSTREAM in self.info.sides:
            self._dense = {way: Follower(dense.labels(way)) for way in ("forward", "backward")}
        else:
            self._dense = {}
        self._wire = {
            (side, way): Follower(wire.labels(side.value, way))
            for side in self.info.sides
            for way in ("forward", "backward")
        }
        text = "Relative error that writing latents or gradients adds, of one microbatch a step."
        self._codec_error = self._gauge("codec_error_ratio", text, "direction")

    def _build_links(self) -> None:
        self._link_up = self._gauge("link_up", "1 while any link on that side is open.", "side")
        self._links_lost = self._counter("links_lost", "Links that ended.", "side")
        text = "Smoothed TCP round trip to that neighbour, queues on the way included."
        self._round_trip = self._gauge("link_round_trip_seconds", text, "side")
        text = "Least TCP round trip to that neighbour in the last minutes."
        self._least_round_trip = self._gauge("link_least_round_trip_seconds", text, "side")
        text = "Rate at which TCP delivered what was sent to that neighbour: a lower bound unless the link was full."
        self._rate = self._gauge("link_rate_bytes_per_second", text, "side")
        busy = self._counter("link_busy_seconds", "Time in which bytes for that neighbour were under way.", "side")
        lost = self._counter("link_retransmits", "TCP segments that were sent to that neighbour again.", "side")
        self._busy = {side: Follower(busy.labels(side.value)) for side in self.info.sides}
        self._retransmits = {side: Follower(lost.labels(side.value)) for side in self.info.sides}
        for side in self.info.sides:
            self._link_up.labels(side.value).set(0)
            self._links_lost.labels(side.value)  # shows as 0 before the first: otherwise nobody sees it increase

    def _build_swarm(self) -> None:
        self._dht = self._histogram("dht_request_seconds", "Time of one directory request.", _DHT_BUCKETS, "kind")
        self._dht_failures = self._counter("dht_failures", "Directory requests that failed.", "kind")
        for kind in _DHT_REQUESTS:
            self._dht.labels(kind)
            self._dht_failures.labels(kind)
        self._replicas = self._gauge("stage_replicas", "Peers that serve a stage, by this peer's directory.", "stage")
        text = "Sum of a stage's peers' own measurements of their speed."
        self._stage_throughput = self._gauge("stage_microbatches_per_second", text, "stage")
        text = "The least of all stages' speeds: the swarm cannot be faster."
        self._bottleneck = self._known("bottleneck_microbatches_per_second", text)
        self._contribution = self._known("contribution_ratio", "This peer's share of its stage's speed.")

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self.described.append(Described(f"{PREFIX}_{name}", "gauge", labels, text))
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _known(self, name: str, text: str) -> KnownGauge:
        self.described.append(Described(f"{PREFIX}_{name}", "gauge", (), text))
        return KnownGauge(f"{PREFIX}_{name}", text, self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self.described.append(Described(f"{PREFIX}_{name}_total", "counter", labels, text))
        return Counter(f"{PREFIX}_{name}_total", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        self.described.append(Described(f"{PREFIX}_{name}", "histogram", labels, text))
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    # -- what is heard ------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Takes in what an event says; events without numbers for Prometheus are passed over."""
        match event:
            case Live():
                self._step.set(event.committed_step)
                self._planned_steps.set(event.steps)
                self.set_state("serving")
            case StageStep():
                self._observe_step(event)
            case Evaluation():
                self._validation_loss.set(event.loss)
            case Checkpoint():
                self._checkpoint.observe(event.seconds)
                self._checkpoint_size.set(event.size_bytes)
            case Link(state="lost"):
                self._links_lost.labels(event.side).inc()
            case Complete():
                self.set_state("complete")
            case _:
                pass

    def _observe_step(self, step: StageStep) -> None:
        self._step.set(step.step)
        self._gradient_norm.set(step.gradient_norm)
        self._tokens.inc(step.tokens)
        self._compute.inc(step.compute_seconds)
        self._wait.inc(step.wait_seconds)
        self._idle.inc(max(0.0, step.seconds - step.compute_seconds - step.wait_seconds))
        if step.loss is not None:
            self._loss.set(step.loss)

    def follow(self, totals: Totals) -> None:
        """What the stage has counted up to now."""
        for result, count in totals.microbatches.items():
            self._microbatches[result].follow(count)
        for way, dense_bytes in (("forward", totals.dense_bytes_forward), ("backward", totals.dense_bytes_backward)):
            if way in self._dense:
                self._dense[way].follow(dense_bytes)
        for (side, way), wire in self._wire.items():
            is_sent = (way == "forward") == (side is Side.DOWNSTREAM)
            wire.follow(totals.sent_bytes[side] if is_sent else totals.received_bytes[side])
        for seconds in totals.hops.take():
            self._hops.observe(seconds)

    def set_state(self, state: State) -> None:
        for name in STATES:
            self._state.labels(name).set(name == state)

    def set_load(self, load: Load) -> None:
        self._queue.set(load.queued)
        self._in_flight.set(load.in_flight)
        self._window.set(load.window)

    def set_codec_errors(self, errors: Mapping[Direction, float]) -> None:
        """Relative errors by direction, as last measured."""
        for direction, error in errors.items():
            self._codec_error.labels(direction).set(error)

    def set_free_bytes(self, free_bytes: int) -> None:
        """Of the disk that checkpoints go to."""
        self._free.set(free_bytes)

    def set_links_open(self, links_open: Mapping[Side, bool]) -> None:
        """Whether there is any link on each side: of several, the loss of one is no loss of the side."""
        for side in self.info.sides:
            self._link_up.labels(side.value).set(links_open[side])

    def set_links(self, qualities: Mapping[Side, LinkQuality]) -> None:
        """What the kernel knows of the links that are there; of the others nothing is known."""
        for side in self.info.sides:
            link = qualities.get(side)
            if link is None:
                for gauge in (self._round_trip, self._least_round_trip, self._rate):
                    with contextlib.suppress(KeyError):  # older clients mind what is not there
                        gauge.remove(side.value)
                continue
            self._round_trip.labels(side.value).set(link.round_trip_seconds)
            self._least_round_trip.labels(side.value).set(link.least_round_trip_seconds)
            self._rate.labels(side.value).set(link.bytes_per_second)
            self._busy[side].follow(link.busy_seconds)
            self._retransmits[side].follow(link.retransmits)

    def set_swarm(self, view: SwarmView, contribution: float) -> None:
        """What the directory says. `contribution`: this peer's share of its stage's speed."""
        for stage, (replicas, throughput) in enumerate(zip(view.replicas, view.stage_throughput, strict=True)):
            self._replicas.labels(stage).set(replicas)
            self._stage_throughput.labels(stage).set(throughput)
        self._bottleneck.set(view.bottleneck)
        self._contribution.set(contribution)

    def add_dht_request(self, kind: str, seconds: float, failed: bool) -> None:
        """A request to the directory has ended."""
        self._dht.labels(kind).observe(seconds)
        if failed:
            self._dht_failures.labels(kind).inc()
