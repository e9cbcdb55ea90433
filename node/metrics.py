"""What a worker tells Prometheus: its own registry, served over HTTP.

Names follow Prometheus' rules: prefix `resbm_node_`, base units, `_total` for counters. Labels have few, fixed values:
a peer id in a label would make a new time series of every peer that ever lived.
"""

from __future__ import annotations

import errno
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from node.errors import PortTaken
from node.events import Checkpoint, Complete, Evaluation, Event, Link, Live, StageStep

PREFIX = "resbm_node"
STATES = ("joining", "serving", "draining", "complete")
State = Literal["joining", "serving", "draining", "complete"]
MicrobatchResult = Literal["trained", "evaluated", "replayed", "refused"]
_CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DHT_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class WorkerMetrics:
    """Fed with the worker's own events (`observe`) and a few numbers that no event carries."""

    def __init__(self, run_id: str, version: str, device: str) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes, process_cpu_seconds_total, ...
        self._describe(run_id, version, device)
        self._build_progress()
        self._build_time_and_load()
        self._build_network()
        self.set_state("joining")

    def _describe(self, run_id: str, version: str, device: str) -> None:
        names = ("run_id", "version", "device")
        info = Gauge(f"{PREFIX}_info", "Constant 1; what this node is.", names, registry=self.registry)
        info.labels(run_id, version, device).set(1)
        self._state = Gauge(f"{PREFIX}_state", "1 for the state the node is in.", ("state",), registry=self.registry)

    def _build_progress(self) -> None:
        self._stage = self._gauge("stage", "Stage served (0: embedding).")
        self._step = self._gauge("step", "Optimizer steps committed.")
        self._planned_steps = self._gauge("planned_steps", "Optimizer steps of the run.")
        self._loss = self._gauge("loss_nats", "Loss of the newest step, nats per token.")
        self._validation_loss = self._gauge("validation_loss_nats", "Newest validation loss, nats per token.")
        self._gradient_norm = self._gauge("gradient_norm", "Norm of this stage's newest gradient, before clipping.")
        self._tokens = self._counter("tokens", "Tokens trained on.")
        self._microbatches = self._counter("microbatches", "Microbatches by what became of them.", "result")

    def _build_time_and_load(self) -> None:
        self._compute = self._counter("compute_seconds", "Time spent computing.")
        self._wait = self._counter("wait_seconds", "Time spent waiting for neighbours.")
        self._idle = self._counter("idle_seconds", "Time spent neither computing nor waiting for neighbours.")
        self._queue = self._gauge("queue_microbatches", "Microbatches waiting to be computed.")
        self._in_flight = self._gauge("in_flight_microbatches", "Microbatches forwarded and not yet backwarded.")
        self._checkpoint = self._histogram("checkpoint_seconds", "Time to write a checkpoint.", _CHECKPOINT_BUCKETS)
        self._checkpoint_size = self._gauge("checkpoint_size_bytes", "Size of the newest checkpoint.")

    def _build_network(self) -> None:
        self._dense = self._counter("dense_bytes", "What bf16 activations would have cost downstream.", "direction")
        self._wire = self._counter("wire_bytes", "Bytes handed to the downstream link.", "direction")
        self._link_up = self._gauge("link_up", "1 while the link to that neighbour is open.", "side")
        self._links_lost = self._counter("links_lost", "Links that broke.", "side")
        self._dht = self._histogram("dht_request_seconds", "Time of one directory request.", _DHT_BUCKETS)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}_total", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def observe(self, event: Event) -> None:
        """Takes in what an event says; events without numbers for Prometheus are passed over."""
        match event:
            case Live():
                self._stage.set(event.stage)
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
            case Link():
                self._link_up.labels(event.side).set(event.state == "open")
                if event.state == "lost":
                    self._links_lost.labels(event.side).inc()
            case Complete():
                self.set_state("complete")
            case _:
                pass

    def _observe_step(self, step: StageStep) -> None:
        self._step.set(step.step)
        self._gradient_norm.set(step.gradient_norm)
        self._tokens.inc(step.tokens)
        self._microbatches.labels("trained").inc(step.microbatches)
        self._compute.inc(step.compute_seconds)
        self._wait.inc(step.wait_seconds)
        self._idle.inc(max(0.0, step.seconds - step.compute_seconds - step.wait_seconds))
        if step.loss is not None:
            self._loss.set(step.loss)
        if step.link is not None:
            for direction, wire_bytes in (
                ("forward", step.link.wire_bytes_forward),
                ("backward", step.link.wire_bytes_backward),
            ):
                self._dense.labels(direction).inc(step.link.dense_bytes / 2)
                self._wire.labels(direction).inc(wire_bytes)

    def set_state(self, state: State) -> None:
        for name in STATES:
            self._state.labels(name).set(name == state)

    def set_load(self, queued: int, in_flight: int) -> None:
        """Microbatches waiting for the device, and forwarded but not yet backwarded."""
        self._queue.set(queued)
        self._in_flight.set(in_flight)

    def add_microbatches(self, result: MicrobatchResult, count: int = 1) -> None:
        """Those that no step counts: evaluated, replayed, refused."""
        self._microbatches.labels(result).inc(count)

    def add_dht_request(self, seconds: float) -> None:
        self._dht.observe(seconds)


class MetricsServer:
    """/metrics over HTTP, on a thread of its own, until `close`."""

    def __init__(self, metrics: WorkerMetrics, host: str, port: int) -> None:
        """`port` 0 takes any free one, see `endpoint`. Raises PortTaken."""
        try:
            self._server, self._thread = start_http_server(port, host, registry=metrics.registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
                raise
            cause = f"cannot serve metrics on {host}:{port}: {error.strerror}"
            raise PortTaken(cause, remedy="choose another --metrics-port (0: any free one)") from None
        self.endpoint = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
