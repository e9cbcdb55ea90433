"""Averagers that meet for the first time over links with a delay, all at one moment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from node.lab.namespaces import NamespaceLab
from node.lab.shapes import LinkShape

pytestmark = pytest.mark.processes

MEMBER = Path(__file__).with_name("averaging_member.py")
NAMES = ("a", "b", "c")


def told(member: subprocess.Popen[str]) -> dict[str, str]:
    assert member.stdout is not None
    answer: dict[str, str] = json.loads(member.stdout.readline())
    return answer


def order(member: subprocess.Popen[str], **values: object) -> None:
    assert member.stdin is not None
    member.stdin.write(json.dumps(values) + "\n")
    member.stdin.flush()


@pytest.mark.root
@pytest.mark.timeout(100)
def test_members_that_meet_at_one_moment_over_80_ms_do_not_dial_past_each_other() -> None:
    with NamespaceLab(NAMES, LinkShape.of_round_trip(80.0, 80.0)) as lab:
        commands = [lab.command(name, [sys.executable, str(MEMBER), lab.address(name)]) for name in NAMES]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        members = [subprocess.Popen(command, **pipes) for command in commands]  # type: ignore[call-overload]
        try:
            for meeting in range(3):  # each time new averagers, which have never met
                addresses = [told(member)["address"] for member in members]
                at = time.time() + 0.2
                for member in members:
                    order(member, key=f"meeting {meeting}", members=addresses, at=at)
                assert [told(member)["failure"] for member in members] == ["", "", ""]
                for member in members:
                    order(member)
        finally:
            for member in members:
                member.kill()
                member.communicate()
