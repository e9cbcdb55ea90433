"""Shapes this machine's (or container's) link for as long as a command runs.

    python -m node.lab.shape --rate-mbit 80 --delay-ms 50 -- resbm-node join resbm1...
    python -m node.lab.shape --links lab.toml --peer peer-1 --user resbm -- resbm-node join resbm1...

It needs root or CAP_NET_ADMIN; the command can be run as another user. Without a command it shapes until SIGTERM or
Ctrl+C. A change of the links file takes effect at once, and an interface that returns under another name (a container
that left its network and came back) is shaped again. At the end the link is as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from node.errors import ConfigInvalid, NodeError, describe
from node.lab.links import read_links, shape_of_options
from node.lab.shapes import LinkShape
from node.lab.shaping import Shaper
from node.lab.signals import ending_on_signals
from node.lab.tools import Tools, require

EXIT_REFUSED = 2
_LOOK_SECONDS = 1.0


class LinkKeeper:
    """Keeps one link in the shape that its options or its links file asks for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tools = Tools()
        self._shaper: Shaper | None = None
        self._refused = ""

    def apply(self) -> None:
        """Shapes the link if it is not as asked for. Raises as `Shaper.apply`, `read_links` and `find_interface` do."""
        interface = self._options.interface or find_interface(self._tools)
        wanted = self._wanted()
        if self._shaper is None or self._shaper.interface != interface:
            if self._shaper is not None:
                self._shaper.clear()
            self._shaper = Shaper(interface, self._tools)
        elif self._shaper.shape == wanted and self._shaper.is_in_force():
            return
        self._shaper.apply(wanted)
        self._tell()

    def look_again(self) -> None:
        """As `apply`, in the middle of a run: what cannot be done is said once, and the link stays as it is."""
        try:
            self.apply()
            self._refused = ""
        except NodeError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                _say(describe(error))

    def clear(self) -> None:
        """Removes the shape."""
        if self._shaper is not None:
            self._shaper.clear()

    def _wanted(self) -> LinkShape:
        options = self._options
        if options.links is not None:
            return read_links(options.links).of(options.peer)
        return shape_of_options(
            "command line", rate_mbit=options.rate_mbit, delay_ms=options.delay_ms, loss=options.loss
        )

    def _tell(self) -> None:
        """On stderr, and for other programs in the status file."""
        assert self._shaper is not None
        shape, interface, mechanism = self._shaper.shape, self._shaper.interface, self._shaper.mechanism
        _say(f"link of {self._options.peer} ({interface}): {shape}; by {mechanism}")
        if self._options.status is not None:
            status = {"interface": interface, "mechanism": mechanism, **shape.model_dump()}
            self._options.status.write_text(json.dumps(status) + "\n")


def find_interface(tools: Tools) -> str:
    """The one interface with an IPv4 address, the loopback apart. Raises ConfigInvalid: there is none, or several."""
    require("ip")
    shown: list[dict[str, Any]] = json.loads(tools.run("ip -json -4 address show up") or "[]")
    names = [link["ifname"] for link in shown if link.get("addr_info") and "LOOPBACK" not in link.get("flags", [])]
    if len(names) != 1:
        raise ConfigInvalid(
            f"{len(names)} network interfaces have an address: {', '.join(names) or 'none'}",
            remedy="name the one to shape with --interface",
        )
    return str(names[0])


def run(options: argparse.Namespace) -> int:
    """The command's exit status; 128 + signal number when a signal ended it. Raises NodeError."""
    keeper = LinkKeeper(options)
    with ending_on_signals():
        try:
            keeper.apply()
            with _passing_signals() as signals, _start(options) as command:
                signals.go_to(command)
                while _is_running(command):
                    keeper.look_again()
                return command.returncode if command.returncode >= 0 else 128 - command.returncode
        finally:
            keeper.clear()


def _start(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The command, or something that lasts until it is ended. Raises ConfigInvalid."""
    argv = options.command or ["sleep", "infinity"]
    try:
        return subprocess.Popen(argv, **_identity_of(options.user))
    except OSError as error:
        raise ConfigInvalid(
            f"cannot run {argv[0]} as {options.user or 'this user'}: {error.strerror}",
            remedy="name a program that is there, and with --user one whom this process may become",
        ) from None


def _identity_of(user: str | None) -> dict[str, Any]:
    """What makes Popen run a command as `user`, without other groups. Raises ConfigInvalid."""
    if user is None:
        return {}
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ConfigInvalid(f"there is no user {user!r}", remedy="name a user of this system with --user") from None
    home = {**os.environ, "HOME": entry.pw_dir, "USER": user}
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": [], "env": home}


class _Signals:
    """SIGTERM and SIGINT are the command's to answer; those that come while it starts wait for it."""

    def __init__(self) -> None:
        self._command: subprocess.Popen[bytes] | None = None
        self._waiting: list[int] = []

    def heard(self, number: int, _: FrameType | None) -> None:
        if self._command is None:
            self._waiting.append(number)
        else:
            self._command.send_signal(number)

    def go_to(self, command: subprocess.Popen[bytes]) -> None:
        self._command = command
        for number in self._waiting:
            command.send_signal(number)


@contextlib.contextmanager
def _passing_signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals.heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_running(command: subprocess.Popen[bytes]) -> bool:
    """Waits a moment."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(_LOOK_SECONDS)
    return command.poll() is None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m node.lab.shape",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    link = parser.add_argument_group("the link")
    link.add_argument("--rate-mbit", type=float, help="Mbit/s, up and down each; default: not limited")
    link.add_argument("--delay-ms", type=float, default=0.0, help="one way, of what enters; default: %(default)g")
    link.add_argument("--loss", type=float, default=0.0, help="share of packets dropped of what enters")
    link.add_argument("--links", type=Path, metavar="FILE", help="take these from a links file instead")
    link.add_argument("--peer", default=os.uname().nodename, help="name in the links file; default: the host's")
    link.add_argument("--interface", help="default: the only one with an address")
    parser.add_argument("--user", help="run the command as this user")
    parser.add_argument("--status", type=Path, metavar="FILE", help="write what is in force here, as JSON")
    parser.add_argument("command", nargs="*", help="what to run; default: nothing, until SIGTERM")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        status = run(options)
    except NodeError as error:
        _say(describe(error))
        status = EXIT_REFUSED
    sys.exit(status)


if __name__ == "__main__":
    main()
