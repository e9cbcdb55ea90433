"""Getting a stage's state from several peers that serve it, at once: agreed on, in hashed chunks, resumable.

Every peer is asked what it has. Those who list the same state as most give chunks of it side by side; each chunk is
believed by its hash. A peer that lies, breaks off again and again or falls silent is left out, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple, ParamSpec, TypeVar

import grpc
from torch import Tensor

from stage_server import state_files
from stage_server.errors import CheckpointInvalid, CheckpointUnwritable, LinkLost, StageError, StateBusy
from stage_server.grpc_links import channel_options
from stage_server.state_donor import Donor, Silent
from stage_server.state_listing import StateListing, choose
from stage_server.state_plan import Chunk, FetchPlan, StateProgress

MAX_STATE_BYTES: Final = 64 << 30
IDLE_LIMIT: Final = timedelta(seconds=30)
ATTEMPTS: Final = 5  # in a row, before a peer that breaks off is left out
PAUSE_SECONDS: Final = 0.1  # after the first of them; doubles
BUSY_PAUSE_SECONDS: Final = 1.0
IN_FLIGHT: Final = 3  # chunks that one peer is asked for at a time: the next is under way while one is verified

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class FetchedState(NamedTuple):
    """A state, now in the folder too: weights and optimizer by name, the step, and the history it belongs to."""

    tensors: dict[str, Tensor]
    step: int
    lineage: str


async def fetch_state(
    donors: Sequence[str],
    run_id: str,
    folder: Path,
    *,
    stage: int | None = None,
    step: int | None = None,
    lineage: str | None = None,
    on_progress: Callable[[StateProgress], None] | None = None,
    on_drop: Callable[[str, StageError], None] | None = None,
    max_bytes: int = MAX_STATE_BYTES,
    idle_limit: timedelta = IDLE_LIMIT,
) -> FetchedState:
    """Downloads the state of a stage into `folder`, from all `donors` together, and returns it.

    Chunks that are in `folder` already are not fetched again. In the end the folder is a checkpoint
    (`CheckpointStore.adopt`). May be cancelled at any moment; another call goes on where this one stopped.

    Args:
        donors: peers of the stage, "host:port"; of states that equally many list, the first one's is taken.
        run_id: run whose state is wanted.
        folder: made if need be; nobody else may write in it.
        stage: stage whose state is wanted, of donors that may keep copies of others' beside their own; None: their own.
        step: the newest state at or before it; None: the newest.
        lineage: only a state of this history; None: of any.
        on_progress: told after every chunk.
        on_drop: told who gives no (more) state, and why.
        max_bytes: a larger state is refused before anything is fetched.
        idle_limit: a peer that sends nothing for so long is left out.

    Raises:
        LinkLost: no donor is left, for different reasons or because none can be reached.
        WrongRun, Oversized, CheckpointInvalid, StateBusy: no donor is left, and that is what is wrong with all of them.
        CheckpointInvalid: the files are no state though all their chunks are right.
        CheckpointUnwritable: the disk refuses.
    """
    names = list(dict.fromkeys(donors))
    idle_seconds = idle_limit.total_seconds()
    async with contextlib.AsyncExitStack() as stack:
        download = _Download(names, folder, step, idle_seconds, _Callbacks(on_progress, on_drop))
        peers = []
        for name in names:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(name, options=channel_options(0)))
            peers.append(
                Donor(
                    name,
                    channel,
                    run_id=run_id,
                    stage=stage,
                    lineage=lineage,
                    max_bytes=max_bytes,
                    idle_seconds=idle_seconds,
                )
            )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(download.with_donor(peer)) for peer in peers]
            failure: StageError | None = None
            try:
                listing = await download.completed()
            except StageError as error:
                failure = error
            for task in tasks:
                task.cancel()
    if failure:
        raise failure
    tensors = await _in_thread(state_files.finish, folder, run_id, listing)
    return FetchedState(tensors, listing.step, listing.lineage)


@dataclass(frozen=True, slots=True)
class _Callbacks:
    on_progress: Callable[[StateProgress], None] | None
    on_drop: Callable[[str, StageError], None] | None


class _Download:
    """What the tasks of one download share. Whoever changes something calls `_tell`; waiters look again."""

    def __init__(
        self, names: Sequence[str], folder: Path, step: int | None, idle_seconds: float, callbacks: _Callbacks
    ) -> None:
        self._names, self._folder, self._step = names, folder, step
        self._idle_seconds, self._callbacks = idle_seconds, callbacks
        self._listings: dict[str, StateListing] = {}
        self._dropped: dict[str, StageError] = {}
        self._heard: dict[str, float] = {}  # who gives chunks, and when it last did
        self._plan: FetchPlan | None = None
        self._listing: StateListing | None = None
        self._unwritable: CheckpointUnwritable | None = None
        self._news = asyncio.Event()

    async def completed(self) -> StateListing:
        """The state, once every chunk of it is on the disk. Raises as `fetch_state`."""
        while (listing := self._choice()) is None:
            self._check_that_someone_is_left()
            await self._news.wait()
        self._listing = listing
        here = await asyncio.to_thread(state_files.begin, self._folder, listing)
        self._plan = plan = FetchPlan(listing, here, time.monotonic())
        self._tell_progress(plan)
        while not plan.is_complete:
            self._check_that_someone_is_left()
            await self._news.wait()
        return listing

    async def with_donor(self, donor: Donor) -> None:
        """Everything that one peer is asked for, until the state is complete or the peer is left out."""
        try:
            listing = await donor.listing(self._step)
            self._listings[donor.endpoint] = listing
            self._tell()
            plan, chosen = await self._agreed()
            if listing.step > chosen.step:
                listing = await donor.listing(chosen.step)
            if listing != chosen:
                raise _disagreement(donor.endpoint, listing, chosen)
            self._heard[donor.endpoint] = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(self._fetch_chunks(donor, plan, chosen.step))
        except* StageError as errors:
            self._drop(donor.endpoint, errors.exceptions[0])

    def _choice(self) -> StateListing | None:
        in_order = {name: self._listings[name] for name in self._names if name in self._listings}
        silent = len(self._names) - len(self._listings.keys() | self._dropped.keys())
        return choose(in_order, silent)

    async def _agreed(self) -> tuple[FetchPlan, StateListing]:
        while self._plan is None or self._listing is None:
            await self._news.wait()
        return self._plan, self._listing

    async def _fetch_chunks(self, donor: Donor, plan: FetchPlan, step: int) -> None:
        failures = 0
        while not plan.is_complete:
            chunk = plan.claim(donor.endpoint, time.monotonic())
            if chunk is None:
                await self._news_or_overdue(plan)
                continue
            try:
                await self._fetch_chunk(donor, plan, step, chunk)
                failures = 0
            except StateBusy:
                if time.monotonic() - self._heard[donor.endpoint] > self._idle_seconds:
                    raise
                await asyncio.sleep(BUSY_PAUSE_SECONDS)
            except Silent:
                raise
            except LinkLost:
                failures += 1
                if failures >= ATTEMPTS:
                    raise
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (failures - 1))

    async def _fetch_chunk(self, donor: Donor, plan: FetchPlan, step: int, chunk: Chunk) -> None:
        try:
            data = await donor.chunk(step, chunk, lambda: not plan.is_here(chunk))
            if data is None:
                return
            self._heard[donor.endpoint] = time.monotonic()
            if not await _in_thread(state_files.put, self._folder, chunk, data):
                raise CheckpointInvalid(f"{donor.endpoint} sent wrong bytes of {chunk.name}")
            if plan.arrived(donor.endpoint, chunk, time.monotonic()):
                self._tell_progress(plan)
        finally:
            plan.give_back(donor.endpoint, chunk)
            self._tell()

    async def _news_or_overdue(self, plan: FetchPlan) -> None:
        """Until something has changed, or so long that a chunk may have become overdue with another peer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(plan.patience_seconds() / 4):
                await self._news.wait()

    def _drop(self, endpoint: str, reason: Exception) -> None:
        if isinstance(reason, CheckpointUnwritable):
            self._unwritable = reason
        elif isinstance(reason, StageError):
            log.warning("no more state from %s: %s", endpoint, reason)
            self._dropped[endpoint] = reason
            self._listings.pop(endpoint, None)
            if self._callbacks.on_drop is not None:
                self._callbacks.on_drop(endpoint, reason)
        self._tell()

    def _check_that_someone_is_left(self) -> None:
        if self._unwritable:
            raise self._unwritable
        if len(self._dropped) == len(self._names):
            raise _nobody_left(self._dropped)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _tell_progress(self, plan: FetchPlan) -> None:
        if self._callbacks.on_progress is not None:
            self._callbacks.on_progress(plan.progress(time.monotonic()))
        self._tell()


def _disagreement(endpoint: str, listing: StateListing, chosen: StateListing) -> StageError:
    theirs, ours = (f"step {one.step} of {one.lineage!r}" for one in (listing, chosen))
    if theirs != ours:
        return LinkLost(f"{endpoint} holds {theirs}, not {ours}")
    return CheckpointInvalid(f"{endpoint} lists other files of {ours} than most, or the first, of the peers asked")


def _nobody_left(dropped: Mapping[str, StageError]) -> StageError:
    """If the same is wrong with all, that; else that there is no one."""
    causes = "; ".join(error.cause for error in dropped.values()) or "nobody was named"
    kinds = {type(error) for error in dropped.values()}
    kind = kinds.pop() if len(kinds) == 1 else LinkLost
    return LinkLost(causes) if issubclass(kind, LinkLost) else kind(causes)


async def _in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Off the event loop, and to its end even when cancelled: nobody writes in the folder after we have returned."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
