"""What each member of a round says it puts into the sum, and whether the sum that came out holds it. Pure.

Averaging may go wrong without an error: a codec that averages nothing, a part that kept its local values, a reducer
that left somebody out. So each member tells the others, before the exchange, linear checksums of its contribution,
a few for each part of the vector; those of the result must be the sums of theirs.

A checksum is the dot product (in float64) of a part with random signs, new ones in each round. An error `e` in a part
moves it by about |e| (its Euclidean norm), whatever e looks like. Honest rounding moves it too: by more than `_MARGIN`
times its norm in one of 10^13 cases. An error as large as the part itself stays unseen in all four checksums with a
chance of about 10^-25 (float32 on the wire) or 10^-8 (float16).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Floats = NDArray[np.float64]

PROTOCOL_VERSION = 1
MAX_PART_VALUES = 131_072  # 512 KiB of float32, hivemind's own part size
MIN_PART_VALUES = 1_024
NUM_CHECKSUMS = 4  # of each part

_PARTS_PER_MEMBER = 4  # at least, where the vector is long enough: reducing and sending overlap
_MARGIN = 8.0
_MAX_HEADER_BYTES = 65_536
_SMALLEST = 2.0**-149  # float32's steps near zero
_SMALLEST_SCALE = 2.0**-23  # hivemind's float16 codec scales by no less than this


class Wire(StrEnum):
    """How values travel. Each member of a round must have chosen the same."""

    FLOAT32 = "fp32"
    FLOAT16 = "fp16"  # scaled by mean and standard deviation of each part: 11 bits of each value


class ContributionInvalid(ValueError):
    """A member's message cannot be read, or does not belong to this round."""


class SumWrong(ValueError):
    """The sum does not hold what the members said they put in."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one member puts into the sum of one round."""

    key: str  # of the round
    members: tuple[str, ...]  # peer ids in ascending order: whom it means to average with
    wire: Wire
    num_values: int
    count: int  # microbatches
    attempt: str  # random: who tries a round again has another one
    checksums: Floats  # [parts, NUM_CHECKSUMS]
    norms: Floats  # [parts], Euclidean


def part_sizes(num_values: int, num_members: int) -> list[int]:
    """Values in each part of a vector, in order: equal ones but for the last."""
    wanted = -(-num_values // (num_members * _PARTS_PER_MEMBER))
    size = min(max(wanted, MIN_PART_VALUES), MAX_PART_VALUES)
    full, rest = divmod(num_values, size)
    return [size] * full + ([rest] if rest else [])


def checksums_of(key: str, values: Values, num_members: int) -> tuple[Floats, Floats]:
    """Checksums [parts, NUM_CHECKSUMS] and norms [parts] of a vector, for the round of that key."""
    sizes = part_sizes(len(values), num_members)
    signs = _signs(key, sizes[0])
    checksums, norms = np.empty((len(sizes), NUM_CHECKSUMS)), np.empty(len(sizes))
    start = 0
    with np.errstate(invalid="ignore", over="ignore"):  # not finite: refused by whoever looks at the checksums
        for index, size in enumerate(sizes):
            part = values[start : start + size].astype(np.float64)
            checksums[index] = part @ signs[:size]
            norms[index] = np.sqrt(part @ part)
            start += size
    return checksums, norms


def _signs(key: str, size: int) -> Floats:
    """+1 or -1, [size, NUM_CHECKSUMS], by the round's key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
    bits = np.random.default_rng(seed).integers(0, 2, (size, NUM_CHECKSUMS), dtype=np.int8)
    return (2.0 * bits - 1.0).astype(np.float64)


def verify_agreement(contributions: Mapping[str, Contribution], own: Contribution) -> None:
    """Whether everyone is in this very round, and has something that can be summed.

    Args:
        contributions: by peer id, of all members.
        own: this member's.

    Raises:
        ContributionInvalid: someone is in another round, or its values are not finite.
    """
    for peer, theirs in sorted(contributions.items()):
        if (theirs.key, theirs.members) != (own.key, own.members):
            raise ContributionInvalid(f"{peer} averages with other members")
        if (theirs.wire, theirs.num_values) != (own.wire, own.num_values):
            raise ContributionInvalid(
                f"{peer} averages {theirs.num_values} values as {theirs.wire}, not {own.num_values} as {own.wire}"
            )
        if not np.isfinite(theirs.norms).all():
            raise ContributionInvalid(f"the values of {peer} are not finite")


def verify_sum(total: Values, contributions: Sequence[Contribution]) -> None:
    """Whether a vector is the sum of all contributions, up to rounding.

    Raises:
        SumWrong: it is not; says where.
    """
    first = contributions[0]
    checksums, norms = checksums_of(first.key, total, len(first.members))
    expected = np.sum([each.checksums for each in contributions], axis=0)
    allowed = _allowed(first, np.sum([each.norms for each in contributions], axis=0), norms)
    wrong = ~(np.abs(checksums - expected) <= allowed[:, None]).all(axis=1)  # so that NaN is wrong
    if wrong.any():
        raise SumWrong(
            f"{wrong.sum()} of {len(wrong)} parts of the sum, from part {wrong.argmax()} on, are not the sum"
        )


def _allowed(first: Contribution, norms_in: Floats, norms_out: Floats) -> Floats:
    """By how much rounding may move a part's checksum."""
    sizes = np.sqrt(part_sizes(first.num_values, len(first.members)))
    if first.wire is Wire.FLOAT32:
        return np.asarray(_MARGIN * (2.0**-24 * norms_out + 2.0**-45 * norms_in + _SMALLEST * sizes))
    steps = 2.0**-24 * _SMALLEST_SCALE * (len(first.members) + 1)
    return np.asarray(_MARGIN * (2.0**-11 * (norms_in + norms_out) + steps * sizes))


def group_id_of(contributions: Mapping[str, Contribution]) -> bytes:
    """Names this attempt at this round: the same at all members, another one when anyone tries again."""
    attempts = [[peer, each.key, each.attempt] for peer, each in sorted(contributions.items())]
    return hashlib.sha256(json.dumps(attempts).encode()).digest()[:20]


def encode(contribution: Contribution) -> bytes:
    """A line of JSON, then checksums and norms as little-endian float64."""
    header = {
        "version": PROTOCOL_VERSION,
        "key": contribution.key,
        "members": contribution.members,
        "wire": contribution.wire.value,
        "num_values": contribution.num_values,
        "count": contribution.count,
        "attempt": contribution.attempt,
    }
    numbers = np.concatenate([contribution.checksums.ravel(), contribution.norms])
    return b"\n".join((json.dumps(header).encode(), numbers.astype("<f8").tobytes()))


def decode(message: bytes) -> Contribution:
    """The contribution in another member's message.

    Raises:
        ContributionInvalid: there is none.
    """
    try:
        line, _, rest = message.partition(b"\n")
        header = json.loads(line[:_MAX_HEADER_BYTES])
        if _typed(header, "version", int) != PROTOCOL_VERSION:
            raise ContributionInvalid(f"version {header['version']!r} of the protocol, not {PROTOCOL_VERSION}")
        members = tuple(map(str, _typed(header, "members", list)))
        num_values, count = _typed(header, "num_values", int), _typed(header, "count", int)
        if num_values < 1 or count < 0 or not members:
            raise ContributionInvalid("numbers out of range")
        num_parts = len(part_sizes(num_values, len(members))) if num_values <= 8 * MAX_PART_VALUES * len(rest) else 0
        numbers = np.frombuffer(rest, "<f8").astype(np.float64)
        if len(numbers) != num_parts * (NUM_CHECKSUMS + 1):
            raise ContributionInvalid("checksums are missing")
        return Contribution(
            key=_typed(header, "key", str),
            members=members,
            wire=Wire(_typed(header, "wire", str)),
            num_values=num_values,
            count=count,
            attempt=_typed(header, "attempt", str),
            checksums=numbers[: num_parts * NUM_CHECKSUMS].reshape(num_parts, NUM_CHECKSUMS),
            norms=numbers[num_parts * NUM_CHECKSUMS :],
        )
    except ContributionInvalid:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ContributionInvalid(f"not readable: {error}") from error


def _typed(header: Any, name: str, kind: type) -> Any:
    value = header[name]
    if type(value) is not kind:
        raise ContributionInvalid(f"{name} is {value!r}")
    return value
