"""How long a silent peer is waited for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stage_server.silence import HALF_LIFE, Patience, Silence

PATIENCE = Patience(least=2.0, factor=3.0, longest=10.0)


def heard(*times: float) -> Silence:
    silence = Silence(PATIENCE)
    for now in times:
        silence.heard(now)
    return silence


def test_who_says_nothing_for_a_while_is_not_waited_for() -> None:
    assert not heard(10.0).is_long(12.0)
    assert heard(10.0).is_long(12.1)
    assert not heard().is_long(1000.0)  # it may still say its first word


def test_who_is_slow_to_speak_is_waited_for_longer_but_not_for_ever() -> None:
    slow = heard(10.0, 11.5)
    assert not slow.is_long(11.5 + 4.4)
    assert slow.is_long(11.5 + 4.6)
    slower = heard(10.0, 11.5, 15.5)
    assert not slower.is_long(15.5 + 9.9)
    assert slower.is_long(15.5 + 10.1)


def test_a_silence_that_was_given_up_on_is_no_measure_of_its_pace() -> None:
    assert heard(10.0, 100.0).longest_wait == 0.0


def test_a_wait_is_forgotten_with_time_not_with_words() -> None:
    slow = heard(10.0, 11.5)
    for turn in range(1, 701):
        slow.heard(11.5 + HALF_LIFE * turn / 700)
    assert abs(slow.longest_wait - 0.75) < 0.01


def test_what_happened_while_the_listener_was_away_is_nobodys_silence() -> None:
    silence = heard(10.0)
    silence.excuse(15.0)
    assert not silence.is_long(26.0)
    assert silence.is_long(28.0)


@given(st.lists(st.floats(0.0, 30.0), max_size=20), st.floats(0.0, 60.0))
def test_nobody_is_given_up_on_early_or_waited_for_too_long(waits: list[float], silent: float) -> None:
    silence, now = heard(0.0), 0.0
    for wait in waits:
        now += wait
        silence.heard(now)
    if silent < PATIENCE.least:
        assert not silence.is_long(now + silent)
    if silent > PATIENCE.longest + 1e-6:
        assert silence.is_long(now + silent)
