"""The lab of namespaces: links are as slow as asked, a refusal is one clear error, and nothing is ever left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.lab import left_by, needs_lab

from node.errors import ConfigInvalid, KernelLacks, LabFailed, NodeError
from node.lab.namespaces import NamespaceLab, remove_stale
from node.lab.shapes import UNSHAPED, LinkShape
from node.lab.shaping import Shaper

pytestmark = [pytest.mark.processes, pytest.mark.root, needs_lab]

TALK = """
import socket, sys
place = (sys.argv[2], 4000)
if sys.argv[1] == "serve":
    with socket.create_server(place) as server:
        print("up", flush=True)
        with server.accept()[0] as stream:
            while data := stream.recv(1 << 16):
                stream.sendall(data[-1:])
else:
    import time
    with socket.create_connection(place) as stream:
        for line in sys.stdin:
            started, size = time.monotonic(), int(line)
            stream.sendall(b"x" * (size - 1))
            stream.sendall(b"y")
            while not (data := stream.recv(1 << 16)).endswith(b"y"):
                pass
            print(time.monotonic() - started, flush=True)
"""


class Talk:
    """One connection from peer a to peer b."""

    def __init__(self, lab: NamespaceLab) -> None:
        self.server = self._start(lab, "b", "serve")
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "up\n"
        self.client = self._start(lab, "a", "talk")

    def _start(self, lab: NamespaceLab, name: str, role: str) -> subprocess.Popen[str]:
        argv = lab.command(name, [sys.executable, "-I", "-S", "-c", TALK, role, lab.address("b")])
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, size_bytes: int) -> float:
        """Until the last of so many bytes was answered."""
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(f"{size_bytes}\n")
        self.client.stdin.flush()
        return float(self.client.stdout.readline())

    def end(self) -> None:
        for process in (self.client, self.server):
            with process:
                process.kill()


@contextlib.contextmanager
def talk(lab: NamespaceLab) -> Iterator[Talk]:
    started = Talk(lab)
    try:
        yield started
    finally:
        started.end()


def own_system() -> list[str]:
    """Devices and queues of the machine's own namespace."""
    shown = json.loads(subprocess.check_output(["ip", "-json", "link"]))
    return [link["ifname"] for link in shown] + subprocess.check_output(["tc", "qdisc"], text=True).splitlines()


def delayers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if any("delayer.py" in part for part in _command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def test_a_link_is_as_slow_as_asked_and_can_be_changed_under_a_connection() -> None:
    """Lower bounds only: a busy machine can make a link slower than asked, nothing may make it faster."""
    before = own_system()
    with NamespaceLab(["a", "b"], LinkShape.of_round_trip(4, 60)) as lab, talk(lab) as talking:
        assert lab.shaping("a") in ("htb+netem", "htb+nfqueue")
        assert min(talking.seconds(1) for _ in range(3)) >= 0.060
        started = lab.counters("b")
        assert talking.seconds(500_000) >= 0.8  # 1 s at 4 Mbit/s; the first tenths are the buckets' and the buffer's
        crossed = lab.counters("b").since(started)
        assert 500_000 < crossed.rx_bytes < 600_000
        assert 0 < crossed.tx_bytes < 100_000

        lab.reshape("b", LinkShape(rate_mbit=1, delay_ms=90))
        assert talking.seconds(1) >= 0.120
        assert talking.seconds(100_000) >= 0.6
        for name in ("a", "b"):
            lab.reshape(name, UNSHAPED)
        assert lab.shaping("b") == "none"
        assert talking.seconds(1) < 60
        assert not delayers_of(os.getpid())
    assert not left_by(os.getpid())
    assert own_system() == before


def test_loss_loses_packets_and_connections_survive_it() -> None:
    with NamespaceLab(["a", "b"], {"a": UNSHAPED, "b": LinkShape(loss=0.2)}) as lab:
        assert lab.shaping("b") in ("netem", "statistic")
        sender, receiver = (sys.executable, "-I", "-S", "-c", SEND), (sys.executable, "-I", "-S", "-c", COUNT)
        counting = subprocess.Popen(lab.command("b", [*receiver, lab.address("b")]), stdout=subprocess.PIPE, text=True)
        with counting:
            assert counting.stdout is not None
            assert counting.stdout.readline() == "up\n"
            subprocess.check_call(lab.command("a", [*sender, lab.address("b")]))
            arrived = int(counting.stdout.readline())
        assert 600 < arrived < 950  # of 1000, 800 are to be expected: more than six deviations away


SEND = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
    for number in range(1000):
        out.sendto(b"x", (sys.argv[1], 4000))
        if number % 20 == 0:
            time.sleep(0.001)
    time.sleep(0.2)
    for _ in range(50):
        out.sendto(b"end", (sys.argv[1], 4000))
"""
COUNT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inlet:
    inlet.bind((sys.argv[1], 4000))
    print("up", flush=True)
    number = 0
    while inlet.recv(100) != b"end":
        number += 1
    print(number)
"""


def test_delay_by_netem_works_or_is_refused_and_leaves_nothing() -> None:
    lab = NamespaceLab(["a"], LinkShape(delay_ms=1), delay_by="netem")
    try:
        with lab:
            assert lab.shaping("a") == "netem"
    except KernelLacks as error:
        assert "netem" in error.cause
    assert not left_by(os.getpid())


def test_an_exception_inside_removes_all() -> None:
    with pytest.raises(ZeroDivisionError), NamespaceLab(["a"], LinkShape(rate_mbit=1, delay_ms=1)):
        raise ZeroDivisionError
    assert not left_by(os.getpid())


def test_a_second_lab_of_one_process_is_refused_and_the_first_stays() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab:
        with pytest.raises(LabFailed, match="has a lab already"):
            NamespaceLab(["b"], UNSHAPED).__enter__()
        assert subprocess.check_output(lab.command("a", ["echo", "here"])) == b"here\n"


def test_an_unknown_interface_is_refused_with_those_that_there_are() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab, pytest.raises(ConfigInvalid, match=r"'nosuch0'; there are: lo, eth0"):
        Shaper("nosuch0", lab.tools("a")).apply(LinkShape(rate_mbit=1))


# -- as a program: what people run and what they are told ---------------------------------------------------------

OWNER = """
import sys, time
from node.errors import NodeError, describe
from node.lab.namespaces import NamespaceLab
from node.lab.shapes import LinkShape
try:
    with NamespaceLab(["a", "b"], LinkShape(rate_mbit=10, delay_ms=5)):
        print("ready", flush=True)
        time.sleep(100)
except NodeError as error:
    sys.exit(describe(error))
"""


def start_owner(**options: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", OWNER]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def ready_owner() -> Iterator[subprocess.Popen[str]]:
    with start_owner() as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        yield owner


def test_sigterm_removes_all() -> None:
    with ready_owner() as owner:
        owner.terminate()
        assert owner.wait(30) == 128 + signal.SIGTERM
    assert not left_by(owner.pid)


def test_after_sigkill_nothing_runs_and_the_next_lab_removes_the_rest() -> None:
    with ready_owner() as owner:
        delayers = delayers_of(owner.pid)
        inside = subprocess.Popen(["ip", "netns", "exec", f"resbm-{owner.pid}-a", "sleep", "100"])
        assert remove_stale() == [], "nothing of a living owner is stale"
        owner.kill()
        owner.wait(30)
    assert not psutil.wait_procs(delayers, timeout=10)[1]
    with NamespaceLab(["a"], UNSHAPED):
        assert not left_by(owner.pid)
        assert not psutil.pid_exists(inside.pid)
    inside.wait()


def refusal(**options: object) -> list[str]:
    with start_owner(**options) as owner:
        errors = owner.communicate(timeout=60)[1]
    assert owner.returncode == 1
    assert not left_by(owner.pid)
    return errors.splitlines()


def test_without_root_a_lab_is_refused() -> None:
    done = os.fork()  # not Popen(user=...): a user may be unable to read this Python
    if done == 0:
        os.setresuid(65534, 65534, 65534)
        try:
            NamespaceLab(["a"], UNSHAPED).__enter__()
        except NodeError as error:
            os._exit(error.code)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(done, 0)[1]) == 110
    assert not left_by(done)


def test_without_tools_a_lab_is_refused(tmp_path: Path) -> None:
    lines = refusal(env={**os.environ, "PATH": str(tmp_path)})
    assert lines[0] == "error E111: the program ip is not on the PATH"
    assert "iproute2" in lines[1]


def test_a_kernel_without_htb_is_told_from_other_failures_and_what_was_made_is_removed(tmp_path: Path) -> None:
    """`tc` here is a script that runs the real one, but answers for htb as it does where the kernel lacks it."""
    for answer, told in (
        (
            "Error: Specified qdisc kind is unknown.",
            "error E112: `tc qdisc add dev ifb-eth0 root handle 1: htb default 1`",
        ),
        ("RTNETLINK answers: Device or resource busy", "error E113: `tc qdisc add dev ifb-eth0 root handle 1: htb"),
    ):
        script = f'#!/bin/sh\ncase "$*" in *htb*) echo "{answer}" >&2; exit 2;; esac\nexec {shutil.which("tc")} "$@"\n'
        (tmp_path / "tc").write_text(script)
        (tmp_path / "tc").chmod(0o755)
        lines = refusal(env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
        assert lines[0].startswith(told)
        assert lines[0].endswith(answer)
        assert len(lines) == 2


# -- python -m node.lab.shape: what a container's entrypoint does ---------------------------------------------------


def shape_program(lab: NamespaceLab, *arguments: object) -> subprocess.Popen[str]:
    argv = lab.command("a", [sys.executable, "-m", "node.lab.shape", *map(str, arguments)])
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def queues(lab: NamespaceLab) -> str:
    return lab.tools("a").run("tc class show dev eth0")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_command_runs_as_a_user_on_a_link_that_follows_its_file(tmp_path: Path) -> None:
    links, status = tmp_path / "lab.toml", tmp_path / "link.json"
    links.write_text("[default]\nrate_mbit = 20\n")
    with NamespaceLab(["a"], UNSHAPED) as lab:
        files = ("--links", links, "--peer", "a", "--status", status)
        with shape_program(lab, *files, "--user", "nobody", "--", "sh", "-c", "id -un; read answer; exit 3") as program:
            assert program.stdin is not None
            assert program.stdout is not None
            assert program.stdout.readline() == "nobody\n"
            assert "rate 20Mbit" in queues(lab)
            links.write_text("[default]\nrate_mbit = -1\n")
            assert program.stderr is not None
            while "error E102" not in (line := program.stderr.readline()):
                assert line
            assert "rate 20Mbit" in queues(lab)  # a mistake in the file changes nothing
            links.write_text("[default]\nrate_mbit = 20\n[peers.a]\nrate_mbit = 2\n")
            wait_until(lambda: "rate 2Mbit" in queues(lab))
            wait_until(lambda: json.loads(status.read_text())["rate_mbit"] == 2)
            assert json.loads(status.read_text())["mechanism"] == "htb"
            program.stdin.close()
            assert program.wait(30) == 3
        assert not queues(lab)


def test_sigterm_is_the_commands_to_answer() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab:
        told = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done"
        with shape_program(lab, "--rate-mbit", 20, "--", "sh", "-c", told) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "up\n"
            program.terminate()
            assert program.communicate(timeout=30)[0] == "bye\n"
        assert program.returncode == 0
        assert not queues(lab)


def test_an_unknown_user_or_program_leaves_the_link_as_it_was() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab:
        for arguments in (("--user", "nobody-knows", "--", "true"), ("--", "no-such-program")):
            with shape_program(lab, "--rate-mbit", 20, *arguments) as program:
                said = program.communicate(timeout=30)[1]
            assert program.returncode == 2
            assert "error E102" in said
            assert not queues(lab)


def test_an_unknown_interface_is_told_in_one_line_with_those_that_there_are() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab:
        assert refused_shape(lab, "--interface", "nosuch0", "--rate-mbit", 20).startswith(
            "error E102: there is no network interface 'nosuch0'; there are: lo, eth0"
        )


def test_queues_of_somebody_else_are_refused_and_stay() -> None:
    with NamespaceLab(["a"], UNSHAPED) as lab:
        lab.tools("a").run("tc qdisc add dev eth0 root handle 8001: pfifo limit 7")
        said = refused_shape(lab, "--rate-mbit", 20)
        assert said.startswith("error E102: eth0 has queues that are not ours: pfifo 8001:")
        assert "pfifo 8001: root" in lab.tools("a").run("tc qdisc show dev eth0")


def test_without_the_capability_a_link_stays_as_it_is() -> None:
    bare = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    with NamespaceLab(["a"], UNSHAPED) as lab:
        said = refused_shape(lab, "--rate-mbit", 20, through=bare)
        assert said.startswith("error E110: ") and "NET_ADMIN" in said


@pytest.mark.parametrize(
    ("tool", "asked", "answer", "link"),
    [
        ("ip", "*type?ifb*", "Error: Unknown device type.", ("--rate-mbit", 20)),
        ("tc", "*htb*", "Error: Specified qdisc kind is unknown.", ("--rate-mbit", 20)),
        ("iptables-restore", "*", "iptables-restore: line 3 failed: No chain/target/match", ("--delay-ms", 5)),
    ],
)
def test_a_kernel_that_lacks_something_is_told_and_nothing_is_left(
    tool: str, asked: str, answer: str, link: tuple[object, ...], tmp_path: Path
) -> None:
    """The tools here are scripts that run the real ones, but answer for what is asked as where the kernel lacks it."""
    answers = {"tc": ("*netem*", "Error: Specified qdisc kind is unknown."), tool: (asked, answer)}
    for name, (pattern, said) in answers.items():  # without netem in any case, so that a delay needs iptables
        script = (
            f'#!/bin/sh\ncase "$*" in {pattern}) echo "{said}" >&2; exit 2;; esac\nexec {shutil.which(name)} "$@"\n'
        )
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    with NamespaceLab(["a"], UNSHAPED) as lab:
        path = f"PATH={tmp_path}{os.pathsep}{os.environ['PATH']}"
        assert refused_shape(lab, *link, through=("env", path)).startswith("error E112: ")


def refused_shape(lab: NamespaceLab, *arguments: object, through: tuple[str, ...] = ()) -> str:
    """What a shape program that is refused says, in two lines; links, queues and packet rules are as before."""

    def present() -> list[str]:
        tools = lab.tools("a")
        link = json.loads(tools.run("ip -json link show"))
        rules = [line for line in tools.run("iptables-save -t mangle").splitlines() if line.startswith("-")]
        return [*(entry["ifname"] for entry in link), tools.run("tc qdisc show dev eth0"), *rules]

    before = present()
    argv = lab.command("a", [*through, sys.executable, "-m", "node.lab.shape", *map(str, arguments), "--", "true"])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert present() == before
    return done.stderr


def test_queues_that_are_gone_are_made_again() -> None:
    """As when an interface leaves and comes back under the same name."""
    with NamespaceLab(["a"], UNSHAPED) as lab:
        shaper, tools = Shaper("eth0", lab.tools("a")), lab.tools("a")
        shaper.apply(LinkShape(rate_mbit=20))
        for command in ("tc qdisc del dev eth0 root", "tc qdisc del dev eth0 ingress"):
            assert shaper.is_in_force()
            tools.run(command)
            assert not shaper.is_in_force()
            shaper.apply(LinkShape(rate_mbit=20))
        assert "rate 20Mbit" in queues(lab) and shaper.is_in_force()
        shaper.clear()
        assert not queues(lab) and "ifb-eth0" not in tools.run("ip link show")
