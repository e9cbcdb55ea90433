"""Sharing a step's microbatches among sources, and what replicas tell each other on the wire."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resbm_pb import replicas_pb2

from coordinator.agreement import Averaged, Round, StageAgreement, Tally
from node.replication.contacts import SIGHT, Contact
from node.replication.duties import News, ReplicaDuties, sizes
from node.replication.messages import (
    ReplicaWord,
    decode_round,
    decode_word,
    encode_round,
    encode_word,
)
from node.replication.sources import next_source, spans
from stage_server.errors import FrameError
from stage_server.ledger import StageLedger
from stage_server.plan import Plan
from stage_server.work import Forward, Side

PLAN = Plan(steps=3, microbatches_per_step=6, evaluation_microbatches=2, evaluate_every=2)

# -- sources ----------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.0, 100.0), min_size=1),
    st.integers(0, 200),
)
def test_spans_are_all_microbatches_once_in_the_proportion_of_throughput(
    throughputs: dict[str, float], microbatches: int
) -> None:
    shared = spans(throughputs, microbatches)
    assert sorted(index for span in shared.values() for index in span) == list(range(microbatches))
    total = sum(throughputs.values())
    if total > 0:
        for peer, span in shared.items():
            assert abs(len(span) - microbatches * throughputs[peer] / total) <= 1


def test_a_source_works_through_its_own_and_then_helps_from_the_far_end() -> None:
    shared = spans({"a": 1.0, "b": 1.0}, 8)
    everything = set(range(8))
    assert next_source("a", everything, set(), shared) == 0
    assert next_source("b", everything, {0}, shared) == 4
    assert next_source("a", {4, 5, 6, 7}, {4}, shared) == 7  # its own are begun
    assert next_source("a", {7}, {7}, shared) is None


def test_what_a_dead_source_had_begun_is_taken_over() -> None:
    assert next_source("a", {4, 5}, set(), spans({"a": 1.0}, 8)) == 4


@given(st.integers(1, 5), st.integers(1, 40), st.randoms())
def test_sources_together_begin_everything_once_when_they_hear_each_other(
    num_sources: int, microbatches: int, chance: object
) -> None:
    names = [f"source-{number}" for number in range(num_sources)]
    shared = spans(dict.fromkeys(names, 1.0), microbatches)
    begun: dict[str, set[int]] = {name: set() for name in names}
    for _ in range(microbatches):
        name = chance.choice(names)  # type: ignore[attr-defined]
        taken = set().union(*(begun[other] for other in names if other != name))
        index = next_source(name, set(range(microbatches)) - begun[name], taken, shared)
        assert index is not None
        begun[name].add(index)
    assert sorted(index for indices in begun.values() for index in indices) == list(range(microbatches))


def first_stage(name: str) -> ReplicaDuties:
    ledger = StageLedger(PLAN, stage=0, num_stages=2, checkpoints=(0,), checkpoint_every=100, shared=True)
    ledger.opened(Side.DOWNSTREAM, 0, [], "next")
    return ReplicaDuties(ledger, StageAgreement(name, sizes(PLAN)))


def test_replicas_of_the_first_stage_begin_what_the_other_has_not() -> None:
    a, b = first_stage("a"), first_stage("b")
    for duties in (a, b):
        duties.in_sight({"a": 1.0, "b": 1.0})
    begun = []
    for mine, other in ((a, b), (b, a)):
        task = mine.ledger.next_task()
        assert isinstance(task, Forward)
        mine.ledger.forwarded(task.name, "latents")
        begun.append(task.name)
        other.receive_news(mine.agreement.peer, mine.news())
    assert len(set(begun)) == 2


def test_a_step_has_its_evaluations_too_and_the_closing_step_nothing_else() -> None:
    size = sizes(PLAN)
    assert [size(step) for step in range(7)] == [0, 8, 6, 8, 2, 0, 0]
    order = PLAN.microbatches(1)
    assert [PLAN.position(name) for name in order] == list(range(8))


# -- messages ---------------------------------------------------------------------------------------------------

indices = st.frozensets(st.integers(0, 1000), max_size=20)
losses = st.dictionaries(st.integers(0, 1000), st.floats(allow_nan=False, allow_infinity=False), max_size=8)
texts = st.text(max_size=40)
numbers = st.integers(0, 2**63)


@st.composite
def words(draw: Callable[..., object]) -> ReplicaWord:
    peer = draw(texts)
    tally = Tally(
        peer=peer,  # type: ignore[arg-type]
        version=draw(numbers),  # type: ignore[arg-type]
        committed=draw(numbers),  # type: ignore[arg-type]
        lineage=draw(texts),  # type: ignore[arg-type]
        counted=draw(indices),  # type: ignore[arg-type]
        round=draw(numbers),  # type: ignore[arg-type]
        averaged=draw(st.none() | st.builds(Averaged, numbers, texts)),  # type: ignore[arg-type]
        failed=draw(numbers),  # type: ignore[arg-type]
        resyncing=draw(st.booleans()),  # type: ignore[arg-type]
    )
    news = News(draw(numbers), draw(indices), draw(losses), draw(losses))  # type: ignore[arg-type]
    serving = draw(st.booleans())
    return ReplicaWord(peer, "host:1", 1.5, 2.5, "averager", serving, tally, news)  # type: ignore[arg-type]


@given(words())
def test_a_word_arrives_as_it_was_said(word: ReplicaWord) -> None:
    wire = encode_word(word).SerializeToString()
    assert decode_word(replicas_pb2.Replica.FromString(wire)) == word


@given(st.dictionaries(texts, st.frozensets(st.integers(0, 9)), max_size=3), numbers, numbers, texts)
def test_a_round_arrives_as_it_was_proposed_or_is_refused(
    shares: dict[str, frozenset[int]], step: int, number: int, lineage: str
) -> None:
    proposed = Round(step, number, lineage, shares)
    message = replicas_pb2.Round.FromString(encode_round(proposed).SerializeToString())
    given_out = [index for share in shares.values() for index in share]
    if len(set(given_out)) == len(given_out):
        assert decode_round(message) == proposed
    else:
        with pytest.raises(FrameError, match="twice"):
            decode_round(message)


@pytest.mark.parametrize(
    "message",
    [
        replicas_pb2.Replica(peer_id="x" * 513),
        replicas_pb2.Replica(throughput=math.nan),
        replicas_pb2.Replica(throughput=-1.0),
        replicas_pb2.Replica(reserved_at=math.inf),
        replicas_pb2.Replica(tally=replicas_pb2.Tally(counted=[1 << 20])),
        replicas_pb2.Replica(news=replicas_pb2.News(done=[0], losses=[math.nan])),
        replicas_pb2.Replica(news=replicas_pb2.News(done=[1 << 21], losses=[1.0])),
    ],
    ids=["long name", "nan", "negative", "infinite", "far microbatch", "nan loss", "far loss"],
)
def test_a_word_that_cannot_be_is_refused(message: replicas_pb2.Replica) -> None:
    with pytest.raises(FrameError):
        decode_word(message)


# -- who is in sight --------------------------------------------------------------------------------------------


def contact(*heard_at: float) -> Contact:
    known = Contact("peer", "host:1")
    for now in heard_at:
        known.hears(now)
    return known


def test_who_says_nothing_for_a_while_is_out_of_sight() -> None:
    assert contact(10.0).is_in_sight(10.0 + SIGHT.least - 0.1)
    assert not contact(10.0).is_in_sight(10.0 + SIGHT.least + 0.1)
    assert not Contact("peer", "host:1").is_in_sight(0.0)


def test_who_refuses_at_once_is_gone_until_it_speaks_again() -> None:
    gone = contact(10.0)
    gone.refusals = 2
    assert not gone.is_in_sight(10.1)
    gone.hears(10.2)
    assert gone.is_in_sight(10.3)
