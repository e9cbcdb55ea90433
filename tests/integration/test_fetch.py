"""A stage's state from several peers that may die, lie, stall or attack: whole, verified, or a typed error."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from resbm_pb import stage_pb2
from support.state_peers import LINEAGE, RUN_ID, STEP, Peer, all_chunks, no_links, run, same, serving, tensors

from stage_server import state_files
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import (
    CheckpointInvalid,
    CheckpointUnwritable,
    LinkLost,
    Oversized,
    StageError,
    StateBusy,
    WrongRun,
)
from stage_server.fetch import FetchedState, fetch_state
from stage_server.grpc_links import ERROR_METADATA, stub
from stage_server.server import ServedStage
from stage_server.state_plan import StateProgress
from stage_server.state_serving import MAX_CALLS_PER_DOWNLOAD, StateLimits

SHORT = timedelta(seconds=0.5)
NEVER = timedelta(hours=1)


def peers(folder: Path, num: int = 3, **changes: Any) -> list[Peer]:
    return [Peer(folder / f"peer-{number}", **changes) for number in range(num)]


class Dropped(dict[str, StageError]):
    """Who was left out, and why."""

    def __call__(self, endpoint: str, reason: StageError) -> None:
        self[endpoint] = reason


def assert_whole(state: FetchedState, folder: Path, step: int = STEP) -> None:
    """What came is what was saved, and the folder is a checkpoint of it."""
    assert (state.step, state.lineage) == (step, LINEAGE)
    assert same(state.tensors, tensors(step))
    own = CheckpointStore(folder.parent / f"{folder.name}-adopted", RUN_ID, 1)
    assert own.adopt(folder) == step
    assert same(own.load(step), tensors(step))
    assert own.lineage(step) == LINEAGE


def wait_for(donors: list[Peer], condition: Callable[[], object]) -> None:
    """These give nothing before something is so: a download must not be over before the others have taken part."""

    async def wait(_: int) -> None:
        while not condition():  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.01)

    for donor in donors:
        donor.on_fetch = wait


# -- several donors ---------------------------------------------------------------------------------------------


def test_several_peers_give_one_state_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        told: list[StateProgress] = []
        donors = peers(tmp_path)
        wait_for(donors, lambda: all(donor.requests for donor in donors))
        async with serving(*donors) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", on_progress=told.append)
        listing = donors[0].store.listing(STEP)
        assert set().union(*(donor.requests for donor in donors)) == all_chunks(listing)
        assert_whole(state, tmp_path / "own")
        assert [one.done_bytes for one in told] == sorted({one.done_bytes for one in told})
        assert (told[0].done_bytes, told[0].seconds_left) == (0, None)
        assert (told[-1].done_bytes, told[-1].seconds_left) == (listing.size_bytes, 0)

    run(scenario())


def test_one_peer_is_enough(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(*peers(tmp_path, 1)) as endpoints:
            assert_whole(await fetch_state(endpoints * 2, RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())


def test_a_faster_peer_gives_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        fast, slow = peers(tmp_path, 2)
        slow.on_fetch = lambda _: asyncio.sleep(0.3)
        async with serving(slow, fast) as endpoints:
            await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert len(fast.requests) > len(slow.requests) > 0

    run(scenario())


def test_a_peer_that_dies_midway_is_done_without(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors = peers(tmp_path)

        async def die(number: int) -> None:
            if number == 4:
                donors[1].die()

        wait_for([donors[0], donors[2]], lambda: len(donors[1].requests) >= 4)
        donors[1].on_fetch = die
        async with serving(*donors) as endpoints:
            assert_whole(await fetch_state(endpoints, RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())


def test_all_dying_is_a_lost_link_and_what_came_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors = peers(tmp_path, 2)

        async def die(number: int) -> None:
            if number == 5:
                for donor in donors:
                    donor.die()

        for donor in donors:
            donor.on_fetch = die
        async with serving(*donors) as endpoints:
            with pytest.raises(LinkLost) as error:
                await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert all(endpoint in error.value.cause for endpoint in endpoints)
        assert state_files.begin(tmp_path / "own", donors[0].store.listing(STEP))

    run(scenario())


def test_a_peer_that_sends_wrong_bytes_is_named_and_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors, dropped = peers(tmp_path), Dropped()
        donors[0].spoil()
        wait_for(donors[1:], lambda: dropped)
        async with serving(*donors) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", on_drop=dropped)
        assert_whole(state, tmp_path / "own")
        assert dropped.keys() == {endpoints[0]}
        assert isinstance(dropped[endpoints[0]], CheckpointInvalid)
        assert "wrong bytes" in dropped[endpoints[0]].cause

    run(scenario())


def test_only_liars_are_an_error_with_their_names(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors = peers(tmp_path, 2)
        for donor in donors:
            donor.spoil()
        async with serving(*donors) as endpoints:
            with pytest.raises(CheckpointInvalid, match="wrong bytes") as error:
                await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert all(endpoint in error.value.cause for endpoint in endpoints)
        assert not (tmp_path / "own" / "manifest.json").exists()

    run(scenario())


async def lie_about_hashes(reply: stage_pb2.ListStateReply) -> None:
    reply.files[3].chunk_sha256 = bytes(32)


def test_a_peer_that_lists_other_hashes_than_most_is_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors, dropped = peers(tmp_path), Dropped()
        donors[0].on_list = lie_about_hashes
        wait_for(donors[1:], lambda: dropped)
        async with serving(*donors) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", on_drop=dropped)
        assert_whole(state, tmp_path / "own")
        assert {name: type(error) for name, error in dropped.items()} == {endpoints[0]: CheckpointInvalid}
        assert not donors[0].requests

    run(scenario())


def test_a_file_hash_that_its_chunks_contradict_is_found_in_the_end(tmp_path: Path) -> None:
    """Sole donor, wrong list: the chunks' hashes are true, the file's is not. Nothing becomes a checkpoint."""

    async def scenario() -> None:
        (donor,) = peers(tmp_path, 1)
        true_files = {file.name: file.sha256 for file in donor.store.listing(STEP).files}
        open_file = donor.store.open_file
        donor.store.open_file = lambda step, name, sha256: open_file(step, name, true_files[name])  # type: ignore[method-assign]

        async def lie(reply: stage_pb2.ListStateReply) -> None:
            reply.files[3].sha256 = bytes(32)

        donor.on_list = lie
        async with serving(donor) as endpoints:
            with pytest.raises(CheckpointInvalid, match="though its chunks match"):
                await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert not (tmp_path / "own" / "manifest.json").exists()

    run(scenario())


def test_a_peer_that_stalls_holds_up_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors = peers(tmp_path)

        async def stall(_: int) -> None:
            await asyncio.Event().wait()

        wait_for(donors[:2], lambda: donors[2].requests)
        donors[2].on_fetch = stall
        async with serving(*donors) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", idle_limit=NEVER)
        assert_whole(state, tmp_path / "own")

    run(scenario())


def test_one_honest_peer_among_a_dying_a_lying_and_a_stalled_one_is_enough(tmp_path: Path) -> None:
    async def scenario() -> None:
        _, dying, lying, stalled = donors = peers(tmp_path, 4)

        async def die(number: int) -> None:
            dying.die()

        async def stall(_: int) -> None:
            await asyncio.Event().wait()

        wait_for([donors[0], lying], lambda: all(donor.requests for donor in donors))
        dying.on_fetch, stalled.on_fetch = die, stall
        lying.spoil()
        async with serving(*reversed(donors)) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", idle_limit=NEVER)
        assert_whole(state, tmp_path / "own")

    run(scenario())


def test_a_peer_that_does_not_answer_at_all_holds_up_no_majority(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            nobody = f"127.0.0.1:{silent.getsockname()[1]}"
            async with serving(*peers(tmp_path, 2)) as endpoints:
                await fetch_state([nobody, *endpoints], RUN_ID, tmp_path / "own", idle_limit=NEVER)

    run(scenario())


@pytest.mark.parametrize("silent_in", ["on_list", "on_fetch"])
def test_silence_of_all_is_a_lost_link(silent_in: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        donors, over = peers(tmp_path, 2), asyncio.Event()

        async def wait(_: object) -> None:
            await over.wait()

        for donor in donors:
            if silent_in == "on_fetch":
                donor.on_fetch = wait
            else:
                donor.on_list = wait
        async with serving(*donors) as endpoints:
            with pytest.raises(LinkLost):
                await fetch_state(endpoints, RUN_ID, tmp_path / "own", idle_limit=SHORT)
            over.set()

    run(scenario())


def test_nobody_there_is_a_lost_link(tmp_path: Path) -> None:
    for donors in ([], ["127.0.0.1:1"], ["127.0.0.1:1", "127.0.0.1:2"]):
        with pytest.raises(LinkLost):
            run_fetch(donors, tmp_path)


def run_fetch(endpoints: list[str], folder: Path) -> None:
    async def scenario() -> None:
        await fetch_state(endpoints, RUN_ID, folder)

    run(scenario())


# -- which state ------------------------------------------------------------------------------------------------


def test_peers_that_are_further_give_the_state_that_most_have(tmp_path: Path) -> None:
    async def scenario() -> None:
        behind = [Peer(tmp_path / f"behind-{number}", steps=(2, 4)) for number in range(2)]
        further, dropped = Peer(tmp_path / "further", steps=(2, 4, 6)), Dropped()
        fresh = Peer(tmp_path / "fresh", steps=(6,))
        async with serving(further, *behind, fresh) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", on_drop=dropped)
            assert_whole(state, tmp_path / "own", 6)  # two have 6, two have 4: the first one's
            assert {type(error) for error in dropped.values()} == {LinkLost}
            assert dropped.keys() == {peer.endpoint for peer in behind}
            dropped.clear()
            state = await fetch_state(endpoints[:3], RUN_ID, tmp_path / "again", on_drop=dropped)
            assert_whole(state, tmp_path / "again", 4)
            assert not dropped
            state = await fetch_state(endpoints[:3], RUN_ID, tmp_path / "old", step=3)
            assert_whole(state, tmp_path / "old", 2)
        assert {name for name, _ in further.requests}

    run(scenario())


def test_only_the_lineage_that_is_asked_for_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        dropped = Dropped()
        others = [Peer(tmp_path / f"other-{number}", lineage="another", steps=(4, 6)) for number in range(2)]
        async with serving(*others, *peers(tmp_path, 1)) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", lineage=LINEAGE, on_drop=dropped)
            assert_whole(state, tmp_path / "own")
            assert all("no checkpoint of lineage" in error.cause for error in dropped.values())
            assert len(dropped) == 2
            assert (await fetch_state(endpoints, RUN_ID, tmp_path / "most")).lineage == "another"

    run(scenario())


def test_a_state_that_nobody_has_is_a_lost_link(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(*peers(tmp_path, 2)) as endpoints:
            with pytest.raises(LinkLost, match="no checkpoint up to step 1"):
                await fetch_state(endpoints, RUN_ID, tmp_path / "own", step=1)

    run(scenario())


def test_another_run_is_a_typed_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        stranger, *donors = [Peer(tmp_path / "stranger", run_id="another"), *peers(tmp_path, 2)]
        async with serving(stranger, *donors) as endpoints:
            with pytest.raises(WrongRun) as error:
                await fetch_state(endpoints[:1], RUN_ID, tmp_path / "own")
            assert error.value.code == 202
            assert_whole(await fetch_state(endpoints, RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())


def test_a_state_that_is_too_large_is_refused_at_the_door(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors = peers(tmp_path, 2)
        size_bytes = donors[0].store.listing(STEP).size_bytes
        async with serving(*donors) as endpoints:
            with pytest.raises(Oversized) as error:
                await fetch_state(endpoints, RUN_ID, tmp_path / "own", max_bytes=size_bytes - 1)
            assert error.value.code == 206
            assert not donors[0].requests
            assert not (tmp_path / "own").exists()
            await fetch_state(endpoints, RUN_ID, tmp_path / "own", max_bytes=size_bytes)

    run(scenario())


# -- what is here already ---------------------------------------------------------------------------------------


def test_after_a_cancellation_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    async def scenario() -> None:
        donors, count = peers(tmp_path), itertools.count()
        for donor in donors:
            donor.on_fetch = lambda _: asyncio.sleep(0.02)
        enough = asyncio.Event()

        def on_progress(progress: StateProgress) -> None:
            if next(count) == 6:
                enough.set()

        async with serving(*donors) as endpoints:
            fetching = asyncio.create_task(fetch_state(endpoints, RUN_ID, tmp_path / "own", on_progress=on_progress))
            await enough.wait()
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert not [task for task in asyncio.all_tasks() if "stage_server/fetch.py" in repr(task)]
            await until_no_connection(endpoints)
            listing = donors[0].store.listing(STEP)
            here = {(chunk.name, chunk.offset_bytes) for chunk in state_files.begin(tmp_path / "own", listing)}
            assert len(here) >= 6
            for donor in donors:
                donor.requests.clear()
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert set().union(*(donor.requests for donor in donors)) == all_chunks(listing) - here
        assert_whole(state, tmp_path / "own")

    run(scenario())


async def until_no_connection(endpoints: list[str]) -> None:
    """This process is both ends, so it sees a connection that anyone has left."""
    ports = {int(endpoint.rpartition(":")[2]) for endpoint in endpoints}

    def remote_ports() -> set[int]:
        return {one.raddr.port for one in psutil.Process().net_connections("tcp4") if one.raddr}

    while ports & remote_ports():  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(0.05)


def test_what_is_here_is_not_fetched_again_and_what_is_spoiled_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        (donor,) = peers(tmp_path, 1)
        folder = tmp_path / "own"
        async with serving(donor) as endpoints:
            await fetch_state(endpoints, RUN_ID, folder)
            donor.requests.clear()
            await fetch_state(endpoints, RUN_ID, folder)
            assert not donor.requests
            small, *_, large = sorted(folder.glob("state-*"), key=lambda path: path.stat().st_size)
            data = bytearray(large.read_bytes())
            data[1_500_000] ^= 1
            large.write_bytes(data + b"and more")
            small.write_bytes(small.read_bytes()[:-1])
            assert_whole(await fetch_state(endpoints, RUN_ID, folder), folder)
        assert set(donor.requests) == {(large.name, 1 << 20), (small.name, 0)}

    run(scenario())


def test_a_folder_with_another_state_becomes_this_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        donor = Peer(tmp_path / "peer", steps=(2, 4))
        async with serving(donor) as endpoints:
            await fetch_state(endpoints, RUN_ID, tmp_path / "own", step=2)
            (tmp_path / "own" / "state-00099.safetensors").write_bytes(b"of a state with more files")
            assert_whole(await fetch_state(endpoints, RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())
    assert not list(tmp_path.rglob("state-00099.safetensors"))


def test_a_disk_that_refuses_is_a_typed_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "own" / "state-00003.safetensors").mkdir(parents=True)
        async with serving(*peers(tmp_path, 2)) as endpoints:
            for folder in ("file", "own"):
                with pytest.raises(CheckpointUnwritable):
                    await fetch_state(endpoints, RUN_ID, tmp_path / folder)

    run(scenario())


# -- strange answers --------------------------------------------------------------------------------------------


def shifted(chunk: stage_pb2.StateChunk) -> None:
    chunk.offset_bytes += 1


def longer(chunk: stage_pb2.StateChunk) -> None:
    chunk.data += bytes(1000)


def emptied(chunk: stage_pb2.StateChunk) -> None:
    chunk.data = b""


@pytest.mark.parametrize("spoil", [shifted, longer, emptied])
def test_a_peer_that_sends_what_was_not_asked_for_is_left_out(spoil: Any, tmp_path: Path) -> None:
    class Strange(Peer):
        async def FetchState(self, request: stage_pb2.FetchStateRequest, context: Any) -> None:
            self.requests.append((request.name, request.offset_bytes))
            with self.store.open_file(request.step, request.name) as file:
                file.seek(request.offset_bytes)
                data = file.read(request.length_bytes)
            chunk = stage_pb2.StateChunk(offset_bytes=request.offset_bytes, data=data)
            spoil(chunk)
            await context.write(chunk)

    async def scenario() -> None:
        strange, honest, dropped = Strange(tmp_path / "strange"), Peer(tmp_path / "honest"), Dropped()
        wait_for([honest], lambda: dropped)
        async with serving(strange, honest) as endpoints:
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own", on_drop=dropped)
        assert_whole(state, tmp_path / "own")
        assert isinstance(dropped[endpoints[0]], CheckpointInvalid)

    run(scenario())


def test_a_peer_that_ends_early_is_left_out(tmp_path: Path) -> None:
    class Short(Peer):
        async def FetchState(self, request: stage_pb2.FetchStateRequest, context: Any) -> None:
            return

    async def scenario() -> None:
        async with serving(Short(tmp_path / "short")) as endpoints:
            with pytest.raises(CheckpointInvalid, match="early"):
                await fetch_state(endpoints, RUN_ID, tmp_path / "own")

    run(scenario())


# -- what the server bears --------------------------------------------------------------------------------------


def request_of(peer: Peer, name: str = "state-00000.safetensors") -> stage_pb2.FetchStateRequest:
    return stage_pb2.FetchStateRequest(run_id=RUN_ID, step=STEP, name=name)


def test_only_so_many_download_at_once_and_the_rest_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        (peer,) = peers(tmp_path, 1, limits=StateLimits(max_downloads=1, keep_place=timedelta(0)))
        places = peer._state._slots
        assert places.enter("somebody", time.monotonic())
        async with serving(peer) as (endpoint,), grpc.aio.insecure_channel(endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub(channel).FetchState(request_of(peer)).read()
            assert dict(error.value.trailing_metadata() or ())[ERROR_METADATA] == str(StateBusy.code)
            with pytest.raises(StateBusy):  # whoever has waited for too long gives up
                await fetch_state([endpoint], RUN_ID, tmp_path / "own", idle_limit=SHORT)
            asyncio.get_running_loop().call_later(0.5, lambda: places.leave("somebody", time.monotonic()))
            assert_whole(await fetch_state([endpoint], RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())


def test_a_caller_that_takes_no_bytes_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> None:
        (peer,) = peers(tmp_path, 1, limits=StateLimits(stall_limit=SHORT))
        peer.store.save(STEP, {"large": tensors()["large"].repeat(20)})
        windows = [("grpc.http2.lookahead_bytes", 65_536), ("grpc.http2.bdp_probe", 0)]
        async with serving(peer) as (endpoint,), grpc.aio.insecure_channel(endpoint, options=windows) as channel:
            calls = [stub(channel).FetchState(request_of(peer)) for _ in range(MAX_CALLS_PER_DOWNLOAD)]
            await asyncio.gather(*(call.read() for call in calls))
            while peer._state._slots._calls:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.05)

    run(scenario())


def test_the_rate_is_shared_by_all_downloads(tmp_path: Path) -> None:
    """Two at a time, at a third of the rate that one had without a limit: more than thrice as long on any machine."""

    async def scenario() -> None:
        free = Peer(tmp_path / "free")
        size_bytes = free.store.listing(STEP).size_bytes
        async with serving(free) as endpoints:
            started = time.monotonic()
            await fetch_state(endpoints, RUN_ID, tmp_path / "own")
            alone = time.monotonic() - started
        limited = Peer(tmp_path / "limited", limits=StateLimits(bytes_per_second=size_bytes / alone / 3))
        async with serving(limited) as endpoints:
            started = time.monotonic()
            await asyncio.gather(
                *(fetch_state(endpoints, RUN_ID, tmp_path / f"own-{number}") for number in range(2)),
            )
            together = time.monotonic() - started
        assert together / alone > 3

    run(scenario())


def test_what_is_being_downloaded_survives_pruning(tmp_path: Path) -> None:
    async def scenario() -> None:
        (peer,) = peers(tmp_path, 1)

        async def go_on(number: int) -> None:
            if number == 5:
                peer.store.save(STEP + 2, tensors(), LINEAGE)
                peer.store.prune(STEP + 2)
                assert peer.store.steps() == [STEP, STEP + 2]
            if number == 9:
                peer.store.discard_after(0)
                assert peer.store.steps() == []

        peer.on_fetch = go_on
        async with serving(peer) as endpoints:
            assert_whole(await fetch_state(endpoints, RUN_ID, tmp_path / "own"), tmp_path / "own")

    run(scenario())


def test_a_state_that_was_written_anew_meanwhile_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        (peer,) = peers(tmp_path, 1)
        peer.store.pin = lambda step, lasting: False  # type: ignore[method-assign]

        async def redo(number: int) -> None:
            if number == 5:
                peer.store.save(STEP, tensors(99), LINEAGE)

        peer.on_fetch = redo
        async with serving(peer) as endpoints:
            with pytest.raises(LinkLost, match="another one than asked for"):
                await fetch_state(endpoints, RUN_ID, tmp_path / "own")
            state = await fetch_state(endpoints, RUN_ID, tmp_path / "own")
        assert same(state.tensors, tensors(99))

    run(scenario())


def test_a_copy_of_another_stage_is_given_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        (peer,) = peers(tmp_path, 1)
        copies = CheckpointStore(tmp_path / "copies", RUN_ID, 0)
        copies.save(STEP, {"weight": torch.ones(2)})
        known = {0: copies}
        peer.attach(ServedStage(RUN_ID, stage_pb2.DescribeReply, no_links, peer.store, known.get))
        async with serving(peer) as endpoints:
            copy = await fetch_state(endpoints, RUN_ID, tmp_path / "copy", stage=0)
            assert list(copy.tensors) == ["weight"]
            assert_whole(await fetch_state(endpoints, RUN_ID, tmp_path / "own", stage=1), tmp_path / "own")
            with pytest.raises(LinkLost, match="no state of stage 7"):
                await fetch_state(endpoints, RUN_ID, tmp_path / "other", stage=7)

    run(scenario())
