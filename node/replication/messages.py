"""What replicas tell each other, to and from the wire (proto/replicas.proto). What does not make sense is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resbm_pb import replicas_pb2

from coordinator.agreement import Averaged, Round, Tally
from node.replication.duties import News
from stage_server.errors import Oversized, ProtocolViolation

MAX_MICROBATCHES = 1 << 20  # of a step
MAX_TEXT = 512  # characters of a name, an address or a digest
MAX_MEMBERS = 4096


@dataclass(frozen=True, slots=True)
class ReplicaWord:
    """One replica, in its own words."""

    peer_id: str
    endpoint: str  # "host:port" of its stage service
    reserved_at: float  # Unix time in seconds
    throughput: float  # microbatches per second
    averager: str  # address of its averaging process; empty while it has none
    serving: bool
    tally: Tally
    news: News


def encode_word(word: ReplicaWord) -> replicas_pb2.Replica:
    """The message of one replica's word."""
    tally, news = word.tally, word.news
    averaged = tally.averaged
    return replicas_pb2.Replica(
        peer_id=word.peer_id,
        endpoint=word.endpoint,
        reserved_at=word.reserved_at,
        throughput=word.throughput,
        averager_id=word.averager,
        serving=word.serving,
        tally=replicas_pb2.Tally(
            version=tally.version,
            committed=tally.committed,
            lineage=tally.lineage,
            counted=sorted(tally.counted),
            round=tally.round,
            averaged=None if averaged is None else replicas_pb2.Averaged(round=averaged.round, digest=averaged.digest),
            failed=tally.failed,
            resyncing=tally.resyncing,
        ),
        news=replicas_pb2.News(
            committed=news.committed,
            begun=sorted(news.begun),
            done=list(news.losses),
            losses=list(news.losses.values()),
            earlier_done=list(news.earlier_losses),
            earlier_losses=list(news.earlier_losses.values()),
        ),
    )


def decode_word(message: replicas_pb2.Replica) -> ReplicaWord:
    """Raises Oversized, ProtocolViolation."""
    tally, news = message.tally, message.news
    _check_texts(message.peer_id, message.endpoint, message.averager_id, tally.lineage, tally.averaged.digest)
    if not (math.isfinite(message.throughput) and message.throughput >= 0 and math.isfinite(message.reserved_at)):
        raise ProtocolViolation("a replica's throughput or claim is no number")
    averaged = Averaged(tally.averaged.round, tally.averaged.digest) if tally.HasField("averaged") else None
    return ReplicaWord(
        peer_id=message.peer_id,
        endpoint=message.endpoint,
        reserved_at=message.reserved_at,
        throughput=message.throughput,
        averager=message.averager_id,
        serving=message.serving,
        tally=Tally(
            peer=message.peer_id,
            version=tally.version,
            committed=tally.committed,
            lineage=tally.lineage,
            counted=_indices(tally.counted),
            round=tally.round,
            averaged=averaged,
            failed=tally.failed,
            resyncing=tally.resyncing,
        ),
        news=News(
            committed=news.committed,
            begun=_indices(news.begun),
            losses=_losses(news.done, news.losses),
            earlier_losses=_losses(news.earlier_done, news.earlier_losses),
        ),
    )


def encode_round(proposed: Round) -> replicas_pb2.Round:
    """The message of a round."""
    shares = (replicas_pb2.Share(peer_id=p, microbatches=sorted(share)) for p, share in proposed.shares.items())
    return replicas_pb2.Round(step=proposed.step, number=proposed.number, lineage=proposed.lineage, shares=list(shares))


def decode_round(message: replicas_pb2.Round) -> Round:
    """Raises Oversized, ProtocolViolation."""
    if len(message.shares) > MAX_MEMBERS:
        raise Oversized(f"a round of {len(message.shares)} members")
    _check_texts(message.lineage, *(share.peer_id for share in message.shares))
    shares: Mapping[str, frozenset[int]] = {share.peer_id: _indices(share.microbatches) for share in message.shares}
    given = [index for share in shares.values() for index in share]
    if len(shares) != len(message.shares) or len(set(given)) != len(given):
        raise ProtocolViolation("a round gives something twice")
    return Round(step=message.step, number=message.number, lineage=message.lineage, shares=shares)


def _indices(numbers: Iterable[int]) -> frozenset[int]:
    indices = frozenset(numbers)
    if max(indices, default=0) >= MAX_MICROBATCHES:
        raise Oversized(f"microbatch {max(indices)} of one step")
    return indices


def _losses(done: Iterable[int], losses: Iterable[float]) -> Mapping[int, float]:
    known = dict(zip(done, losses, strict=False))
    if max(known, default=0) >= MAX_MICROBATCHES or not all(map(math.isfinite, known.values())):
        raise ProtocolViolation("losses that cannot be")
    return known


def _check_texts(*texts: str) -> None:
    if max(map(len, texts)) > MAX_TEXT:
        raise Oversized(f"a replica's text of {max(map(len, texts))} characters")
