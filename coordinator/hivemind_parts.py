"""hivemind's names, imported with the environment set first and its warnings kept to itself, and its addresses."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read by grpc at import; with 1 forked children hang

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # hivemind's mixture of experts, unused here, calls deprecated parts of torch
    from hivemind import DHT
    from hivemind.dht import DHTNode
    from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2P, PeerID
    from hivemind.utils import MSGPackSerializer
    from hivemind.utils.multiaddr import Multiaddr

__all__ = [
    "DHT",
    "DHTID",
    "P2P",
    "DHTNode",
    "DHTRecord",
    "MSGPackSerializer",
    "Multiaddr",
    "PeerID",
    "RecordValidatorBase",
    "split_address",
]


def split_address(address: str) -> tuple[PeerID, Multiaddr]:
    """Whom a full multiaddress names, and the address without that name. Raises what multiaddr and base58 like."""
    full = Multiaddr(address)
    peer = full["p2p"]
    return PeerID.from_base58(peer), full.decapsulate(Multiaddr(f"/p2p/{peer}"))
