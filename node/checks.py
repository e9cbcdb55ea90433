"""What a machine must have to take part, and what helps: each check gives a verdict, a fact and a remedy."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Literal

import psutil

from node import folders

Verdict = Literal["ok", "warn", "failed"]
GIB = 2**30
MEMORY_NEEDED_BYTES = 1 * GIB  # four demo peers need about three times this; one peer needs this
DISK_NEEDED_BYTES = 1 * GIB
OPEN_FILES_NEEDED = 1024
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what makes matrix products fast, slowest first
EARLIEST_CLOCK = 1_750_000_000.0  # mid-2025, seconds since 1970: a clock before this was never set
NTP_STATES = {"yes": True, "no": False}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor. A failed check keeps this machine out; a warning costs speed or safety."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def run_checks() -> Iterator[Check]:
    """All checks, each given as soon as it is made. The slow ones come last."""
    for check in CHECKS:
        yield check()


def check_python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return Check("python", "ok", version)
    return Check("python", "failed", version, "use Python 3.11 or 3.12")


def check_processor() -> Check:
    cores, flags = len(os.sched_getaffinity(0)), _cpu_flags()
    detail = f"{cores} cores, {', '.join(flags) or 'no wide vectors'}"
    if "avx2" in flags or platform.machine() in ("aarch64", "arm64"):
        return Check("processor", "ok", detail)
    return Check("processor", "warn", detail, "training will be slow; a processor from after 2013 has AVX2")


def check_memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available >= MEMORY_NEEDED_BYTES:
        return Check("memory", "ok", detail)
    return Check("memory", "failed", detail, "close other programs: one peer needs about 1 GiB")


def check_disk() -> Check:
    folder = _existing(folders.state_folder())
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free at {folder}"
    if free >= DISK_NEEDED_BYTES:
        return Check("disk", "ok", detail)
    return Check(
        "disk", "failed", detail, "free space, or point --state-dir at another disk: checkpoints need about 1 GiB"
    )


def check_folders() -> Check:
    for folder in (folders.state_folder(), folders.cache_folder()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            remedy = "make it writable, or set XDG_STATE_HOME and XDG_CACHE_HOME to folders that are"
            return Check("folders", "failed", f"{folder}: {error.strerror}", remedy)
    return Check("folders", "ok", f"{folders.state_folder()} and {folders.cache_folder()} can be written")


def check_open_files() -> Check:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft}"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES_NEEDED:
        return Check("open files", "ok", detail)
    return Check("open files", "warn", detail, f"raise it before a start: ulimit -n {4 * OPEN_FILES_NEEDED}")


def check_clock() -> Check:
    """Peers whose clocks differ by more than 3 s refuse each other's records."""
    remedy = "switch time synchronisation on (for example: timedatectl set-ntp true)"
    if time.time() < EARLIEST_CLOCK:
        return Check("clock", "failed", time.strftime("%Y-%m-%d"), remedy)
    synchronised = _clock_is_synchronised()
    if synchronised is False:
        return Check("clock", "warn", "not synchronised", remedy)
    return Check("clock", "ok", "synchronised" if synchronised else "set; cannot tell whether it is synchronised")


def check_p2p_daemon() -> Check:
    """hivemind ships a binary; it must run on this system. Found without importing hivemind, which takes seconds."""
    remedy = "reinstall with `make setup`; the binary needs 64-bit Linux (glibc) or macOS"
    spec = util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        return Check("p2p daemon", "failed", "hivemind is not installed", remedy)
    binary = Path(spec.submodule_search_locations[0]) / "hivemind_cli" / "p2pd"
    try:
        done = subprocess.run([binary, "-help"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("p2p daemon", "failed", f"{binary}: {error}", remedy)
    if b"-hostAddrs" not in done.stderr + done.stdout:
        return Check("p2p daemon", "failed", f"{binary} ends with status {done.returncode}", remedy)
    return Check("p2p daemon", "ok", "runs")


def check_loopback() -> Check:
    """A gRPC server on a free port of this machine, and a call to it."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it would tell of our own closing
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    remedy = "allow connections to 127.0.0.1 in the firewall or sandbox, and unset http_proxy for it"
    try:
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)])
        started = time.perf_counter()
        grpc.channel_ready_future(channel).result(timeout=10)
        milliseconds = 1000 * (time.perf_counter() - started)
        channel.close()
    except (RuntimeError, grpc.FutureTimeoutError) as error:
        return Check("loopback gRPC", "failed", str(error) or "no answer in 10 s", remedy)
    finally:
        server.stop(None).wait()
    return Check("loopback gRPC", "ok", f"connected in {milliseconds:.0f} ms")


def check_network() -> Check:
    """Which address others on this network would see. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737)
        except OSError:
            return Check("network", "warn", "no route out", "fine for `demo`; to join others, connect to a network")
        return Check("network", "ok", f"outgoing address {probe.getsockname()[0]}")


def check_devices() -> Check:
    import torch

    cpu = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return Check("devices", "ok", f"{cpu}, no CUDA")
    names = [
        f"{torch.cuda.get_device_name(index)} {torch.cuda.mem_get_info(index)[0] / GIB:.0f} GiB free"
        for index in range(torch.cuda.device_count())
    ]
    return Check("devices", "ok", f"{cpu}, CUDA: {'; '.join(names)}")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_processor,
    check_memory,
    check_disk,
    check_folders,
    check_open_files,
    check_clock,
    check_network,
    check_p2p_daemon,
    check_loopback,
    check_devices,
)


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    words = set(text.split())
    return [flag for flag in CPU_FLAGS if flag in words]


def _clock_is_synchronised() -> bool | None:
    """systemd's word for it; None where there is no systemd to ask."""
    command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return NTP_STATES.get(done.stdout.strip())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
