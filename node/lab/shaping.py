"""How the kernel is told what a link is like.

    leaving    ── htb on the interface: rate
    entering   ── ingress ── ifb: htb (rate) ─┬─ netem: delay, loss                        where the kernel has netem
                                              └─ iptables mangle: statistic (loss), NFQUEUE to a delayer (delay)

Rates are limited in both directions; delay and loss are given to what enters. The functions on top say which commands
that takes; `Shaper` runs them, and again when the shape changes: queues are changed in place, so that no connection is
lost.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from coordinator.children import be_killed_with_parent
from node.errors import ConfigInvalid, KernelLacks, LabFailed, PrivilegeMissing, ToolMissing
from node.lab import delayer
from node.lab.shapes import UNSHAPED, LinkShape
from node.lab.tools import Tools

DelayBy = Literal["auto", "netem", "nfqueue"]

CHAIN = "RESBM-LAB"
_LINE_RATE_MBIT = 100_000.0  # what an unlimited link is told where netem needs a class to hang on
_BUFFER_SECONDS = 0.2  # a link's buffer holds what it carries in this time, as home routers do; then it drops
_MIN_BUFFER_BYTES = 1 << 17  # room for a batch of segments (GSO, 64 KiB) on its way and one behind it
_PACKET_BYTES = 1514
_MAX_BATCH_SEGMENTS = 65535
_START_SECONDS = 20.0
_DRAIN_SECONDS = 15.0  # more than the longest delay


def ifb_of(interface: str) -> str:
    """The device through which all that enters `interface` is led."""
    return f"ifb-{interface}"[:15]


def bytes_per_second(rate_mbit: float) -> float:
    return rate_mbit * 1e6 / 8


def buffer_bytes(rate_mbit: float) -> int:
    """How much may wait for a link."""
    return max(_MIN_BUFFER_BYTES, int(bytes_per_second(rate_mbit) * _BUFFER_SECONDS))


def htb_commands(device: str, rate_mbit: float, leaf: str, *, present: bool) -> Iterator[str]:
    """Limits what leaves `device`; `leaf` is the queue behind the limit. `present`: it has a limit already."""
    if not present:
        yield f"tc qdisc add dev {device} root handle 1: htb default 1"
    rate = f"{round(rate_mbit * 1e6)}bit"
    yield f"tc class replace dev {device} parent 1: classid 1:1 htb rate {rate} ceil {rate} quantum 15000"
    yield f"tc qdisc replace dev {device} parent 1:1 handle 10: {leaf}"


def fifo(rate_mbit: float) -> str:
    """A plain queue with the link's buffer."""
    return f"bfifo limit {buffer_bytes(rate_mbit)}"


def netem(shape: LinkShape) -> str:
    """A queue that delays and drops; its limit counts packets and has room for what the delay keeps under way."""
    seconds = shape.delay_ms / 1e3 + _BUFFER_SECONDS
    limit = 1000 + int(bytes_per_second(shape.rate_mbit or _LINE_RATE_MBIT) * seconds / _PACKET_BYTES)
    loss = f" loss {100 * shape.loss:g}%" if shape.loss else ""
    return f"netem limit {limit} delay {shape.delay_ms:g}ms{loss}"


def redirect_commands(interface: str) -> Iterator[str]:
    """Leads what enters `interface` through its ifb device."""
    ifb = ifb_of(interface)
    yield f"ip link add {ifb} type ifb"
    yield f"ip link set {ifb} up"
    yield f"tc qdisc add dev {interface} handle ffff: ingress"
    yield (
        f"tc filter add dev {interface} parent ffff: protocol all prio 1 "
        f"u32 match u32 0 0 action mirred egress redirect dev {ifb}"
    )


def packet_rules(interface: str, loss: float, queue: int | None) -> str:
    """Our chain for `iptables-restore --noflush`, which replaces it at one stroke. `queue` None: nothing is delayed."""
    rules = [f":{CHAIN} - [0:0]"]
    if loss:
        rules.append(f"-A {CHAIN} -i {interface} -m statistic --mode random --probability {loss:.9f} -j DROP")
    if queue is not None:
        rules.append(f"-A {CHAIN} -i {interface} -j NFQUEUE --queue-num {queue} --queue-bypass")
    return "\n".join(["*mangle", *rules, "COMMIT", ""])


class Shaper:
    """Shapes one interface. It needs CAP_NET_ADMIN in the interface's namespace.

    Call it in the main thread: delayers die with the thread that starts them.
    """

    def __init__(self, interface: str, tools: Tools | None = None, delay_by: DelayBy = "auto") -> None:
        """`delay_by`: what delays and drops; auto takes netem if the kernel has it."""
        self.interface = interface
        self._tools = tools or Tools()
        self._delay_by = delay_by
        self._delayer: subprocess.Popen[str] | None = None
        self._queue: int | None = None
        self._touched = False  # something was applied
        self._has_queues = False  # from then on the interface's queues and the ifb device are ours
        self._batches_before: int | None = None  # segments in a batch, where we have changed it
        self.shape = UNSHAPED

    @property
    def mechanism(self) -> str:
        """What is at work, such as 'htb+nfqueue'; 'none' for an unshaped link."""
        shape, by_netem = self.shape, self._delay_by == "netem"
        parts = {
            "htb": shape.rate_mbit is not None,
            "netem": by_netem and bool(shape.delay_ms or shape.loss),
            "nfqueue": not by_netem and bool(shape.delay_ms),
            "statistic": not by_netem and bool(shape.loss),
        }
        return "+".join(name for name, active in parts.items() if active) or "none"

    def apply(self, shape: LinkShape) -> None:
        """Gives the interface this shape. On an error the caller clears.

        Raises:
            ConfigInvalid: there is no such interface, or somebody else has given it queues.
            PrivilegeMissing, ToolMissing, KernelLacks, LabFailed: as node.lab.tools says.
        """
        self._require_interface()
        self._choose_delay(shape)
        if self._is_led(shape) and not self._has_queues:
            self._require_no_other_queues()
        self._touched = True
        self._has_queues |= self._is_led(shape) or self._has_ifb()
        if self._has_queues:
            self._limit_entering(shape)  # first: by our ifb device all queues are known as ours
            self._limit_leaving(shape)
        self._filter_entering(LinkShape() if self._is_by_netem(shape) else shape)
        self._batch(whole=not shape.loss)
        self.shape = shape

    def clear(self) -> None:
        """Removes all that `apply` made, and nothing else. What is gone already is no error."""
        if not self._touched:
            return
        if self._has_queues:
            if self._has_interface() and self._has_htb(self.interface):
                self._tools.accepts(f"tc qdisc del dev {self.interface} root")
            self._remove_redirect()
        self._remove_chain()
        self._replace_delayer(None, None)
        self._batch(whole=True)
        self._touched = self._has_queues = False
        self.shape = UNSHAPED

    def stop(self) -> None:
        """Ends the delayer at once and leaves the rest to whoever removes the whole namespace."""
        if self._delayer is not None:
            with self._delayer as process:
                process.kill()
            self._delayer = None

    def is_in_force(self) -> bool:
        """False when a delayer is needed and has died, or the queues are gone, as of an interface that came back."""
        if self._delayer is not None and self._delayer.poll() is not None:
            return False
        is_limited, is_led = self.shape.rate_mbit is not None, self._is_led(self.shape)
        return (not is_limited or self._has_htb(self.interface)) and (not is_led or self._has_redirect())

    def _require_interface(self) -> None:
        if not self._has_interface():
            listed = self._tools.run("ip -brief link show")  # also tells a missing privilege from a missing interface
            names = ", ".join(line.split()[0].partition("@")[0] for line in listed.splitlines())
            raise ConfigInvalid(
                f"there is no network interface {self.interface!r}; there are: {names}",
                remedy="name one of those that are there",
            )

    def _has_interface(self) -> bool:
        return self._tools.accepts(f"ip link show dev {self.interface}")

    def _require_no_other_queues(self) -> None:
        """The system's default queues have no handle. Ours, which a killed shaper may have left, come with our ifb."""
        shown = self._tools.run(f"tc qdisc show dev {self.interface}").splitlines()
        queues = [line.split()[1:3] for line in shown if line.startswith("qdisc ")]  # kind, handle
        others = [" ".join(queue) for queue in queues if queue[1] != "0:"]
        if others and not self._has_ifb():
            raise ConfigInvalid(
                f"{self.interface} has queues that are not ours: {', '.join(others)}",
                remedy=f"name another interface, or remove them: tc qdisc del dev {self.interface} root (or ingress)",
            )

    def _choose_delay(self, shape: LinkShape) -> None:
        """Tries netem once, on the loopback device and for a moment, when it is first needed."""
        if self._delay_by == "auto" and (shape.delay_ms or shape.loss):
            accepted = self._tools.accepts("tc qdisc add dev lo root netem delay 1ms")
            if accepted:
                self._tools.run("tc qdisc del dev lo root")
            self._delay_by = "netem" if accepted else "nfqueue"

    def _is_by_netem(self, shape: LinkShape) -> bool:
        return self._delay_by == "netem" and bool(shape.delay_ms or shape.loss)

    def _is_led(self, shape: LinkShape) -> bool:
        """Whether what enters has to go through the ifb device."""
        return shape.rate_mbit is not None or self._is_by_netem(shape)

    def _limit_leaving(self, shape: LinkShape) -> None:
        present = self._has_htb(self.interface)
        if shape.rate_mbit is not None:
            self._run_all(htb_commands(self.interface, shape.rate_mbit, fifo(shape.rate_mbit), present=present))
        elif present:
            self._tools.run(f"tc qdisc del dev {self.interface} root")

    def _limit_entering(self, shape: LinkShape) -> None:
        ifb = ifb_of(self.interface)
        if not self._is_led(shape):
            self._remove_redirect()
            return
        if not self._has_redirect():
            self._remove_redirect()  # half of it may be there
            self._run_all(redirect_commands(self.interface))
        rate_mbit = shape.rate_mbit or _LINE_RATE_MBIT
        leaf = netem(shape) if self._is_by_netem(shape) else fifo(rate_mbit)
        self._run_all(htb_commands(ifb, rate_mbit, leaf, present=self._has_htb(ifb)))

    def _filter_entering(self, shape: LinkShape) -> None:
        """The new delayer is there before a packet is sent to it; the old one lets through what it holds, then ends."""
        if not (shape.delay_ms or shape.loss):
            self._remove_chain()
            self._replace_delayer(None, None)
            return
        queue = (2 if self._queue == 1 else 1) if shape.delay_ms else None
        fresh = None if queue is None else self._start_delayer(queue, shape.delay_ms)
        try:
            self._install_chain(packet_rules(self.interface, shape.loss, queue))
        except BaseException:
            if fresh is not None:
                _end(fresh)
            raise
        self._replace_delayer(fresh, queue)

    def _install_chain(self, rules: str) -> None:
        try:
            self._tools.run("iptables-restore --noflush --wait", stdin=rules)
        except LabFailed as error:
            raise KernelLacks(f"no netem, and iptables refused the NFQUEUE or statistic rules: {error.cause}") from None
        if not self._tools.accepts(f"iptables --wait -t mangle -C PREROUTING -j {CHAIN}"):
            self._tools.run(f"iptables --wait -t mangle -A PREROUTING -j {CHAIN}")

    def _remove_chain(self) -> None:
        try:
            if self._tools.accepts(f"iptables --wait -t mangle -D PREROUTING -j {CHAIN}"):
                self._tools.run(f"iptables --wait -t mangle -F {CHAIN}")
            self._tools.accepts(f"iptables --wait -t mangle -X {CHAIN}")
        except ToolMissing:  # then there are no rules of ours
            pass

    def _start_delayer(self, queue: int, delay_ms: float) -> subprocess.Popen[str]:
        """A delayer that is ready. Raises PrivilegeMissing, KernelLacks."""
        program = str(Path(delayer.__file__).resolve())
        argv = [sys.executable, "-I", "-S", program, "--queue", str(queue), "--delay-ms", str(delay_ms)]
        owner = os.getpid()
        process = subprocess.Popen(
            self._tools.inside(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: be_killed_with_parent(owner, signal.SIGKILL),  # noqa: PLW1509 - one prctl, nothing else
        )
        assert process.stdout is not None  # for the type checker: it was asked for
        spoke = bool(select.select([process.stdout], [], [], _START_SECONDS)[0])
        if spoke and process.poll() is None and process.stdout.readline().strip() == "ready":
            return process
        process.kill()
        said = " ".join(process.communicate()[1].split()) or f"silent for {_START_SECONDS:.0f} s"
        if "not permitted" in said:
            raise PrivilegeMissing(said, remedy="run it as root; in a container, add the capability NET_ADMIN")
        raise KernelLacks(f"no netem, and the delayer could not start: {said}")

    def _replace_delayer(self, fresh: subprocess.Popen[str] | None, queue: int | None) -> None:
        old, self._delayer, self._queue = self._delayer, fresh, queue
        if old is not None:
            _end(old)

    def _batch(self, *, whole: bool) -> None:
        """Batches of segments (GSO) that leave here would be lost whole by whoever loses packets: with loss, none."""
        if whole and self._batches_before is not None:
            self._tools.accepts(f"ip link set dev {self.interface} gso_max_segs {self._batches_before}")
            self._batches_before = None
        elif not whole:
            if self._batches_before is None:
                shown = json.loads(self._tools.run(f"ip -json -details link show dev {self.interface}"))
                before = shown[0].get("gso_max_segs", _MAX_BATCH_SEGMENTS)
                self._batches_before = before if before > 1 else _MAX_BATCH_SEGMENTS  # 1: a killed shaper's
            self._tools.accepts(f"ip link set dev {self.interface} gso_max_segs 1")

    def _has_redirect(self) -> bool:
        """Whether what enters goes through the ifb device."""
        led = "qdisc ingress ffff:" in self._tools.run(f"tc qdisc show dev {self.interface}") and self._has_ifb()
        return led and "mirred" in self._tools.run(f"tc filter show dev {self.interface} parent ffff:")

    def _has_ifb(self) -> bool:
        return self._tools.accepts(f"ip link show dev {ifb_of(self.interface)}")

    def _remove_redirect(self) -> None:
        self._tools.accepts(f"tc qdisc del dev {self.interface} ingress")
        self._tools.accepts(f"ip link del {ifb_of(self.interface)}")

    def _has_htb(self, device: str) -> bool:
        return "qdisc htb 1: root" in self._tools.run(f"tc qdisc show dev {device}")

    def _run_all(self, commands: Iterator[str]) -> None:
        for command in commands:
            self._tools.run(command)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and time for what it holds to go through."""
    with process:  # closes its pipes
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
