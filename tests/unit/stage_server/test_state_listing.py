"""A peer's listing is checked at the door, and what most peers list is chosen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resbm_pb import stage_pb2

from stage_server.errors import CheckpointInvalid, Oversized
from stage_server.state_listing import (
    CHUNK_BYTES,
    MAX_FILES,
    StateFile,
    StateListing,
    choose,
    from_reply,
    num_chunks,
    to_reply,
)

MAX_BYTES = 10 * CHUNK_BYTES


def entry(**changes: Any) -> stage_pb2.StateFile:
    values = {"name": "state-00000.safetensors", "size_bytes": CHUNK_BYTES + 1, "sha256": b"w" * 32}
    return stage_pb2.StateFile(**(values | {"chunk_sha256": b"c" * 64} | changes))


def test_a_listing_survives_the_wire() -> None:
    files = [entry(), entry(name="b", size_bytes=0, chunk_sha256=b"")]
    reply = stage_pb2.ListStateReply(stage=3, step=7, lineage="history", files=files)
    listing = from_reply(reply, MAX_BYTES)
    assert listing.files[0].chunk_sha256 == (b"c" * 32, b"c" * 32)
    assert listing.size_bytes == CHUNK_BYTES + 1
    assert to_reply(listing) == reply


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/tmp/escaped", "a/b", "a\\b", "..", ".", "", "nul\0byte", ".hidden", "x" * 200, "UPPER", "a b",
     "manifest.json", "newline\n"],
)  # fmt: skip
def test_a_name_that_could_lead_out_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(CheckpointInvalid, match="called"):
        from_reply(stage_pb2.ListStateReply(files=[entry(name=name)]), MAX_BYTES)


@pytest.mark.parametrize(
    "reply",
    [
        stage_pb2.ListStateReply(),
        stage_pb2.ListStateReply(files=[entry(), entry()]),
        stage_pb2.ListStateReply(files=[entry()], lineage="x" * 65),
        stage_pb2.ListStateReply(files=[entry(sha256=b"short")]),
        stage_pb2.ListStateReply(files=[entry(chunk_sha256=b"c" * 32)]),
        stage_pb2.ListStateReply(files=[entry(chunk_sha256=b"c" * 96)]),
        stage_pb2.ListStateReply(files=[entry(chunk_sha256=b"c" * 63)]),
        stage_pb2.ListStateReply(files=[stage_pb2.StateFile()] * (MAX_FILES + 1)),
    ],
    ids=["nothing", "twice", "lineage", "hash", "few chunks", "many chunks", "half a chunk", "too many files"],
)  # fmt: skip
def test_a_listing_that_contradicts_itself_is_refused(reply: stage_pb2.ListStateReply) -> None:
    with pytest.raises(CheckpointInvalid) as error:
        from_reply(reply, MAX_BYTES)
    assert error.value.code == 401


def test_a_state_that_is_too_large_is_refused_before_its_hashes_are_looked_at() -> None:
    files = [entry(size_bytes=2**64 - 1), entry(name="b", size_bytes=2**64 - 1)]
    with pytest.raises(Oversized) as error:
        from_reply(stage_pb2.ListStateReply(files=files), MAX_BYTES)
    assert error.value.code == 206


@given(st.integers(0, 2**64 - 1))
def test_number_of_chunks(size_bytes: int) -> None:
    assert (
        (num_chunks(size_bytes) - 1) * CHUNK_BYTES < max(size_bytes, 1) <= max(num_chunks(size_bytes), 1) * CHUNK_BYTES
    )


def state(name: str) -> StateListing:
    return StateListing(1, 10, name, (StateFile("a", 1, name.encode() * 32, (name.encode() * 32,)),))


@pytest.mark.parametrize(
    ("answers", "num_waiting", "chosen"),
    [
        ("", 3, None),
        ("", 0, None),
        ("x", 0, "x"),
        ("x", 1, None),
        ("xx", 1, "x"),
        ("xx", 2, None),
        ("xy", 0, "x"),
        ("xyy", 0, "y"),
        ("xyy", 1, None),
        ("xxyy", 0, "x"),
        ("xyyy", 1, "y"),
    ],
)
def test_what_most_list_is_chosen_once_nobody_can_change_it(answers: str, num_waiting: int, chosen: str | None) -> None:
    listings = {str(number): state(name) for number, name in enumerate(answers)}
    assert choose(listings, num_waiting) == (state(chosen) if chosen else None)


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=7), st.data())
def test_later_answers_never_change_a_choice(answers: list[str], data: st.DataObject) -> None:
    listings = {str(number): state(name) for number, name in enumerate(answers)}
    known = data.draw(st.integers(0, len(answers)))
    early = choose(dict(list(listings.items())[:known]), len(answers) - known)
    assert early in (None, choose(listings, 0))
