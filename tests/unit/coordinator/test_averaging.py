"""What members tell each other before a sum, and how a wrong sum is found out. No network, no hivemind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator import averaging_child, averaging_hivemind
from coordinator.averaging_contribution import (
    MAX_PART_VALUES,
    NUM_CHECKSUMS,
    Contribution,
    ContributionInvalid,
    SumWrong,
    Values,
    Wire,
    checksums_of,
    decode,
    encode,
    group_id_of,
    part_sizes,
    verify_agreement,
    verify_sum,
)
from coordinator.averaging_hivemind import (
    P2P,
    AllreduceException,
    CompressionInfo,
    DecentralizedAverager,
    HivemindChanged,
    NoCompression,
    SumRunner,
    averaging_pb2,
    require_known_hivemind,
)

KEY = "run/stage/step"
PEERS = ("12Da", "12Db", "12Dc")


def contribution(values: Values, *, peers: tuple[str, ...] = PEERS, wire: Wire = Wire.FLOAT32) -> Contribution:
    checksums, norms = checksums_of(KEY, values, len(peers))
    return Contribution(KEY, peers, wire, len(values), 3, "attempt", checksums, norms)


def some_values(seed: int, size: int = 40_000, scale: float = 1e-3) -> Values:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * np.float32(scale)


def rounded_sum(vectors: list[Values]) -> Values:
    return np.sum([vector.astype(np.float64) for vector in vectors], axis=0).astype(np.float32)


@given(st.integers(1, 10_000_000), st.integers(1, 64))
def test_parts_cover_the_vector(num_values: int, num_members: int) -> None:
    sizes = part_sizes(num_values, num_members)
    assert sum(sizes) == num_values
    assert max(sizes) <= MAX_PART_VALUES
    assert len(set(sizes[:-1])) <= 1
    assert 0 < sizes[-1] <= sizes[0]


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e-3, 1e20])
@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_the_sum_passes(size: int, scale: float) -> None:
    vectors = [some_values(seed, size, scale) for seed in range(3)]
    verify_sum(rounded_sum(vectors), [contribution(vector) for vector in vectors])


def test_zeros_and_unequal_sizes_pass() -> None:
    vectors = [some_values(0), np.zeros(40_000, np.float32), some_values(1, scale=1e6)]
    verify_sum(rounded_sum(vectors), [contribution(vector) for vector in vectors])
    zeros = [np.zeros(100, np.float32)] * 3
    verify_sum(zeros[0], [contribution(zero) for zero in zeros])


def test_every_wrong_sum_is_found() -> None:
    vectors = [some_values(seed) for seed in range(3)]
    told = [contribution(vector) for vector in vectors]
    total = rounded_sum(vectors)
    part = part_sizes(len(total), 3)[0]

    def changed(start: int, stop: int, values: Values) -> Values:
        wrong = total.copy()
        wrong[start:stop] = values
        return wrong

    wrongs = {
        "local values": vectors[0],
        "the mean": total / 3,
        "one part local": changed(part, 2 * part, vectors[0][part : 2 * part]),
        "last part without one": changed(36_000, 40_000, (vectors[0] + vectors[1])[36_000:]),
        "nothing": np.zeros_like(total),
        "two parts exchanged": changed(0, 2 * part, np.roll(total[: 2 * part], part)),
        "a part in another order": changed(0, part, total[:part][::-1]),
        "one value": changed(7, 8, total[7:8] + np.float32(1e-4)),
        "not a number": changed(7, 8, np.array([np.nan], np.float32)),
    }
    for what, wrong in wrongs.items():
        with pytest.raises(SumWrong):
            verify_sum(wrong.astype(np.float32), told)
            pytest.fail(what)


def test_a_coarse_wire_passes_and_still_shows_what_is_wrong() -> None:
    vectors = [some_values(seed) for seed in range(3)]
    told = [contribution(vector, wire=Wire.FLOAT16) for vector in vectors]
    coarse = [(vector * 1e3).astype(np.float16).astype(np.float32) / np.float32(1e3) for vector in vectors]
    total = (rounded_sum(coarse) * 1e3).astype(np.float16).astype(np.float32) / np.float32(1e3)
    verify_sum(total, told)
    with pytest.raises(SumWrong):
        verify_sum(coarse[0] + coarse[1], told)
    with pytest.raises(SumWrong):
        verify_sum(total, [replace(each, wire=Wire.FLOAT32) for each in told])


def test_members_must_agree() -> None:
    own = contribution(some_values(0))
    everyone = dict.fromkeys(PEERS, own)
    verify_agreement(everyone, own)
    infinite = some_values(1)
    infinite[5] = np.inf
    for other in (
        replace(own, key="another"),
        replace(own, members=PEERS[:2]),
        replace(own, wire=Wire.FLOAT16),
        contribution(some_values(0, 1000)),
        contribution(infinite),
    ):
        with pytest.raises(ContributionInvalid):
            verify_agreement({**everyone, PEERS[1]: other}, own)


def test_a_contribution_survives_the_wire() -> None:
    sent = contribution(some_values(0))
    got = decode(encode(sent))
    assert (got.checksums == sent.checksums).all()
    assert (got.norms == sent.norms).all()
    nothing = np.zeros(0)
    assert replace(got, checksums=nothing, norms=nothing) == replace(sent, checksums=nothing, norms=nothing)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version": 1', b'"version": 2'),
        (b'"count": 3', b'"count": -1'),
        (b'"count": 3', b'"count": 3.0'),
        (b'"num_values": 40000', b'"num_values": 9999'),
        (b'"num_values": 40000', b'"num_values": 40000000000000'),
        (b'"num_values": 40000', b'"num_values": 0'),
        (b'"fp32"', b'"fp64"'),
        (b'"key"', b'"kex"'),
        (b"{", b"["),
        (b"\n", b""),
    ],
)
def test_a_malformed_contribution_is_refused(old: bytes, new: bytes) -> None:
    message = encode(contribution(some_values(0)))
    with pytest.raises(ContributionInvalid):
        decode(message.replace(old, new, 1))


@given(st.binary(max_size=200))
def test_garbage_is_refused(message: bytes) -> None:
    with pytest.raises(ContributionInvalid):
        decode(message)


def test_another_attempt_is_another_group() -> None:
    own = contribution(some_values(0))
    first = dict.fromkeys(PEERS, own)
    again = {**first, PEERS[0]: replace(own, attempt="second")}
    assert group_id_of(first) == group_id_of(dict(reversed(first.items())))
    assert group_id_of(first) != group_id_of(again)


def test_another_hivemind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_known_hivemind()
    for name in averaging_hivemind.KNOWN_SOURCES:
        with monkeypatch.context() as patch:
            patch.setitem(averaging_hivemind.KNOWN_SOURCES, name, "0" * 64)
            with pytest.raises(HivemindChanged, match=name):
                require_known_hivemind()


def test_only_folders_of_the_dead_are_cleared_away(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in ("resbm-averaging-a", "resbm-averaging-b", "something"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "lock").touch()
    held = os.open(alive / "lock", os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        averaging_child.clear_leftovers(tmp_path)
        assert dead.exists()  # too young: it might be just being made
        averaging_child.clear_leftovers(tmp_path, min_age=timedelta(0))
        assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)
    finally:
        os.close(held)


def test_checksums_differ_by_round() -> None:
    values = some_values(0)
    assert (checksums_of("one", values, 2)[0] != checksums_of("two", values, 2)[0]).any()
    assert checksums_of("one", values, 2)[0].shape[1] == NUM_CHECKSUMS


class _Exchange(SumRunner):  # type: ignore[misc]
    """Only what goes on with one member, at the other end of a socket."""

    def __init__(self, streams: Streams, *, num_sums: int) -> None:
        self._p2p, self._prefix = self, None
        self._servicer_type = DecentralizedAverager
        self.ordered_peer_ids = ["here", "there"]
        self.tensor_part_container = self
        self.num_parts_by_peer, self.prefetch = (0, num_sums), 5
        self._streams, self.sums = streams, dict[int, Any]()

    async def call_binary_stream_handler(self, *_: Any) -> tuple[None, asyncio.StreamReader, asyncio.StreamWriter]:
        return None, *self._streams

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[Any]:
        yield averaging_pb2.AveragingData(group_id=b"a part")

    def register_processed_part(self, _: int, part_index: int, part: Any) -> None:
        self.sums[part_index] = part


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def _both_ends() -> AsyncIterator[tuple[Streams, Streams]]:
    here, there = socket.socketpair()
    both = await asyncio.open_connection(sock=here), await asyncio.open_connection(sock=there)
    try:
        yield both
    finally:
        for _, writer in both:
            writer.close()
            await writer.wait_closed()


def _sum_message(value: float) -> Any:
    tensor = torch.tensor([value])
    part = NoCompression().compress(tensor, CompressionInfo.from_tensor(tensor))
    return averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=part)


def test_the_input_of_an_exchange_does_not_end_before_all_sums_are_there() -> None:
    """Its end makes the other side close the stream, and a closed stream may lose what is on its way."""

    async def run() -> None:
        async with _both_ends() as (ours, (reader, writer)):
            runner = _Exchange(ours, num_sums=2)
            exchange = asyncio.create_task(runner._exchange_with("there"))
            assert (await P2P.receive_protobuf(averaging_pb2.AveragingData, reader))[0].group_id == b"a part"
            following = asyncio.create_task(P2P.receive_protobuf(averaging_pb2.AveragingData, reader))
            await P2P.send_protobuf(_sum_message(1.0), writer)
            while 0 not in runner.sums:  # noqa: ASYNC110 - a plain dict
                await asyncio.sleep(0.001)
            assert not following.done()
            await P2P.send_protobuf(_sum_message(2.0), writer)
            assert (await following)[0] is None  # the end
            await exchange
            assert [float(value) for value in runner.sums.values()] == [1.0, 2.0]
            writer.write_eof()
            assert await reader.read() == b""  # closed by that side too once it is by this one

    asyncio.run(run())


@pytest.mark.parametrize("last_word", [None, "no such round"])
def test_an_exchange_whose_stream_ends_early_fails_although_all_has_been_sent(last_word: str | None) -> None:
    async def run() -> None:
        async with _both_ends() as (ours, (reader, writer)):
            exchange = asyncio.create_task(_Exchange(ours, num_sums=2)._exchange_with("there"))
            await P2P.receive_protobuf(averaging_pb2.AveragingData, reader)
            await P2P.send_protobuf(_sum_message(1.0), writer)
            if last_word is not None:
                await P2P.send_protobuf(type(P2P.END_OF_STREAM)(message=last_word), writer)
            writer.close()
            with pytest.raises(AllreduceException, match=last_word or "it closed the stream"):
                await exchange
            assert ours[1].is_closing()

    asyncio.run(run())
