"""The machine's own network while a container engine runs that we started: afterwards it is as it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from node.errors import NodeError
from node.lab.tools import Tools

_RULES = (("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore"))
_OF_DOCKER = re.compile(r"\bDOCKER\b|\bdocker0\b|\bbr-[0-9a-f]{12}\b")
_FORWARDING = (Path("/proc/sys/net/ipv4/ip_forward"), Path("/proc/sys/net/ipv6/conf/all/forwarding"))
_BRIDGE = "docker0"
_ACCEPT = "ACCEPT"  # what the kernel does with packets that no rule names


@contextlib.contextmanager
def network_as_before(say: Callable[[str], None]) -> Iterator[None]:
    """What dockerd does to the machine's network and leaves behind is undone: its rules, forwarding, its bridge.

    Where Docker has left something there already, all of it stays: nobody knows whose it is.
    """
    tools = Tools()
    rules_before = {save: _rules(tools, save) for save, _ in _RULES}
    if _has_bridge() or any(map(_OF_DOCKER.search, rules_before.values())):
        yield
        return
    forwarding = [(path, path.read_text()) for path in _FORWARDING if path.exists()]
    try:
        yield
    finally:
        for save, restore in _RULES:
            if undone := undoing_docker(_rules(tools, save), rules_before[save]):
                try:
                    tools.run(f"{restore} --noflush --wait", stdin=undone)
                except NodeError as error:
                    say(f"Docker's packet rules are still there: {error.cause}")
        for path, text in forwarding:
            with contextlib.suppress(OSError):
                path.write_text(text)
        if _has_bridge():
            tools.accepts(f"ip link del {_BRIDGE}")


def undoing_docker(rules: str, before: str) -> str:
    """What `iptables-restore --noflush` is told to remove Docker's chains and all rules that name them or its bridges.

    FORWARD gets the policy of `before`, which Docker changes. Everything else stays as it is now, counters too. Both
    as iptables-save prints them.
    """
    policies = {table: _forward_policy(lines) for table, lines in _tables(before)}
    told = []
    for table, lines in _tables(rules):
        chains = [line[1:].split()[0] for line in lines if line.startswith(":") and _OF_DOCKER.search(line)]
        named = [line.split(maxsplit=2) for line in lines if line.startswith("-A ") and _OF_DOCKER.search(line)]
        undone = [f"-D {chain} {rule}" for _, chain, rule in named if chain not in chains]
        undone += [f"-F {chain}" for chain in chains] + [f"-X {chain}" for chain in chains]
        policy = policies.get(table, _ACCEPT)
        if table == "filter" and _forward_policy(lines) != policy:
            undone.insert(0, f":FORWARD {policy} [0:0]")
        if undone:
            told += [f"*{table}", *undone, "COMMIT"]
    return "\n".join([*told, ""]) if told else ""


def _tables(rules: str) -> Iterator[tuple[str, list[str]]]:
    """Each table's name and lines."""
    for part in re.split(r"^\*", rules, flags=re.MULTILINE)[1:]:
        table, *lines = part.splitlines()
        yield table, lines


def _forward_policy(lines: Sequence[str]) -> str:
    return next((line.split()[1] for line in lines if line.startswith(":FORWARD ")), _ACCEPT)


def _rules(tools: Tools, save: str) -> str:
    """What the packet filter has; nothing where there is none."""
    try:
        return tools.run(save)
    except NodeError:
        return ""


def _has_bridge() -> bool:
    return Path("/sys/class/net", _BRIDGE).exists()
