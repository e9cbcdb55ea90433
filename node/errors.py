"""What a person's input and machine can get wrong, as a tree.

    NodeError
    ├── ConfigUnreadable ConfigInvalid ConfigImpossible     the run file
    ├── DataUnreadable                                      the training text
    ├── PortTaken MachineUnfit                              this machine
    ├── IdentityInvalid StateFolderBusy FileExists          files of ours
    ├── PrivilegeMissing ToolMissing KernelLacks
    │   LabFailed EngineUnavailable                         the WAN lab
    └── WorkerCrashed                                       a worker died once too often

The other rooms have trees of the same shape. `CodedError` is what all of them look like, so that the command line can
print any of them in the same two lines.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from resbm_pb import errors_pb2 as codes


@runtime_checkable
class CodedError(Protocol):
    """An error that a person may see: a stable number, one cause in words, one remedy."""

    @property
    def code(self) -> int: ...

    @property
    def cause(self) -> str: ...

    @property
    def remedy(self) -> str: ...


class NodeError(Exception):
    """Root of this room's errors. `remedy` may be given where the class's own is too general."""

    code: ClassVar[int] = codes.ERROR_CODE_UNSPECIFIED
    remedy: str = ""

    def __init__(self, cause: str, *, remedy: str | None = None) -> None:
        super().__init__(cause)
        if remedy is not None:
            self.remedy = remedy

    @property
    def cause(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return f"E{self.code} {self.cause}"


class ConfigUnreadable(NodeError):
    code = codes.ERROR_CODE_CONFIG_UNREADABLE
    remedy = "check the path, or write a fresh file with: resbm-node init run.toml"


class ConfigInvalid(NodeError):
    code = codes.ERROR_CODE_CONFIG_INVALID
    remedy = "correct the named key; `resbm-node init` writes a file that explains every key"


class ConfigImpossible(NodeError):
    code = codes.ERROR_CODE_CONFIG_IMPOSSIBLE
    remedy = "change one of the named numbers so that they fit each other"


class DataUnreadable(NodeError):
    code = codes.ERROR_CODE_DATA_UNREADABLE
    remedy = 'name readable text files or folders under [data] paths, or use source = "stdlib"'


class PortTaken(NodeError):
    code = codes.ERROR_CODE_PORT_TAKEN
    remedy = "choose another --port (0: any free one) or an address of this machine for --host"


class MachineUnfit(NodeError):
    code = codes.ERROR_CODE_MACHINE_UNFIT
    remedy = "run `resbm-node doctor` and follow what it says"


class IdentityInvalid(NodeError):
    code = codes.ERROR_CODE_IDENTITY_INVALID
    remedy = "restore the file from a backup, or move it away to be given a new identity"


class StateFolderBusy(NodeError):
    code = codes.ERROR_CODE_STATE_FOLDER_BUSY
    remedy = "stop the other process, or give this one its own --state-dir"


class FileExists(NodeError):
    code = codes.ERROR_CODE_FILE_EXISTS
    remedy = "choose another path, or overwrite it with --force"


class PrivilegeMissing(NodeError):
    code = codes.ERROR_CODE_PRIVILEGE_MISSING
    remedy = "run it as root, for example with sudo"


class ToolMissing(NodeError):
    code = codes.ERROR_CODE_TOOL_MISSING
    remedy = "install it: on Debian and Ubuntu, apt-get install iproute2 iptables"


class KernelLacks(NodeError):
    code = codes.ERROR_CODE_KERNEL_LACKS
    remedy = "load the module (modprobe sch_htb, sch_netem, ifb, xt_NFQUEUE) or use a kernel that has it"


class LabFailed(NodeError):
    code = codes.ERROR_CODE_LAB_FAILED
    remedy = "read what the system said; nothing of the lab was left behind"


class EngineUnavailable(NodeError):
    code = codes.ERROR_CODE_ENGINE_UNAVAILABLE
    remedy = "install and start Docker (https://docs.docker.com/engine/install) with its compose plugin, then try again"


class WorkerCrashed(NodeError):
    code = codes.ERROR_CODE_WORKER_CRASHED
    remedy = "read the worker's last lines above; `resbm-node doctor` checks this machine"


def describe(error: CodedError) -> str:
    """The two lines a person sees."""
    return f"error E{int(error.code)}: {error.cause}\n  remedy: {error.remedy}"


def as_event(error: CodedError) -> dict[str, Any]:
    """The same for a script: one line of --json."""
    return {"event": "error", "code": int(error.code), "cause": error.cause, "remedy": error.remedy}
