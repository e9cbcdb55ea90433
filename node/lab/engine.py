"""The container engine: the one that runs here, or one that is installed and started for the time of the lab."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from node.errors import EngineUnavailable
from node.lab.host_network import network_as_before
from node.processes import describe_exit

Say = Callable[[str], None]

_START_SECONDS = 60.0
_NEWER_DEBIAN = (
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"
)


def output_of(argv: Sequence[str]) -> str | None:
    """What a command prints; None when it fails or is not installed."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def run_logged(argv: Sequence[str], what: str, stdin: str | None = None) -> None:
    """Runs a command in silence. Raises EngineUnavailable: `what` could not be done, and the last that was said."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(argv, input=stdin or "", capture_output=True, text=True, env=environment, check=False)
    except FileNotFoundError:
        raise EngineUnavailable(f"cannot {what}: {argv[0]} is not installed") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise EngineUnavailable(f"cannot {what}: {lines[-1].strip() if lines else describe_exit(done.returncode)}")


def may_install() -> bool:
    """As root on a system with apt."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


@contextlib.contextmanager
def engine(say: Say) -> Iterator[None]:
    """A Docker engine that answers. One that had to be started is stopped at the end. Raises EngineUnavailable."""
    answer = _what_is_wrong()
    if not answer:
        yield
        return
    if os.geteuid() != 0:
        raise EngineUnavailable(f"no container engine answers ({answer}), and only root could start one")
    _install_engine(say)
    if not _what_is_wrong():  # where packages start their services, installing is starting
        yield
        return
    with network_as_before(say), _running_engine(say):
        yield


def _what_is_wrong() -> str:
    """Why no engine answers; empty when one does."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    done = subprocess.run(
        ["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) or "docker info failed"


def _install_engine(say: Say) -> None:
    if shutil.which("dockerd") and shutil.which("docker"):
        return
    if not may_install():
        raise EngineUnavailable("dockerd is not installed, and there is no apt-get to install it with")
    say("installing the container engine (apt-get install docker.io)")
    run_logged(["apt-get", "update", "-qq"], "read the package lists")
    run_logged(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "docker.io", "iptables"], "install docker.io"
    )


@contextlib.contextmanager
def _running_engine(say: Say) -> Iterator[None]:
    say("starting the container engine (dockerd), for the time of the lab")
    log = Path(tempfile.gettempdir()) / "resbm-lab-dockerd.log"
    with log.open("wb") as out:
        # A session of its own: a Ctrl+C at the terminal must not end it before the containers are gone.
        process = subprocess.Popen(
            ["dockerd"], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while _what_is_wrong():
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").splitlines()[-1:]
                raise EngineUnavailable(f"dockerd did not start ({log}): {' '.join(last)[-300:]}")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def require_compose(say: Say) -> None:
    """Compose v2, installed where there is none. Raises EngineUnavailable."""
    if _has_compose():
        return
    if not may_install():
        raise EngineUnavailable("docker has no compose plugin (docker compose version)")
    say("installing docker compose")
    run_logged(["apt-get", "update", "-qq"], "read the package lists")
    for package in ("docker-compose-v2", "docker-compose-plugin"):  # Ubuntu's and Docker's own
        if output_of(["apt-get", "install", "-y", "-qq", package]) is not None and _has_compose():
            return
    _install_newer_debian("docker-compose")
    if not _has_compose():
        raise EngineUnavailable("compose was installed, but `docker compose version` does not know it")


def _has_compose() -> bool:
    return output_of(["docker", "compose", "version"]) is not None


def _install_newer_debian(package: str) -> None:
    """One package of Debian 13 on Debian 12, which has compose 1 only; its system's sources stay as they are."""
    with tempfile.TemporaryDirectory(prefix="resbm-lab-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt reads it as a user of its own
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "newer.list").write_text(_NEWER_DEBIAN)
        options = [
            f"-oDir::Etc::sourcelist={folder / 'newer.list'}",
            "-oDir::Etc::sourceparts=-",
            f"-oDir::State::lists={folder / 'lists'}",
            f"-oDir::Cache={folder}",
        ]
        run_logged(["apt-get", *options, "update", "-qq"], "read Debian 13's package lists")
        run_logged(["apt-get", *options, "install", "-y", "-qq", package], f"install {package}")
