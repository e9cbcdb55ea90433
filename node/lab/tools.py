"""The system's network tools, run in one network namespace, with their complaints as typed errors."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from node.errors import KernelLacks, LabFailed, NodeError, PrivilegeMissing, ToolMissing

_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "iptables-restore": "iptables"}
_NOT_PERMITTED = ("Operation not permitted", "Permission denied", "you must be root")
_NOT_KNOWN = (
    "Specified qdisc kind is unknown",
    "Specified qdisc not found",
    "Unknown device type",
    "Operation not supported",
    "Protocol not supported",
)
_SECONDS = 60.0


class Tools:
    """Runs `ip`, `tc` and others in `namespace` (None: the caller's own)."""

    def __init__(self, namespace: str | None = None) -> None:
        self.namespace = namespace

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` in the namespace. `ip` and `tc` can go there by themselves, which is quicker."""
        if self.namespace is None:
            return list(argv)
        if argv[0] in ("ip", "tc"):
            return [argv[0], "-n", self.namespace, *argv[1:]]
        return ["ip", "netns", "exec", self.namespace, *argv]

    def run(self, command: str, *, stdin: str | None = None) -> str:
        """The output of a command line (split as a shell would, no shell runs).

        Raises:
            ToolMissing: the program is not installed.
            PrivilegeMissing, KernelLacks, LabFailed: it failed; the cause has its own words.
        """
        argv = shlex.split(command)
        require(argv[0])
        try:
            done = subprocess.run(
                self.inside(argv),
                input=stdin or "",
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                env={**os.environ, "LC_ALL": "C"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabFailed(f"`{command}` did not end within {_SECONDS:.0f} s") from None
        if done.returncode:
            raise _complaint(command, done.stderr.strip() or f"exit status {done.returncode}")
        return done.stdout

    def accepts(self, command: str) -> bool:
        """True when the command did what it should. Raises ToolMissing."""
        try:
            self.run(command)
        except (KernelLacks, LabFailed, PrivilegeMissing):
            return False
        return True


def require(*programs: str) -> None:
    """Raises ToolMissing for the first that is not on the PATH."""
    for program in programs:
        if shutil.which(program) is None:
            package = _PACKAGES.get(program, program)
            raise ToolMissing(
                f"the program {program} is not on the PATH",
                remedy=f"install it (on Debian and Ubuntu: apt-get install {package}); as root, "
                "have /usr/sbin and /sbin on the PATH",
            )


def require_root() -> None:
    """Raises PrivilegeMissing."""
    if os.geteuid() != 0:
        raise PrivilegeMissing("network namespaces and shaped links need root, and this process runs as a user")


def _complaint(command: str, said: str) -> NodeError:
    cause = f"`{command}` failed: {' '.join(said.split())}"
    if any(words in said for words in _NOT_PERMITTED):
        return PrivilegeMissing(cause, remedy="run it as root; in a container, add the capability NET_ADMIN")
    if any(words in said for words in _NOT_KNOWN):
        return KernelLacks(cause)
    return LabFailed(cause)
