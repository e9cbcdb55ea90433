"""The worker process: serves one stage of one run.

`python -m node.worker` reads one WorkerSpec line from stdin and writes events to stdout. The order of the first lines
of `main` matters: the averaging process's zygote and hivemind's DHT process are forked before gRPC, CUDA or any thread
exists.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before anything imports grpc; with fork support on, forks hang

import asyncio
import errno
import logging
import signal
import sys
from types import FrameType

import torch
import uvloop

from coordinator import averaging_zygote
from coordinator.averaging_launch import Launcher
from coordinator.errors import DirectoryLost, RunNotFound, StageUnavailable, SwarmError, TicketUnreachable
from coordinator.swarm import Swarm
from coordinator.ticket import decode_ticket
from node import identity
from node.acquaintances import ways_in
from node.addresses import announced_host
from node.errors import CodedError, MachineUnfit, NodeError
from node.events import (
    EXIT_DONE,
    EXIT_REFUSED,
    EXIT_RESTART,
    Error,
    WorkerSpec,
    claim_stdout,
    emit,
    read_spec,
)
from node.join_steps import JoinSteps
from node.moving import MovedAway
from node.stage_node import StageNode
from stage_server.errors import RewindNeeded, StageError

log = logging.getLogger(__name__)

_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main() -> int:
    """Runs the worker; returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_at_once)  # until there is something to drain, see _serve
    spec = read_spec(sys.stdin.buffer)
    claim_stdout()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with averaging_zygote.launching() as launcher:
            return _run(spec, launcher)
    except DirectoryLost:
        raise  # a crash: the supervisor starts this worker again
    except (TicketUnreachable, RunNotFound) as error:
        if any(spec.state_folder.glob("*/stage-*")):
            raise  # it was in this swarm before: the network is away for a while, not the ticket wrong
        return _refuse(error)
    except (SwarmError, NodeError, StageError) as error:
        return _refuse(error)
    except OSError as error:
        if error.errno not in _DISK_REFUSES:
            raise
        return _refuse(MachineUnfit(f"{error.filename or 'a file'}: {error.strerror}", remedy="free disk space"))


def _run(spec: WorkerSpec, launcher: Launcher) -> int:
    steps = JoinSteps(emit)
    with steps.step("machine") as note:
        device = _set_up_machine(spec)
        note(f"{device}, {torch.get_num_threads()} threads")
    with steps.step("identity") as note:
        key = identity.load_or_create(spec.identity_file)
        note(str(key.peer_id))
    with steps.step("network") as note:
        ticket = decode_ticket(spec.ticket)
        swarm = Swarm.start(
            identity_seed=key.seed,
            listen_host=spec.host,
            announce_host=announced_host(spec.host, spec.announce),
            port=spec.dht_port,
            bootstrap=ways_in([*ticket.bootstrap, *(spec.beside.bootstrap if spec.beside else ())], spec.state_folder),
            folder=spec.state_folder,
        )
        note(f"in the swarm through {len(ticket.bootstrap)} address(es)")
    try:
        node = StageNode(spec, swarm, ticket, device=device, steps=steps, launcher=launcher)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(node, may_choose_again=spec.stage is None))
    finally:
        swarm.close()


async def _serve(node: StageNode, *, may_choose_again: bool) -> int:
    """Until the node ends by itself, or SIGTERM or SIGINT asks it to drain."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.drain)
    try:
        await node.run()
    except RewindNeeded as error:
        log.warning("going back to step %d: %s", error.to_step, error)
        return EXIT_RESTART
    except MovedAway as error:
        log.info("starting again elsewhere: %s", error)
        return EXIT_RESTART
    except StageUnavailable as error:
        if not may_choose_again:
            raise
        log.warning("choosing another stage: %s", error)
        return EXIT_RESTART
    return EXIT_DONE


def _set_up_machine(spec: WorkerSpec) -> str:
    if spec.threads:
        torch.set_num_threads(spec.threads)
    torch.set_num_interop_threads(1)
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise MachineUnfit("no CUDA device is to be had here", remedy="join with --device cpu or install a CUDA build")
    if spec.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return spec.device


def _leave_at_once(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(EXIT_DONE)


def _refuse(error: CodedError) -> int:
    emit(Error(code=int(error.code), cause=error.cause, remedy=error.remedy))
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
