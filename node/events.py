"""What processes of a node tell each other: one JSON object a line, on pipes.

A supervisor gives its worker one `WorkerSpec` line on stdin; the worker answers with events on stdout.
`resbm-node join --json` passes them on, and `resbm-node demo` reads those. Logs go to stderr, never here.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from stage_server.config import Frozen

CheckName = Literal["machine", "identity", "network", "reach", "speed", "stage", "state", "live"]
CHECK_NAMES: tuple[CheckName, ...] = ("machine", "identity", "network", "reach", "speed", "stage", "state", "live")

EXIT_DONE = 0
"""The run is complete, or the worker drained as asked."""
EXIT_RESTART = 75
"""Restart me at once: I went back to an older checkpoint (EX_TEMPFAIL)."""
EXIT_REFUSED = 78
"""Do not restart me: an "error" event said why (EX_CONFIG)."""

MAX_LINE_BYTES = 1 << 20
"""A longer line is no event."""


class EventInvalid(ValueError):
    """A line is no event: not JSON, of unknown kind, or with wrong fields. Carries the line, cut to 200 characters."""

    def __init__(self, line: str, why: str) -> None:
        super().__init__(f"{why}: {line[:200]!r}")
        self.line = line[:200]
        self.why = why


class Beside(Frozen):
    """What a further worker of a machine knows from the first one."""

    node_id: str = Field(description="peer id of the first worker")
    throughput: float = Field(gt=0, description="microbatches per second that the first one measured")
    stand_in: bool = Field(description="it leaves when somebody else serves the stage; else a person wanted it there")
    claimed_at: float = Field(0.0, ge=0, description="Unix time of the claim taken over with the place; 0: none")
    bootstrap: tuple[str, ...] = Field((), description="the first one's directory: a way in when the ticket's are gone")


class WorkerSpec(Frozen):
    """All a worker process is told: the one line on its stdin."""

    ticket: str = Field(description="the run to join, as printed by the coordinator")
    state_folder: Path = Field(description="checkpoints and logs; locked by the supervisor")
    identity_file: Path = Field(description="Ed25519 key of this peer")
    stage: int | None = Field(None, ge=0, description="stage to serve; None: the swarm's need decides")
    also: tuple[int, ...] = Field((), description="further stages to serve, each with a worker beside this one")
    max_stages: int = Field(1, ge=0, description="stages to serve at most while nobody else does; 0: as many as fit")
    cover_after_seconds: float = Field(15.0, ge=0, description="a stage that nobody serves is left alone for so long")
    num_beside: int = Field(0, ge=0, description="workers that run beside the first one when it starts")
    beside: Beside | None = Field(None, description="None: this is the machine's first worker")
    host: str = Field("0.0.0.0", description="address to listen on")
    announce: str = Field("", description="address that other peers dial; empty: found out")
    port: int = Field(0, ge=0, lt=65536, description="port of the stage service; 0: any")
    dht_port: int = Field(0, ge=0, lt=65536, description="port of the directory peer; 0: any")
    metrics_port: int | None = Field(None, ge=0, lt=65536, description="port of /metrics; 0: any, None: off")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    threads: int = Field(0, ge=0, description="torch threads; 0: torch's own choice")
    state_rate_mbit: float = Field(20.0, ge=0, description="given to joiners at most, Mbit/s; 0: no limit")
    activation_budget_bytes: int = Field(1 << 30, ge=0, description="activations kept; beyond it they are recomputed")


class Check(Frozen):
    """One numbered step of joining has ended."""

    event: Literal["check"] = "check"
    number: int = Field(ge=1)
    name: CheckName
    verdict: Literal["ok", "warn", "failed"]
    seconds: float = Field(ge=0)
    detail: str
    stage: int | None = Field(None, description="of a worker beside the machine's first one: its stage")


class Assigned(Frozen):
    """Which stage this peer will serve, and why."""

    event: Literal["assigned"] = "assigned"
    stage: int
    num_stages: int
    reason: str


class Live(Frozen):
    """The peer is published and serves its stage."""

    event: Literal["live"] = "live"
    stage: int
    peer_id: str
    endpoint: str = Field(description="host:port of the stage service")
    metrics_endpoint: str | None = Field(description="host:port of /metrics; None: off")
    committed_step: int
    run: str = Field(description="name of the run")
    steps: int = Field(description="steps of the run")


class Coverage(Frozen):
    """Which stages nobody serves, told whenever that changes. The run is paused until somebody does."""

    event: Literal["coverage"] = "coverage"
    unserved: tuple[int, ...]
    detail: str = Field(description="in words for people; empty when every stage is served")


class Cover(Frozen):
    """The first worker asks for one more worker, for a stage beside its own."""

    event: Literal["cover"] = "cover"
    stage: int = Field(ge=0)
    reason: str
    beside: Beside


class Relieved(Frozen):
    """A stand-in leaves its stage to another peer, which serves it by now."""

    event: Literal["relieved"] = "relieved"
    stage: int
    peer_id: str = Field(description="the other peer")


class LinkTraffic(Frozen):
    """What crossed the link to the next stage in one step."""

    dense_bytes: int = Field(ge=0, description="bf16 activations and gradients would have cost this, both directions")
    wire_bytes_forward: int = Field(ge=0)
    wire_bytes_backward: int = Field(ge=0)

    @property
    def wire_bytes(self) -> int:
        return self.wire_bytes_forward + self.wire_bytes_backward


class WorkTime(Frozen):
    """Time of one kind of work, see stage_server/profile.py."""

    seconds: float = Field(ge=0, description="wall time")
    cpu_seconds: float = Field(ge=0, description="of the thread that did it")


class StageStep(Frozen):
    """One stage has committed one step. A restarted worker may repeat steps, with the same loss."""

    event: Literal["stage_step"] = "stage_step"
    stage: int
    step: int
    loss: float | None = Field(description="mean nats per token, known to the last stage (others: None or relayed)")
    tokens: int = Field(ge=0, description="tokens of this step")
    seconds: float = Field(ge=0, description="wall time since this stage's previous commit")
    steady_seconds: float = Field(0.0, ge=0, description="of it, with the pipeline full: neither filling nor draining")
    steady_microbatches: int = Field(0, ge=0, description="done meanwhile")
    microbatches: int = Field(ge=0)
    compute_seconds: float = Field(ge=0)
    wait_seconds: float = Field(ge=0, description="spent waiting for neighbours")
    gradient_norm: float
    link: LinkTraffic | None = Field(description="link to the next stage; None on the last stage")
    work: dict[str, WorkTime] = Field(default_factory=dict, description="by kind of work, since the previous commit")


class Evaluation(Frozen):
    """Validation loss, measured by the last stage with the weights after `step` steps."""

    event: Literal["evaluation"] = "evaluation"
    stage: int
    step: int
    loss: float


class Checkpoint(Frozen):
    """A checkpoint is on disk."""

    event: Literal["checkpoint"] = "checkpoint"
    stage: int
    step: int
    seconds: float
    size_bytes: int


class Link(Frozen):
    """The link to a neighbour was opened or lost."""

    event: Literal["link"] = "link"
    stage: int
    side: Literal["upstream", "downstream"]
    state: Literal["open", "lost"]
    detail: str


class MemoryUse(Frozen):
    """What a worker's memory was at most, and what its trainer accounts for. All in bytes."""

    base_bytes: int = Field(ge=0, description="resident before the weights: libraries, and on the first stage the text")
    peak_bytes: int = Field(ge=0, description="most ever resident")
    parameters_bytes: int = Field(ge=0)
    gradients_bytes: int = Field(ge=0, description="one for each parameter")
    optimizer_bytes: int = Field(ge=0)
    activations_bytes: int = Field(ge=0, description="most held at once, of all microbatches in flight")


class Complete(Frozen):
    """Every step of the run is committed and saved. The worker stays to hand out its weights until it is drained."""

    event: Literal["complete"] = "complete"
    stage: int
    step: int
    memory: MemoryUse | None = None


class StateTransfer(Frozen):
    """A stage's state is on its way here from peers that have it."""

    event: Literal["state_transfer"] = "state_transfer"
    stage: int
    done_bytes: int = Field(ge=0)
    total_bytes: int = Field(ge=0)
    seconds_left: float | None = Field(description="None: not known yet")


class Moving(Frozen):
    """The peer leaves its stage in good order, for one where it is needed more. The worker is started again there."""

    event: Literal["moving"] = "moving"
    stage: int
    to_stage: int
    reason: str


class Rewind(Frozen):
    """The run goes back to an older step, because a stage has lost what followed. The worker is started again."""

    event: Literal["rewind"] = "rewind"
    stage: int
    to_step: int
    redone: int = Field(ge=0, description="steps that this peer had committed and that are done again")
    reason: str


class Error(Frozen):
    """Why a process gives up: stable code, one cause, one remedy."""

    event: Literal["error"] = "error"
    code: int
    cause: str
    remedy: str
    stage: int | None = Field(None, description="of a worker beside the machine's first one: its stage")


class Worker(Frozen):
    """Said by the supervisor of its worker process."""

    event: Literal["worker"] = "worker"
    state: Literal["started", "exited", "restarting"]
    pid: int
    detail: str
    in_seconds: float = Field(0.0, ge=0, description="restarting: when")
    stage: int | None = Field(None, description="of a worker beside the machine's first one: its stage")


class TicketPrinted(Frozen):
    """The coordinator has published the run."""

    event: Literal["ticket"] = "ticket"
    ticket: str
    run_id: str


class PeerSeen(Frozen):
    """The coordinator saw a peer come or go."""

    event: Literal["peer"] = "peer"
    state: Literal["joined", "left"]
    stage: int
    peer_id: str


class Step(Frozen):
    """One step of the whole run, as `demo --json` and `reference --json` print it."""

    event: Literal["step"] = "step"
    step: int
    loss: float
    tokens: int = Field(description="since the run's beginning")
    seconds: float = Field(description="wall time of this step")
    dense_bytes: int
    wire_bytes: int


class Summary(Frozen):
    """The last line of `demo --json` and `reference --json`."""

    event: Literal["summary"] = "summary"
    val_loss_before: float | None
    val_loss: float | None
    wire_compression: float | None = Field(description="dense bytes / wire bytes; None without a link")
    tokens_per_second: float
    weights_digest: str
    unigram_entropy: float
    steps: int
    stages: int
    restarts: int = Field(description="worker processes that were restarted")


Event = Annotated[
    Check
    | Assigned
    | Live
    | Coverage
    | Cover
    | Relieved
    | StageStep
    | Evaluation
    | Checkpoint
    | Link
    | Complete
    | StateTransfer
    | Moving
    | Rewind
    | Error
    | Worker
    | TicketPrinted
    | PeerSeen
    | Step
    | Summary,
    Field(discriminator="event"),
]

_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Event:
    """The event that a line holds. Raises EventInvalid."""
    try:
        return _EVENT.validate_json(line)
    except ValidationError as error:
        text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EventInvalid(text.strip(), f"{where}: {first['msg']}" if where else first["msg"]) from None


def encode_event(event: Event) -> bytes:
    """The event as one line."""
    return event.model_dump_json().encode() + b"\n"


class EventWriter:
    """Writes whole lines to a file descriptor, from any thread, unbuffered."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def write(self, event: Event) -> None:
        """Raises BrokenPipeError when nobody listens any more."""
        data = memoryview(encode_event(event))
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


_stdout = EventWriter(1)


def claim_stdout() -> None:
    """Keeps stdout for events alone: whatever else prints there, in this process or its children, goes to stderr."""
    global _stdout  # noqa: PLW0603 - one process has one stdout
    private = os.dup(1)
    os.dup2(2, 1)
    _stdout = EventWriter(private)


def emit(event: Event) -> None:
    """Writes one event line to stdout."""
    _stdout.write(event)


def read_spec(stream: IO[bytes]) -> WorkerSpec:
    """The first line of a worker's stdin (`sys.stdin.buffer`). Raises EventInvalid when it is no spec."""
    line = stream.readline(MAX_LINE_BYTES)
    try:
        return WorkerSpec.model_validate_json(line)
    except ValidationError as error:
        raise EventInvalid(line.decode("utf-8", "replace"), f"no worker spec: {error.errors()[0]['msg']}") from None
