"""Why a round of averaging did not take effect."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What went wrong, for whoever decides what to do next."""

    NOT_STARTED = "not started"  # the averaging process does not start
    PROCESS_LOST = "process lost"  # the averaging process died or does not answer; a new one is started
    TIMED_OUT = "timed out"  # some members never came, or stopped in the middle
    MEMBER_STRANGE = "member strange"  # a member averages something else, with others, or is none
    MEMBER_LOST = "member lost"  # a member died or gave up in the middle
    EXCHANGE_FAILED = "exchange failed"  # something else broke in the middle
    NOT_VERIFIED = "not verified"  # the exchange ended well, and its result is not the sum


class AveragingFailed(Exception):
    """A round did not take effect at this member. It may have taken effect at others: compare digests."""

    def __init__(self, reason: Reason, cause: str) -> None:
        super().__init__(f"{reason}: {cause}")
        self.reason = reason
        self.cause = cause
