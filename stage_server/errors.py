"""What can go wrong around one stage, as a tree.

    StageError
    ├── ConfigImpossible          numbers that contradict each other
    ├── PortTaken                 the address to listen on is not to be had
    ├── FrameError                a frame (or its sender) is refused; costs the sender the stream
    │   ├── WrongVersion WrongRun WrongStage ProtocolViolation
    │   ├── WrongShape Oversized Truncated CorruptFrame UnknownCodec
    │   ├── WrongStep WrongToken NotFinite NeighbourStateLost
    ├── LinkLost                  the neighbour is gone; the link is resumed, nothing is lost
    ├── CheckpointInvalid CheckpointUnwritable StateLost StateBusy
    └── RewindNeeded              a neighbour needs frames that nobody holds any more

Each class carries the stable code that people see (`E205`) and one remedy.
"""

from __future__ import annotations

from typing import ClassVar

from resbm_pb import errors_pb2 as codes

MAX_DETAIL_CHARACTERS = 500  # of a neighbour's words that are repeated here


class StageError(Exception):
    """Root of this room's errors: one cause in words, one stable code, one remedy."""

    code: ClassVar[int] = codes.ERROR_CODE_UNSPECIFIED
    remedy: ClassVar[str] = ""

    @property
    def cause(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return f"E{self.code} {self.cause}"


class ConfigImpossible(StageError):
    code = codes.ERROR_CODE_CONFIG_IMPOSSIBLE
    remedy = "change the named fields of the run file"


class PortTaken(StageError):
    code = codes.ERROR_CODE_PORT_TAKEN
    remedy = "choose another port with --port, or 0 for any free one"


class FrameError(StageError):
    """A frame from outside is refused. The stream it came on ends; the process goes on."""

    remedy = "the neighbour must run the same version of the software on the same run"


class WrongVersion(FrameError):
    code = codes.ERROR_CODE_WRONG_VERSION
    remedy = "upgrade the older of the two peers"


class WrongRun(FrameError):
    code = codes.ERROR_CODE_WRONG_RUN
    remedy = "join with the ticket of the run you mean"


class WrongStage(FrameError):
    code = codes.ERROR_CODE_WRONG_STAGE


class ProtocolViolation(FrameError):
    code = codes.ERROR_CODE_PROTOCOL


class WrongShape(FrameError):
    code = codes.ERROR_CODE_WRONG_SHAPE


class Oversized(FrameError):
    code = codes.ERROR_CODE_OVERSIZED


class Truncated(FrameError):
    code = codes.ERROR_CODE_TRUNCATED


class CorruptFrame(FrameError):
    code = codes.ERROR_CODE_CORRUPT_FRAME
    remedy = "nothing to do: the link is reopened and the frame sent again"


class UnknownCodec(FrameError):
    code = codes.ERROR_CODE_UNKNOWN_CODEC


class WrongStep(FrameError):
    code = codes.ERROR_CODE_WRONG_STEP


class WrongToken(FrameError):
    code = codes.ERROR_CODE_WRONG_TOKEN


class NotFinite(FrameError):
    code = codes.ERROR_CODE_NOT_FINITE
    remedy = "lower the learning rate of the run, or look for a peer with a faulty accelerator"


class LinkLost(StageError):
    code = codes.ERROR_CODE_LINK_LOST
    remedy = "nothing to do: the link is redialled and resumed"


class CheckpointInvalid(StageError):
    code = codes.ERROR_CODE_CHECKPOINT_INVALID
    remedy = "delete the named checkpoint folder: the one before it is used"


class CheckpointUnwritable(StageError):
    code = codes.ERROR_CODE_CHECKPOINT_UNWRITABLE
    remedy = "free disk space or point --state-dir at another disk, then join again"


class NeighbourStateLost(FrameError):
    """The neighbour's state is older than what anybody keeps frames for. Told to it; there it is StateLost."""

    code = codes.ERROR_CODE_STATE_LOST
    remedy = "nothing to do here: the neighbour has to restore its state"


class StateLost(StageError):
    code = codes.ERROR_CODE_STATE_LOST
    remedy = "restore this stage's state folder from a backup, or start a new run"


class StateBusy(StageError):
    code = codes.ERROR_CODE_STATE_BUSY
    remedy = "nothing to do: another peer of the stage is asked, or this one again a little later"


class RewindNeeded(StageError):
    """A neighbour must redo steps whose frames this stage no longer holds; it restarts from an older checkpoint."""

    code = codes.ERROR_CODE_REWIND_NEEDED
    remedy = "nothing to do: the stage restarts from the checkpoint both sides hold"

    def __init__(self, cause: str, to_step: int) -> None:
        super().__init__(cause)
        self.to_step = to_step


def refusal(code: int, detail: str) -> StageError:
    """A neighbour's refusal as an error here: StateLost is final, anything else may pass when the link is redialled."""
    detail = detail[:MAX_DETAIL_CHARACTERS]
    if code == codes.ERROR_CODE_STATE_LOST:
        return StateLost(detail)
    return LinkLost(f"the neighbour ended the link: {detail}")
