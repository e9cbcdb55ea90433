"""What can go wrong between peers that look for each other, as a tree.

    SwarmError
    ├── PortTaken                 this machine cannot listen where it was told to
    ├── TicketInvalid TicketUnreachable
    ├── RecordError               a record from the directory is refused; the reader goes on without it
    │   └── RecordForged RecordExpired RecordInvalid
    ├── RunNotFound
    ├── NoStageFree StageUnavailable
    ├── ClockSkew
    └── DirectoryLost             the directory's process is gone or does not answer

Each class carries the stable code that people see (`E303`) and one remedy.
"""

from __future__ import annotations

from typing import ClassVar

from resbm_pb import errors_pb2 as codes


class SwarmError(Exception):
    """Root of this room's errors: one cause in words, one stable code, one remedy."""

    code: ClassVar[int] = codes.ERROR_CODE_UNSPECIFIED
    remedy: ClassVar[str] = ""

    @property
    def cause(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return f"E{self.code} {self.cause}"


class PortTaken(SwarmError):
    code = codes.ERROR_CODE_PORT_TAKEN
    remedy = "choose another port or host, or leave the port out: a free one is found"


class TicketInvalid(SwarmError):
    code = codes.ERROR_CODE_TICKET_INVALID
    remedy = "copy the whole ticket again, from resbm1 to its last character"


class TicketUnreachable(SwarmError):
    code = codes.ERROR_CODE_TICKET_UNREACHABLE
    remedy = "check that the coordinator or another peer of the run is up, and ask for a fresh ticket"


class RecordError(SwarmError):
    """A record is refused. It costs its owner the place in the directory, never the reader its process."""

    remedy = "nothing to do: the record is ignored and its owner publishes a fresh one"


class RecordForged(RecordError):
    code = codes.ERROR_CODE_RECORD_FORGED


class RecordExpired(RecordError):
    code = codes.ERROR_CODE_RECORD_EXPIRED


class RecordInvalid(RecordError):
    code = codes.ERROR_CODE_RECORD_INVALID


class RunNotFound(SwarmError):
    code = codes.ERROR_CODE_RUN_NOT_FOUND
    remedy = "start the run's coordinator, or join with the ticket of a run that is up"


class NoStageFree(SwarmError):
    code = codes.ERROR_CODE_NO_STAGE_FREE
    remedy = "wait until a peer leaves, or join another run"


class StageUnavailable(SwarmError):
    code = codes.ERROR_CODE_STAGE_UNAVAILABLE
    remedy = "join with --stage auto"


class ClockSkew(SwarmError):
    code = codes.ERROR_CODE_CLOCK_SKEW
    remedy = "set this machine's clock by network time (timedatectl set-ntp true), then join again"


class DirectoryLost(SwarmError):
    code = codes.ERROR_CODE_DIRECTORY_LOST
    remedy = "check this machine's network; the node is started again by its supervisor"
