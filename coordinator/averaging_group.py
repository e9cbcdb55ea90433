"""One member of the rounds: meets exactly the named others, exchanges with them, and believes nothing unverified.

hivemind's averager finds its group through a directory: whoever looks for one at the same time. Here the members of a
round are known beforehand, with their addresses, so each calls each: the answer is what that member puts into the sum,
given when it too has come to the round. Once all have answered, all know the same, and the exchange begins at once;
nobody leads, no clock is compared, and another set of members costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind looks for typing's in the signature

import numpy as np
import torch

from coordinator import averaging_contribution as contributions
from coordinator.averaging_contribution import Contribution, ContributionInvalid, SumWrong, Values, Wire
from coordinator.averaging_failure import AveragingFailed, Reason
from coordinator.averaging_hivemind import (
    CallFailed,
    CompressionBase,
    DecentralizedAverager,
    GroupInfo,
    NoCompression,
    P2PContext,
    PeerID,
    RoundFailed,
    ScaledFloat16Compression,
    SumRunner,
    averaging_pb2,
)
from coordinator.hivemind_parts import split_address

NAMESPACE = f"resbm-averaging-{contributions.PROTOCOL_VERSION}"
PATIENCE = timedelta(seconds=10)
"""How long a caller is kept waiting for this member to come to the round; then it calls again."""
MAX_WAITING = 256
"""Callers kept waiting at once."""
YIELDING, YIELDING_LOOK = timedelta(seconds=2), timedelta(seconds=0.05)
"""How long a member waits to be dialled by another whose part that is, before it dials itself; how often it looks."""
FIRST_RETRY, LAST_RETRY = timedelta(seconds=0.02), timedelta(seconds=0.5)
MAX_ADDRESSES = 16
NUM_REMEMBERED = 64
"""Rounds given up here, of which others are told when they ask."""
CODECS: Mapping[Wire, CompressionBase] = {Wire.FLOAT32: NoCompression(), Wire.FLOAT16: ScaledFloat16Compression()}


@dataclass(frozen=True, slots=True)
class Member:
    """Another averager, and where it can be called."""

    peer: Any  # hivemind's PeerID
    addresses: tuple[Any, ...]  # multiaddresses without the peer id

    @classmethod
    def parse(cls, text: str) -> Member:
        """From full multiaddresses, separated by spaces.

        Raises:
            AveragingFailed: it is no such text, or names several peers.
        """
        try:
            peers, addresses = zip(*map(split_address, text.split()[:MAX_ADDRESSES]), strict=True)
            (peer,) = set(peers)
            return cls(peer, addresses)
        except Exception as error:  # multiaddr and base58 raise what they like
            raise AveragingFailed(Reason.MEMBER_STRANGE, f"{text[:80]!r} is no averager's address: {error}") from error


@dataclass(frozen=True, slots=True)
class Sum:
    """What a round gave; the vector itself is in the averager's `total`."""

    num_microbatches: int
    digest: str
    bytes_sent: int  # of values, as encoded
    bytes_received: int


class _Here:
    """Stands where hivemind expects its DHT, of which only the identity is needed."""

    client_mode = False

    def __init__(self, p2p: Any) -> None:
        self.peer_id = p2p.peer_id


class SumAverager(DecentralizedAverager):  # type: ignore[misc]  # hivemind has no types
    """hivemind's averager in this very process, without its directory and its matchmaking.

    Args:
        p2p: a running network daemon.
        values: float32 [n], read in each round; the caller leaves it alone meanwhile.
        total: float32 [n], where each round leaves its sum.
        wire: how values travel.
    """

    def __init__(self, p2p: Any, values: Values, total: Values, wire: Wire) -> None:
        nothing = torch.zeros(1)  # hivemind would move our vectors to shared memory of its own
        super().__init__([nothing], _Here(p2p), start=False, prefix=NAMESPACE, allow_state_sharing=False)
        self._p2p, self._wire = p2p, wire
        self._values, self._total = values, total
        self._own: Contribution | None = None  # set while in a round
        self._own_changed = asyncio.Event()
        self._given_up: deque[str] = deque(maxlen=NUM_REMEMBERED)  # keys of rounds
        self._num_waiting = 0
        self._runner: SumRunner | None = None
        self._trusted: frozenset[str] = frozenset()  # members whose connections the last round has shown to work
        self.awaited: dict[str, str] = {}  # members that have not come to the round, and how far they were got hold of
        self.total_size = len(values)
        self._pending_groups_registered = asyncio.Event()
        self._pending_groups_registered.set()

    async def serve(self) -> None:
        """From now on others can call."""
        await self.add_p2p_handlers(self._p2p, namespace=NAMESPACE)

    async def addresses(self) -> str:
        """Where others reach this averager: what `Member.parse` reads."""
        full = [str(address) for address in await self._p2p.get_visible_maddrs(latest=True)]
        reachable = [address for address in full if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
        return " ".join(reachable or full)

    async def sum(self, key: str, members: Sequence[Member], count: int) -> Sum:
        """One round with exactly these members, of whom this is one. Cancel it to give it up; a key serves only once.

        Raises:
            AveragingFailed: the round did not take effect. `total` is undefined then.
        """
        by_id = {member.peer.to_base58(): member for member in members}
        own_id = self.peer_id.to_base58()
        if own_id not in by_id or len(by_id) != len(members):
            raise AveragingFailed(Reason.MEMBER_STRANGE, "the members do not hold each averager, and this one, once")
        self._pending_groups_registered.clear()
        began = time.monotonic()
        try:
            own = await asyncio.to_thread(self._contribution, key, tuple(sorted(by_id)), count)
            self._enter(own)
            everyone = await self._meet(own, by_id)
            await self._exchange(everyone)
            self._trusted = frozenset(by_id)
            return await asyncio.to_thread(self._verified, everyone)
        except BaseException:
            self._given_up.append(key)
            if time.monotonic() - began > YIELDING.total_seconds():  # it was waited for somebody, in vain
                self._trusted = frozenset()
            raise
        finally:
            self._enter(None)
            self._pending_groups_registered.set()  # whoever still sends to this round is told that it is over

    def _contribution(self, key: str, members: tuple[str, ...], count: int) -> Contribution:
        checksums, norms = contributions.checksums_of(key, self._values, len(members))
        attempt = secrets.token_hex(8)
        return Contribution(key, members, self._wire, len(self._values), count, attempt, checksums, norms)

    def _enter(self, own: Contribution | None) -> None:
        self._own = own
        self._own_changed.set()
        self._own_changed = asyncio.Event()

    # -- meeting ------------------------------------------------------------------------------------------------

    async def _meet(self, own: Contribution, members: Mapping[str, Member]) -> dict[str, Contribution]:
        """What everyone puts in, once everyone has said so."""
        others = [peer for peer in own.members if peer != self.peer_id.to_base58()]
        self.awaited = dict.fromkeys(others, "not reached")
        try:
            async with asyncio.TaskGroup() as calls:
                answers = {peer: calls.create_task(self._call(members[peer], own)) for peer in others}
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        everyone = {self.peer_id.to_base58(): own} | {peer: answer.result() for peer, answer in answers.items()}
        try:
            contributions.verify_agreement(everyone, own)
        except ContributionInvalid as error:
            raise AveragingFailed(Reason.MEMBER_STRANGE, str(error)) from error
        return everyone

    async def _call(self, member: Member, own: Contribution) -> Contribution:
        """What that member puts in: asks until it is in the round."""
        peer = member.peer.to_base58()
        request = averaging_pb2.JoinRequest(group_key=own.key)
        wait_seconds = FIRST_RETRY.total_seconds()
        if peer not in self._trusted:
            # One whose network was away and is back: TCP would go on with the old connection after as long again.
            with contextlib.suppress(*CallFailed):
                await self._p2p._client.disconnect(member.peer)
        while True:
            with contextlib.suppress(*CallFailed):
                answer = await self._ask(member, request)
                if answer.code == averaging_pb2.PROTOCOL_VIOLATION:
                    raise AveragingFailed(Reason.MEMBER_STRANGE, f"{peer} averages with other members")
                if answer.code == averaging_pb2.CANCELLED:
                    raise AveragingFailed(Reason.MEMBER_LOST, f"{peer} has given the round up")
                if answer.code == averaging_pb2.BEGIN_ALLREDUCE and len(answer.gathered) == 1:
                    self.awaited.pop(peer, None)
                    return self._read(peer, answer.gathered[0])
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LAST_RETRY.total_seconds())

    async def _ask(self, member: Member, request: Any) -> Any:
        await self._reach(member)
        stream = await self.get_stub(self._p2p, member.peer, namespace=NAMESPACE).rpc_join_group(request)
        async with contextlib.aclosing(stream):
            return await anext(stream)

    async def _reach(self, member: Member) -> None:
        """Connects to that member. Raises one of CallFailed.

        Members come to a round at one moment. Two that dial each other then, from the ports that they listen on, meet
        in a single TCP connection (its simultaneous open) which both believe to have dialled, and in which both wait
        for the other's answer until their daemons give up. Over 80 ms that is what happens each time. So the one with
        the smaller id dials.
        """
        peer = member.peer.to_base58()
        if peer < self.peer_id.to_base58():
            await self._be_dialled(member.peer)
        await self._p2p._client.connect(member.peer, member.addresses)  # at once where they are connected
        if peer in self.awaited:
            self.awaited[peer] = "reached, but not in the round"

    async def _be_dialled(self, peer: Any) -> None:
        """Until that member has connected, or should have."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(YIELDING.total_seconds()):
                while all(connected.peer_id != peer for connected in await self._p2p.list_peers()):  # noqa: ASYNC110 - told by another process
                    await asyncio.sleep(YIELDING_LOOK.total_seconds())

    def _read(self, peer: str, message: bytes) -> Contribution:
        try:
            return contributions.decode(message)
        except ContributionInvalid as error:
            raise AveragingFailed(Reason.MEMBER_STRANGE, f"what {peer} says: {error}") from error

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """Another member asks what this one puts in: told once this one has come to the round too."""
        own = await self._arrival(request.group_key)
        if own is None:
            given_up = request.group_key in self._given_up
            code = averaging_pb2.CANCELLED if given_up else averaging_pb2.NOT_LOOKING_FOR_GROUP
            yield averaging_pb2.MessageFromLeader(code=code)
        elif context.remote_id.to_base58() not in own.members:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
        else:
            message = await asyncio.to_thread(contributions.encode, own)
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.BEGIN_ALLREDUCE, gathered=[message])

    async def _arrival(self, key: str) -> Contribution | None:
        """Own contribution to the round of that key; None if this member is not there in time."""
        if self._num_waiting >= MAX_WAITING:
            return None
        self._num_waiting += 1
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                while self._own is None or self._own.key != key:
                    if key in self._given_up:
                        return None
                    await self._own_changed.wait()
                return self._own
        except TimeoutError:
            return None
        finally:
            self._num_waiting -= 1

    # -- exchange -----------------------------------------------------------------------------------------------

    async def _exchange(self, everyone: Mapping[str, Contribution]) -> None:
        """hivemind's all-reduce among those who have met."""
        plain = self.serializer.dumps([None, self.mode.value, self.serializer.dumps(None)])  # all bandwidths alike
        peers = tuple(PeerID.from_base58(peer) for peer in sorted(everyone))
        group = GroupInfo(contributions.group_id_of(everyone), peers, (plain,) * len(peers))
        sizes = contributions.part_sizes(len(self._values), len(peers))
        self._averaged_tensors = torch.split(torch.from_numpy(self._values), sizes[0])
        self._runner = None
        with self._register_allreduce_group(group):
            running = self._running_groups[group.group_id]
            try:
                await self._aggregate_with_group(group, weight=1.0, min_vector_size=0)
            except Exception as error:  # hivemind wraps everything in one type; the runner knows more
                raise _failure_of(self._runner, error) from error
            finally:
                running.cancel()  # where it did not begin: nobody shall wait for it

    async def _run_allreduce_inplace_(
        self, tensors: Sequence[torch.Tensor], group_info: Any, *, peer_fractions: Sequence[float], weight: float
    ) -> None:
        """What hivemind's averager calls in its round: one part is one tensor, and the sums go to `total`."""
        runner = self._runner = SumRunner(
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=NAMESPACE,
            group_id=group_info.group_id,
            tensors=tensors,
            weight=weight,
            ordered_peer_ids=group_info.peer_ids,
            peer_fractions=tuple(peer_fractions),
            compression=CODECS[self._wire],
            part_size_bytes=4 * contributions.MAX_PART_VALUES,
        )
        self._running_groups[group_info.group_id].set_result(runner)
        rest = torch.from_numpy(self._total)
        async with contextlib.aclosing(runner.sums()) as sums:
            async for part in sums:
                rest[: len(part)] = part
                rest = rest[len(part) :]

    def _verified(self, everyone: Mapping[str, Contribution]) -> Sum:
        runner = self._runner
        assert runner is not None
        try:
            contributions.verify_sum(self._total, list(everyone.values()))
        except SumWrong as error:
            raise AveragingFailed(Reason.NOT_VERIFIED, str(error)) from error
        return Sum(
            num_microbatches=sum(each.count for each in everyone.values()),
            digest=digest_of(self._total),
            bytes_sent=runner.bytes_sent,
            bytes_received=runner.bytes_received,
        )


def digest_of(values: Values) -> str:
    """BLAKE2b of the bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).hexdigest()


def _failure_of(runner: SumRunner | None, error: Exception) -> AveragingFailed:
    if runner is not None and runner.failure.done():
        failure: RoundFailed = runner.failure.result()
        if failure.peer is None:
            return AveragingFailed(Reason.EXCHANGE_FAILED, str(failure))
        return AveragingFailed(Reason.MEMBER_LOST, f"the exchange with {failure.peer} broke: {failure}")
    return AveragingFailed(Reason.EXCHANGE_FAILED, str(error))
