"""Which chunk comes from whom: nothing is forgotten, nobody is asked twice at once, slow peers hold up no one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stage_server.state_listing import CHUNK_BYTES, StateFile, StateListing, num_chunks
from stage_server.state_plan import MIN_PATIENCE_SECONDS, PATIENCE, SPEED_WINDOW_SECONDS, Chunk, FetchPlan, chunks_of


def state_file(name: str, size_bytes: int) -> StateFile:
    hashes = [hashlib.sha256(f"{name} {index}".encode()).digest() for index in range(num_chunks(size_bytes))]
    return StateFile(name, size_bytes, hashlib.sha256(name.encode()).digest(), tuple(hashes))


def state(*sizes: int) -> StateListing:
    return StateListing(1, 10, "history", tuple(state_file(f"file-{n}", size) for n, size in enumerate(sizes)))


def chunks(listing: StateListing) -> list[Chunk]:
    return [chunk for file in listing.files for chunk in chunks_of(file)]


@given(st.integers(0, 5 * CHUNK_BYTES))
def test_chunks_are_a_file_cut_into_pieces(size_bytes: int) -> None:
    place = 0
    for chunk in chunks_of(state_file("a", size_bytes)):
        assert chunk.offset_bytes == place
        assert 0 < chunk.size_bytes <= CHUNK_BYTES
        place += chunk.size_bytes
    assert place == size_bytes


DONORS = ("a", "b", "c")


class AnyDownload(RuleBasedStateMachine):
    """Peers take, bring, fail and are left out in any order; what the plan says must stay true."""

    @initialize(sizes=st.lists(st.integers(0, 4 * CHUNK_BYTES), min_size=1, max_size=4), seed=st.randoms())
    def start(self, sizes: list[int], seed: object) -> None:
        self.listing = state(*sizes)
        everything = chunks(self.listing)
        self.here = set(everything[: len(everything) // 3])
        self.now = 0.0
        self.plan = FetchPlan(self.listing, self.here, self.now)
        self.held: dict[str, list[Chunk]] = {donor: [] for donor in DONORS}

    @rule(donor=st.sampled_from(DONORS))
    def take(self, donor: str) -> None:
        chunk = self.plan.claim(donor, self.now)
        if chunk is not None:
            assert chunk not in self.here
            assert chunk not in self.held[donor]
            self.held[donor].append(chunk)

    @rule(donor=st.sampled_from(DONORS), position=st.integers(0, 9))
    def bring(self, donor: str, position: int) -> None:
        if self.held[donor]:
            chunk = self.held[donor].pop(position % len(self.held[donor]))
            assert self.plan.arrived(donor, chunk, self.now) == (chunk not in self.here)
            self.here.add(chunk)

    @rule(donor=st.sampled_from(DONORS), position=st.integers(0, 9))
    def fail(self, donor: str, position: int) -> None:
        if self.held[donor]:
            self.plan.give_back(donor, self.held[donor].pop(position % len(self.held[donor])))

    @rule(donor=st.sampled_from(DONORS))
    def leave(self, donor: str) -> None:
        while self.held[donor]:
            self.plan.give_back(donor, self.held[donor].pop())

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: hasattr(self, "plan"))
    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        everything = set(chunks(self.listing))
        assert self.plan.is_complete == (self.here == everything)
        progress = self.plan.progress(self.now)
        assert progress.done_bytes == sum(chunk.size_bytes for chunk in self.here)
        assert progress.total_bytes == self.listing.size_bytes
        assert (progress.seconds_left == 0) == (progress.done_bytes == progress.total_bytes)
        assert all(self.plan.is_here(chunk) == (chunk in self.here) for chunk in everything)

    def teardown(self) -> None:
        """One honest peer is enough to end every history."""
        if hasattr(self, "plan"):
            for donor in DONORS:
                self.leave(donor)
            while (chunk := self.plan.claim("a", self.now)) is not None:
                assert self.plan.arrived("a", chunk, self.now)
            assert self.plan.is_complete


TestAnyDownload = AnyDownload.TestCase
TestAnyDownload.settings = settings(max_examples=40, stateful_step_count=30)


def plan_of(num: int) -> tuple[FetchPlan, list[Chunk]]:
    listing = state(num * CHUNK_BYTES)
    return FetchPlan(listing, [], 0.0), chunks(listing)


def test_chunks_are_taken_in_order_and_what_failed_first() -> None:
    plan, every = plan_of(3)
    assert [plan.claim("a", 0), plan.claim("b", 0)] == every[:2]
    plan.give_back("a", every[0])
    assert [plan.claim("b", 0), plan.claim("a", 0)] == [every[0], every[2]]


def test_a_faster_peer_gives_more() -> None:
    plan, _ = plan_of(100)
    busy_until, given_by = {"slow": 0.0, "fast": 0.0}, {"slow": 0, "fast": 0}
    seconds = {"slow": 4.0, "fast": 1.0}
    while not plan.is_complete:
        donor = min(busy_until, key=busy_until.__getitem__)
        now = busy_until[donor]
        chunk = plan.claim(donor, now)
        assert chunk
        busy_until[donor] = now + seconds[donor]
        given_by[donor] += plan.arrived(donor, chunk, busy_until[donor])
    assert given_by == {"slow": 20, "fast": 80}


def test_a_chunk_that_takes_too_long_is_given_to_another_peer_too() -> None:
    plan, (first, second) = plan_of(2)
    assert (plan.claim("slow", 0), plan.claim("fast", 0)) == (first, second)
    assert plan.arrived("fast", second, 2.0)
    assert plan.patience_seconds() == pytest.approx(2.0 * PATIENCE)
    assert plan.claim("fast", 5.9) is None
    assert plan.claim("slow", 6.1) is None  # it has it already
    assert plan.claim("fast", 6.1) == first
    assert plan.claim("third", 6.2) is None  # the second one gets its time too
    plan.give_back("slow", first)
    assert plan.claim("third", 6.3) is None
    assert plan.arrived("fast", first, 7.0)
    assert not plan.arrived("slow", first, 7.1)
    assert plan.is_complete


def test_patience_without_experience_has_a_floor() -> None:
    plan, (first,) = plan_of(1)
    assert plan.claim("a", 0) == first
    assert plan.claim("b", MIN_PATIENCE_SECONDS * 0.9) is None
    assert plan.claim("b", MIN_PATIENCE_SECONDS) == first


def test_the_rest_is_estimated_from_the_last_seconds() -> None:
    plan, every = plan_of(40)
    assert plan.progress(3.0).seconds_left is None
    for number in range(10):  # one a second, then two a second
        plan.arrived("a", every[number], number + 1.0)
    assert plan.progress(10.0).bytes_per_second == pytest.approx(CHUNK_BYTES)
    assert plan.progress(10.0).seconds_left == pytest.approx(30)
    for number in range(20):
        plan.arrived("a", every[10 + number], 10 + (number + 1) / 2)
    progress = plan.progress(10 + SPEED_WINDOW_SECONDS)
    assert progress.bytes_per_second == pytest.approx(2 * CHUNK_BYTES)
    assert progress.seconds_left == pytest.approx(5)
    assert plan.progress(1000.0).seconds_left != progress.seconds_left  # a stall shows


def test_what_was_here_before_is_no_speed() -> None:
    listing = state(4 * CHUNK_BYTES)
    plan = FetchPlan(listing, chunks(listing)[:3], 0.0)
    assert plan.progress(1.0).done_bytes == 3 * CHUNK_BYTES
    assert plan.progress(1.0).bytes_per_second == 0


def test_no_rate_is_measured_in_no_time() -> None:
    plan, (first, _) = plan_of(2)
    assert plan.claim("a", 0.0) == first
    assert plan.arrived("a", first, 0.0)
    assert plan.progress(5e-324).seconds_left is None
    assert plan.progress(1.0).seconds_left == pytest.approx(1.0)
