"""Tickets: what a person pastes to join. `resbm1` + base58 of a protobuf message and its checksum.

Base58 has no characters that look alike, that a shell treats specially or that end a double-click selection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import base58
from google.protobuf.message import DecodeError
from resbm_pb import records_pb2

from coordinator.errors import TicketInvalid
from coordinator.identity import PUBLIC_KEY_BYTES

PREFIX: Final = "resbm1"
MAX_BOOTSTRAP: Final = 16
MAX_RENEWED: Final = 8
"""Addresses in a ticket that a peer makes: one that answers is enough, and people paste tickets."""
_MAX_TEXT_CHARACTERS = 8192
_CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Ticket:
    """Enough to find a swarm and to know the true run in it."""

    run_id: str
    bootstrap: tuple[str, ...]
    """Multiaddresses with peer id, e.g. /ip4/203.0.113.7/tcp/31337/p2p/12D3Koo..."""
    publisher: bytes
    """Raw Ed25519 public key (32 bytes) of the run's publisher."""


def encode_ticket(run_id: str, bootstrap: Sequence[str], publisher: bytes) -> str:
    """The text of a ticket: one word, without white space."""
    message = records_pb2.Ticket(run_id=run_id, bootstrap=bootstrap, publisher=publisher)
    payload = message.SerializeToString(deterministic=True)
    return PREFIX + str(base58.b58encode(payload + _checksum(payload)), "ascii")


def renewed_ticket(ticket: Ticket, peers: Iterable[Sequence[str]]) -> str:
    """A ticket for the same run that names living peers first, and what the old one named as far as there is room.

    Args:
        peers: each one's multiaddresses, best first; who comes first is named first, each by one address.
    """
    living = [addresses[0] for addresses in peers if addresses][:MAX_RENEWED]
    named = dict.fromkeys([*living, *ticket.bootstrap])
    return encode_ticket(ticket.run_id, list(named)[:MAX_RENEWED], ticket.publisher)


def decode_ticket(text: str) -> Ticket:
    """Reads a pasted ticket; white space and line breaks inside and around it are ignored, quotes around it too.

    Raises:
        TicketInvalid: with the reason.
    """
    word = "".join(text.split()).strip("'\"`<>")
    if not word:
        raise TicketInvalid("the ticket is empty")
    if len(word) > _MAX_TEXT_CHARACTERS:
        raise TicketInvalid(f"a text of {len(word)} characters is too long for a ticket")
    if not word.startswith(PREFIX):
        raise TicketInvalid(f"a ticket starts with {PREFIX}, this starts with {word[: len(PREFIX)]!r}")
    return _checked(_decode_payload(word.removeprefix(PREFIX)))


def _decode_payload(body: str) -> records_pb2.Ticket:
    try:
        data = base58.b58decode(body.encode("ascii"))
    except ValueError as error:  # UnicodeEncodeError is one
        raise TicketInvalid("the ticket holds a character that tickets never hold") from error
    payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if _checksum(payload) != checksum:
        raise TicketInvalid("the ticket's checksum does not match: a part is missing or mistyped")
    message = records_pb2.Ticket()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise TicketInvalid("the ticket was made by an incompatible version") from error
    return message


def _checked(message: records_pb2.Ticket) -> Ticket:
    if not message.run_id or not message.run_id.isalnum():
        raise TicketInvalid("the ticket names no run")
    if not 1 <= len(message.bootstrap) <= MAX_BOOTSTRAP:
        raise TicketInvalid(f"the ticket names {len(message.bootstrap)} addresses; 1 to {MAX_BOOTSTRAP} are allowed")
    for address in message.bootstrap:
        if not address.startswith("/") or "/p2p/" not in address:
            raise TicketInvalid(f"{address!r} is not the address of a peer")
    if len(message.publisher) != PUBLIC_KEY_BYTES:
        raise TicketInvalid("the ticket does not say who published the run")
    return Ticket(message.run_id, tuple(message.bootstrap), message.publisher)


def _checksum(payload: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + payload).digest()[:_CHECKSUM_BYTES]
