"""A peer's rate, corrected by what it really serves."""

from __future__ import annotations

import pytest

from node.service_rate import ENOUGH, ServiceRate


def test_a_wrong_first_measurement_is_corrected() -> None:
    rate = ServiceRate(100.0)
    told = [rate.follow(done, done / 10.0) for done in range(0, 10 * ENOUGH, 8)]
    assert told[0] == 100.0
    assert told[-1] == pytest.approx(10.0)


def test_what_was_done_before_it_follows_does_not_count() -> None:
    rate = ServiceRate(10.0)
    rate.follow(1000, 1.0)
    assert rate.follow(1000 + ENOUGH, 1.0 + ENOUGH / 10.0) == 10.0


def test_small_changes_are_not_told() -> None:
    rate = ServiceRate(10.0)
    rate.follow(0, 0.0)
    assert rate.follow(ENOUGH, ENOUGH / 11.0) == 10.0
    assert rate.follow(9 * ENOUGH, ENOUGH / 11.0 + 8 * ENOUGH / 30.0) > 15.0


def test_nothing_is_concluded_from_little() -> None:
    rate = ServiceRate(10.0)
    rate.follow(0, 0.0)
    assert rate.follow(ENOUGH - 1, 100.0) == 10.0
    assert rate.follow(ENOUGH, 0.0) == 10.0
