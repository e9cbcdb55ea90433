"""`make lab`: everything that the WAN lab needs, the lab itself, and its end.

python -m node.lab.up           until Ctrl+C; then containers, networks and volumes are removed
python -m node.lab.up --keep    leaves it running; `python -m node.lab.up --down` removes it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from node.errors import ConfigInvalid, EngineUnavailable, LabFailed, NodeError, PortTaken, describe
from node.lab.engine import engine, output_of, require_compose
from node.lab.images import GRAFANA, PROMETHEUS, PYTHON, provide
from node.lab.links import read_links
from node.lab.signals import ending_on_signals

FOLDER = Path(__file__).parents[2] / "docker"
COMPOSE = ("docker", "compose", "--file", str(FOLDER / "compose.yaml"))
NODES = ("coordinator", "peer0", "peer1", "peer2", "peer3")
PORTS: Mapping[str, tuple[str, int]] = {
    "prometheus": ("RESBM_PROMETHEUS_PORT", 9090),
    "grafana": ("RESBM_GRAFANA_PORT", 3000),
}
EXIT_REFUSED, EXIT_INTERRUPTED = 2, 130
_TRAINING_SECONDS = 600.0
_LOOK_SECONDS = 5.0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def port_of(service: str) -> int:
    """Where a service is to be found on this machine. Raises ConfigInvalid."""
    variable, default = PORTS[service]
    text = os.environ.get(variable) or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ConfigInvalid(f"{variable} = {text!r} is no port", remedy="give a number from 1 to 65535")
    return int(text)


def require_free_ports(services: list[str]) -> None:
    """Raises PortTaken, ConfigInvalid: before anything is started."""
    if len({port_of(service) for service in services}) < len(services):
        raise ConfigInvalid(
            f"{' and '.join(services)} are both to be at port {port_of(services[0])}",
            remedy=f"choose another for one of them: {PORTS[services[0]][0]}=... make lab",
        )
    for service in services:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port_of(service)))
            except OSError as error:
                raise PortTaken(
                    f"port {port_of(service)} of this machine, for {service}: {error.strerror}",
                    remedy=f"end what uses it, or choose another: {PORTS[service][0]}=... make lab",
                ) from None


@contextlib.contextmanager
def lab(services: list[str]) -> Iterator[None]:
    """The services, built and started; removed at the end. Raises LabFailed."""
    say("building the image and starting the containers (the first time, some minutes)")
    try:
        done = subprocess.run([*COMPOSE, "up", "--build", "--detach", *services], stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise LabFailed("docker compose could not start the lab; its own words are above")
        yield
    except LabFailed:
        keep_logs()
        raise
    finally:
        take_down()


def keep_logs() -> None:
    """What the containers said goes with them: save it."""
    path = Path(tempfile.gettempdir()) / "resbm-lab.log"
    path.write_text(output_of([*COMPOSE, "logs", "--no-color", "--timestamps"]) or "")
    say(f"the containers' logs are in {path}")


def take_down() -> None:
    """Removes the lab's containers, networks and volumes. Peers get the time to leave in good order."""
    say("removing the lab's containers, networks and volumes")
    subprocess.run([*COMPOSE, "down", "--volumes", "--remove-orphans"], stdin=subprocess.DEVNULL, check=False)


def ask_prometheus(query: str) -> float | None:
    """The value of a query with one answer; None when there is none (yet)."""
    url = f"http://127.0.0.1:{port_of('prometheus')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with contextlib.suppress(OSError, ValueError, LookupError):
        with urllib.request.urlopen(url, timeout=5) as answer:
            results: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return float(results[0]["value"][1])
    return None


def watch(*, until_training: bool) -> None:
    """Says how far the run is, until it is interrupted; or until two steps are done.

    Raises LabFailed: those were not done. Later the run may stand still, as when somebody tries what happens then.
    """
    moved_at, told = time.monotonic(), 0.0
    while True:
        step = ask_prometheus("min(resbm_node_step)") or 0.0
        if step > told:
            moved_at, told = time.monotonic(), step
            loss, speed = (
                ask_prometheus("max(resbm_node_loss_nats)"),
                ask_prometheus("max(rate(resbm_node_tokens_total[1m]))"),
            )
            say(
                f"step {step:.0f}"
                + (f" · loss {loss:.3f}" if loss else "")
                + (f" · {speed:,.0f} tokens/s" if speed else "")
            )
        if until_training and step >= 2:
            return
        if until_training and time.monotonic() - moved_at > _TRAINING_SECONDS:
            raise LabFailed("no step was trained for ten minutes", remedy="read the containers' logs")
        time.sleep(_LOOK_SECONDS)


def tell_where_to_look(services: list[str]) -> None:
    """Who runs, on what link, and where to see it."""
    links = read_links(FOLDER / "lab.toml")
    for name in NODES:
        shaped = output_of([*COMPOSE, "exec", "--no-TTY", name, "cat", "/run/link.json"])
        mechanism = json.loads(shaped)["mechanism"] if shaped else "not shaped"
        say(f"  {name}: {links.of(name)}; by {mechanism}")
    for service in services:
        if service in PORTS:
            say(f"  {service}: http://127.0.0.1:{port_of(service)}")
    say(f"  links: {FOLDER / 'lab.toml'} (edit it while the lab runs)")
    say("  logs: docker compose --file docker/compose.yaml logs --follow")


def run() -> None:
    """The whole lab. Raises NodeError, KeyboardInterrupt."""
    read_links(FOLDER / "lab.toml")  # a mistake in it is told before anything is started
    services = [*NODES, *PORTS]
    require_free_ports(services[len(NODES) :])
    with engine(say):
        require_compose(say)
        provide(PYTHON, say)
        provide(PROMETHEUS, say)
        if not provide(GRAFANA, say):
            say(f"{GRAFANA} cannot be pulled and has no stand-in: the lab runs without Grafana")
            services.remove("grafana")
        with lab(services):
            watch(until_training=True)
            say("the swarm trains")
            tell_where_to_look(services)
            say("Ctrl+C ends the lab")
            watch(until_training=False)


def down() -> None:
    """Removes what a lab has left. Raises EngineUnavailable."""
    if output_of(["docker", "info"]) is None:
        raise EngineUnavailable(
            "no container engine answers, so no lab runs in one", remedy="there is nothing to remove"
        )
    take_down()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m node.lab.up", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--down", action="store_true", help="remove what a lab has left")
    options = parser.parse_args()
    try:
        with ending_on_signals():
            down() if options.down else run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except NodeError as error:
        sys.stderr.write(describe(error) + "\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
