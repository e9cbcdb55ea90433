"""What one replica decides when it loses sight of another at the wrong moment."""

from __future__ import annotations

from typing import TypeVar

import pytest

from coordinator.agreement import Action, Average, Commit, Propose, Round, StageAgreement, descend

CLAIMS = {"a": 1.0, "b": 2.0, "c": 3.0}
DIGEST = "the sum"


T = TypeVar("T", bound=Action)


def of_kind(actions: list[Action], kind: type[T]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


class Stage:
    """Replicas that hear each other at once, unless told otherwise; each has counted one microbatch of three."""

    def __init__(self) -> None:
        self.members = {name: StageAgreement(name, lambda _: 3) for name in CLAIMS}
        self.committed: dict[str, str] = {}
        for agreement in self.members.values():
            agreement.in_sight(self.members, CLAIMS)
        for index, agreement in enumerate(self.members.values()):
            agreement.count(index)

    def tell(self, name: str, *to: str) -> list[Action]:
        """The newest tally of one to some; what they decide."""
        decided = []
        for other in to:
            actions = self.members[other].receive_tally(self.members[name].tally())
            self._note(other, actions)
            decided += actions
        return decided

    def averaged(self, name: str, digest: str | None = DIGEST) -> list[Action]:
        actions = self.members[name].averaged(1, digest, 3)
        self._note(name, actions)
        return actions

    def loses_sight(self, name: str, of: str) -> list[Action]:
        actions = self.members[name].in_sight(self.members.keys() - {of}, CLAIMS)
        self._note(name, actions)
        return actions

    def in_round(self) -> Round:
        """All have accepted the leader's round."""
        self.tell("b", "a")
        (proposed,) = of_kind(self.tell("c", "a"), Propose)
        for agreement in self.members.values():
            assert of_kind(agreement.receive_round(proposed.round), Average)
        return proposed.round

    def _note(self, name: str, actions: list[Action]) -> None:
        if of_kind(actions, Commit):
            self.committed[name] = self.members[name].lineage


@pytest.fixture
def stage() -> Stage:
    stage = Stage()
    stage.in_round()
    return stage


def test_who_has_the_sum_commits_it_though_it_loses_sight_of_one_who_may_have(stage: Stage) -> None:
    for name in CLAIMS:
        stage.averaged(name)
    stage.tell("b", "a")
    stage.tell("c", "a")  # a has heard from all
    assert stage.committed.keys() == {"a"}
    stage.loses_sight("b", of="a")  # a's own word never came
    stage.tell("c", "b")
    stage.loses_sight("c", of="a")
    stage.tell("b", "c")
    assert set(stage.committed.values()) == {descend("initial", DIGEST)}
    assert stage.committed.keys() == set(CLAIMS)


def test_who_has_no_sum_yet_voids_the_round_of_one_that_is_gone(stage: Stage) -> None:
    assert stage.members["b"].is_frozen
    stage.loses_sight("b", of="a")
    assert stage.members["b"].tally().failed == 1
    assert not stage.members["b"].is_frozen  # it counts on, and the next round is with others


def test_the_sum_of_a_dead_member_s_share_is_not_done_again(stage: Stage) -> None:
    for name in ("b", "c"):
        stage.averaged(name)
        stage.loses_sight(name, of="a")  # it died after it had sent what it held
    stage.tell("c", "b")
    stage.tell("b", "c")
    assert stage.committed.keys() == {"b", "c"}
    assert set(stage.committed.values()) == {descend("initial", DIGEST)}


def test_one_that_failed_is_not_passed_over(stage: Stage) -> None:
    stage.averaged("b")
    stage.averaged("c", None)
    stage.loses_sight("b", of="a")
    stage.tell("c", "b")
    assert not stage.committed
    assert stage.members["b"].tally().failed == 1


def test_different_sums_are_nobody_s(stage: Stage) -> None:
    stage.averaged("a")
    stage.averaged("b", "another")
    stage.averaged("c")
    for teller, *others in (("a", "b", "c"), ("b", "a", "c"), ("c", "a", "b")):
        stage.tell(teller, *others)
    assert not stage.committed
