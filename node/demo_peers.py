"""What a demo knows of each of its peers, and how it tells of one that failed."""

from __future__ import annotations

from resbm_pb import errors_pb2 as codes

from node.events import CHECK_NAMES, Assigned, Check, Complete, Error, Event, Live, MemoryUse, StageStep, Worker
from node.processes import BoundedLog


class PeerView:
    """One peer, as its events tell of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.doing = "starting"
        self.stage: int | None = None
        self.live: Live | None = None
        self.is_live = False
        self.complete = False
        self.memory: MemoryUse | None = None
        self.step = 0
        self.worker_pid: int | None = None
        self.restarts = 0
        self.error: Error | None = None

    def observe(self, event: Event) -> None:
        match event:
            case Check():
                self.doing = f"{event.name} ({event.number}/{len(CHECK_NAMES)})"
            case Assigned():
                self.stage = event.stage
            case Live():
                self.live, self.stage, self.is_live, self.doing = event, event.stage, True, "serving"
            case StageStep():
                self.step = event.step
            case Complete():
                self.complete, self.memory, self.doing = True, event.memory, "complete"
            case Error():
                self.error, self.doing = event, f"E{event.code}"
            case Worker():
                self._observe_worker(event)

    def _observe_worker(self, event: Worker) -> None:
        self.is_live = False
        self.worker_pid = event.pid if event.state == "started" else None
        if event.state == "restarting":
            self.restarts += 1
            self.doing = f"restarting ({event.detail})"


class PeerFailed(Exception):
    """A process of the demo gave up: the run cannot be completed. Has the code and remedy it told, if any."""

    def __init__(self, code: int, cause: str, remedy: str) -> None:
        super().__init__(f"E{code} {cause}")
        self.code = code
        self.cause = cause
        self.remedy = remedy

    @classmethod
    def of(cls, name: str, peer: PeerView | None, how_it_ended: str, log: BoundedLog) -> PeerFailed:
        """Told from its own error event, or else from its last line."""
        who = name if peer is None or peer.stage is None else f"{name} (stage {peer.stage})"
        if peer is not None and peer.error is not None:
            return cls(peer.error.code, f"{who}: {peer.error.cause}; log: {log.path}", peer.error.remedy)
        lines = [line.strip() for line in log.tail(20) if line.strip()]
        last = f": {lines[-1]}" if lines else ""
        cause = f"{who} ended early ({how_it_ended}){last}; log: {log.path}"
        return cls(codes.ERROR_CODE_WORKER_CRASHED, cause, "read its log; `resbm-node doctor` checks this machine")
