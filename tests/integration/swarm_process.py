"""A peer of the swarm in a process of its own, for tests: JSON requests on stdin, JSON answers on stdout.

    python swarm_process.py '{"seed": "<hex>", "bootstrap": [...], "folder": "..."}'

With "raw": true it is a peer of the same DHT that checks nothing and signs nothing: hivemind as it comes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from coordinator.assignment import MachineProfile
from coordinator.directory import SERVING, PeerEntry
from coordinator.errors import SwarmError
from coordinator.hivemind_parts import DHT
from coordinator.settlement import Rules
from coordinator.swarm import Swarm
from coordinator.ticket import decode_ticket

Handler = Callable[[dict[str, Any]], Any]


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def entry_of(swarm: Swarm, request: dict[str, Any]) -> PeerEntry:
    return PeerEntry(
        run_id=request["run_id"],
        stage=request.get("stage") or 0,
        peer_id=swarm.peer_id,
        endpoints=("127.0.0.1:4000",),
        state=SERVING,
        throughput=1.0,
        reserved_at=request.get("reserved_at", time.time()),
    )


class Peer:
    """Answers the requests of a test with a real Swarm."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm

    async def publish_run(self, request: dict[str, Any]) -> Any:
        await self.swarm.publish_run(created_at=time.time(), **request)
        return self.swarm.ticket(request["run_id"])

    async def fetch_run(self, request: dict[str, Any]) -> Any:
        run = await self.swarm.fetch_run(decode_ticket(request["ticket"]), lambda text: text)
        await self.swarm.republish_run(run.sealed)
        return run.name

    async def publish_peer(self, request: dict[str, Any]) -> Any:
        await self.swarm.publish_peer(entry_of(self.swarm, request))

    async def withdraw(self, request: dict[str, Any]) -> Any:
        await self.swarm.withdraw_peer()

    async def snapshot(self, request: dict[str, Any]) -> Any:
        snapshot = await self.swarm.snapshot(request["run_id"], request["num_stages"])
        return [[entry.peer_id for entry in entries] for entries in snapshot.peers]

    async def settle(self, request: dict[str, Any]) -> Any:
        num_stages = request["num_stages"]
        place = await self.swarm.settle(
            entry_of(self.swarm, request),
            MachineProfile(self.swarm.peer_id, 1.0, (True,) * num_stages),
            num_stages,
            Rules(
                wanted=request.get("stage"),
                wait=timedelta(seconds=1),
                patience=timedelta(seconds=request.get("patience", 10)),
            ),
        )
        return {"stage": place.stage, "reserved_at": place.reserved_at, "reason": place.reason}

    async def answer(self, request: dict[str, Any]) -> None:
        try:
            say(ok=await getattr(self, request.pop("do"))(request))
        except SwarmError as error:
            say(code=error.code, cause=error.cause)


async def serve(swarm: Swarm) -> None:
    peer = Peer(swarm)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await peer.answer(json.loads(line))


def store_raw(settings: dict[str, Any]) -> None:
    """Joins without any validator and stores what it is told to, under plain keys."""
    dht = DHT(initial_peers=settings["bootstrap"], start=True, use_relay=False, auto_nat=False, nat_port_map=False)
    say(ok="ready")
    for line in sys.stdin:
        request = json.loads(line)
        value = bytes.fromhex(request["value_hex"])
        say(ok=dht.store(request["key"], value, request["expires_at"], subkey=request["subkey"]))
    dht.shutdown()


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings.get("raw"):
        return store_raw(settings)
    swarm = Swarm.start(
        identity_seed=bytes.fromhex(settings["seed"]),
        listen_host="127.0.0.1",
        announce_host="127.0.0.1",
        port=0,
        bootstrap=settings["bootstrap"],
        folder=Path(settings["folder"]),
    )
    say(peer_id=swarm.peer_id, addresses=swarm.addresses(), pid=os.getpid())
    try:
        asyncio.run(serve(swarm))
    finally:
        swarm.close()
    return None


if __name__ == "__main__":
    main()
