"""Tickets survive pasting; whatever does not survive is refused with a reason."""

from __future__ import annotations

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import TicketInvalid
from coordinator.ticket import PREFIX, decode_ticket, encode_ticket

PUBLISHER = bytes(range(32))
ADDRESSES = [
    "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooWA7EdPk1jgv6RixFFdGmNr6CmrcAeZRCc3Lk3cvVbZXTs",
    "/dns4/peer.example/tcp/4000/p2p/12D3KooWA7EdPk1jgv6RixFFdGmNr6CmrcAeZRCc3Lk3cvVbZXTs",
]
TEXT = encode_ticket("abcd0123", ADDRESSES, PUBLISHER)


def test_round_trip() -> None:
    ticket = decode_ticket(TEXT)
    assert (ticket.run_id, list(ticket.bootstrap), ticket.publisher) == ("abcd0123", ADDRESSES, PUBLISHER)
    assert TEXT.isalnum()  # one word: a double click selects it whole


@given(st.lists(st.tuples(st.integers(0, len(TEXT)), st.sampled_from([" ", "\n", "\t", "\r\n", "\u00a0"]))))
def test_white_space_from_pasting_is_ignored(breaks: list[tuple[int, str]]) -> None:
    text = TEXT
    for place, space in breaks:
        text = text[:place] + space + text[place:]
    assert decode_ticket(f"  '{text}'\n").run_id == "abcd0123"


@given(st.data())
def test_every_typo_and_cut_is_noticed(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(TEXT) - 1))
    other = data.draw(st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0OIl-é"))
    for text in (TEXT[:place], TEXT[:place] + other + TEXT[place + 1 :]):
        if text != TEXT:
            with pytest.raises(TicketInvalid):
                decode_ticket(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("https://example.org", "starts with"),
        (PREFIX, "checksum"),
        ("resbm1" + "z" * 9000, "too long"),
        (encode_ticket("", ADDRESSES, PUBLISHER), "no run"),
        (encode_ticket("../x", ADDRESSES, PUBLISHER), "no run"),
        (encode_ticket("ab", [], PUBLISHER), "0 addresses"),
        (encode_ticket("ab", ADDRESSES * 9, PUBLISHER), "18 addresses"),
        (encode_ticket("ab", ["localhost:4000"], PUBLISHER), "not the address of a peer"),
        (encode_ticket("ab", ADDRESSES, b"short"), "who published"),
    ],
)
def test_refusals_say_why(text: str, reason: str) -> None:
    with pytest.raises(TicketInvalid, match=reason) as refusal:
        decode_ticket(text)
    assert (refusal.value.code, bool(refusal.value.remedy)) == (301, True)


@given(st.binary(max_size=200))
def test_junk_never_escapes_as_another_error(data: bytes) -> None:
    with pytest.raises(TicketInvalid):
        decode_ticket(PREFIX + base58.b58encode(data).decode())
