"""Holds every packet of a netfilter queue back for a fixed time: a delay for kernels without netem.

    iptables -t mangle -A PREROUTING -i eth0 -j NFQUEUE --queue-num 1 --queue-bypass
    python delayer.py --queue 1 --delay-ms 50

It prints "ready" once packets are held back. SIGTERM ends it when what it holds is through. Only metadata comes here: a
packet, or a batch of segments (GSO) that travels as one, stays in the kernel until its verdict. All wait equally long,
so they leave in the order in which they came, and one verdict releases all that are due.

Put it on what *enters* a peer: on the way out, packets held back count against the sender's small queue
(TCP_SMALL_QUEUES), and a connection crawls.

Standard library only, and no import of ours: it starts in milliseconds, once per peer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque

# linux/netfilter/nfnetlink_queue.h
_NETLINK_NETFILTER = 12
_SUBSYSTEM_QUEUE = 3 << 8
_MSG_PACKET, _MSG_CONFIG, _MSG_VERDICT_BATCH = _SUBSYSTEM_QUEUE | 0, _SUBSYSTEM_QUEUE | 2, _SUBSYSTEM_QUEUE | 3
_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_CMD_BIND = 1
_COPY_META = 1
_FLAG_FAIL_OPEN, _FLAG_GSO = 1, 4
_VERDICT_HDR = 2
_NF_ACCEPT = 1

# linux/netlink.h, asm-generic/socket.h
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5
_SO_RCVBUFFORCE = 33

_MAX_HELD = 100_000  # packets; beyond it they pass at once
_BUFFER_BYTES = 16 << 20
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
_PACKET_ID_AT = 16 + 4 + 4  # after the netlink header, the nfnetlink header and the first attribute's own header


def message(kind: int, queue: int, attributes: bytes, *, acknowledge: bool = False) -> bytes:
    """One request to the netfilter queue subsystem."""
    body = struct.pack(">BBH", 0, 0, queue) + attributes
    flags = _NLM_F_REQUEST | (_NLM_F_ACK if acknowledge else 0)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body


def attribute(kind: int, payload: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def release(queue: int, packet_id: int) -> bytes:
    """The verdict that lets through this packet and all that came before it."""
    return message(_MSG_VERDICT_BATCH, queue, attribute(_VERDICT_HDR, struct.pack(">II", _NF_ACCEPT, packet_id)))


def packet_id_of(datagram: bytes) -> int | None:
    """The id of a queued packet; None when the datagram tells of something else."""
    kind = _HEADER.unpack_from(datagram)[1]
    return int.from_bytes(datagram[_PACKET_ID_AT : _PACKET_ID_AT + 4], "big") if kind == _MSG_PACKET else None


def open_queue(queue: int) -> socket.socket:
    """Binds the queue. Raises OSError: no permission, queue taken, or no such subsystem in this kernel."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    netlink.bind((0, 0))
    with contextlib.suppress(OSError):
        netlink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    netlink.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    flags = struct.pack(">I", _FLAG_FAIL_OPEN | _FLAG_GSO)
    for attributes in (
        attribute(_CFG_CMD, struct.pack(">BxH", _CMD_BIND, 0)),
        attribute(_CFG_PARAMS, struct.pack(">IB", 0, _COPY_META)),
        attribute(_CFG_QUEUE_MAXLEN, struct.pack(">I", _MAX_HELD)),
        attribute(_CFG_MASK, flags) + attribute(_CFG_FLAGS, flags),
    ):
        netlink.send(message(_MSG_CONFIG, queue, attributes, acknowledge=True))
        answer = netlink.recv(4096)
        kind, error = _HEADER.unpack_from(answer)[1], struct.unpack_from("=i", answer, _HEADER.size)[0]
        if kind == _NLMSG_ERROR and error:
            raise OSError(-error, os.strerror(-error))
    netlink.setblocking(False)
    return netlink


class Delayer:
    """The loop: note when each packet came, release those whose time is over."""

    def __init__(self, netlink: socket.socket, queue: int, delay_ns: int) -> None:
        self._netlink = netlink
        self._queue = queue
        self._delay_ns = delay_ns
        self._held: deque[tuple[int, int]] = deque()  # (release time in ns, packet id), oldest first
        self._stopping = False

    def stop(self) -> None:
        """Ends `run` as soon as nothing is held. Called by the signal's handler."""
        self._stopping = True
        if not self._held:
            raise SystemExit(0)

    def run(self) -> None:
        """Until `stop`."""
        while self._held or not self._stopping:
            select.select([self._netlink], [], [], self._seconds_to_next())
            self._take_in()
            self._let_out()

    def _seconds_to_next(self) -> float | None:
        return max(0, self._held[0][0] - time.monotonic_ns()) / 1e9 if self._held else None

    def _take_in(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet_id = packet_id_of(self._netlink.recv(65536))
                if packet_id is not None:
                    self._held.append((time.monotonic_ns() + self._delay_ns, packet_id))

    def _let_out(self) -> None:
        now, last = time.monotonic_ns(), None
        while self._held and self._held[0][0] <= now:
            last = self._held.popleft()[1]
        if last is not None:
            self._netlink.send(release(self._queue, last))


def hurry() -> None:
    """A link does not get slower because processors are busy: go before everything else, where that is allowed."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--delay-ms", type=float, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl+C at the terminal is for our owner, who ends us
    try:
        netlink = open_queue(options.queue)
    except OSError as error:
        sys.exit(f"cannot bind netfilter queue {options.queue}: {error.strerror}")
    delayer = Delayer(netlink, options.queue, round(options.delay_ms * 1e6))
    signal.signal(signal.SIGTERM, lambda *_: delayer.stop())
    hurry()
    print("ready", flush=True)  # noqa: T201 - its owner waits for it
    delayer.run()


if __name__ == "__main__":
    main()
