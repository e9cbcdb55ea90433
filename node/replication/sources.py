"""Which microbatch of a step a replica of the first stage begins next. Pure.

Each source has a run of the step's microbatches to itself, as long as its share of all sources' throughput, and works
through it in order; who is done early helps where most is left, from the far end, so that two seldom meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def spans(throughputs: Mapping[str, float], microbatches: int) -> dict[str, range]:
    """By peer, the microbatches of its own: consecutive, together all of them. Every peer computes the same."""
    peers = sorted(throughputs)
    total = sum(throughputs.values())
    spans, done, start = dict[str, range](), 0.0, 0
    for peer in peers:
        done += throughputs[peer] / total if total > 0 else 1 / len(peers)
        stop = microbatches if peer == peers[-1] else min(microbatches, round(done * microbatches))
        spans[peer] = range(start, max(start, stop))
        start = max(start, stop)
    return spans


def next_source(
    peer: str, candidates: Collection[int], taken: Collection[int], spans: Mapping[str, Sequence[int]]
) -> int | None:
    """The microbatch to begin next; None while others have begun all that is left.

    Args:
        candidates: those that this peer has not begun.
        taken: those that others have begun or done.
    """
    free = set(candidates) - set(taken)
    own = [index for index in spans.get(peer, ()) if index in free]
    if own:
        return own[0]
    left = {other: [index for index in span if index in free] for other, span in spans.items() if other != peer}
    longest = max(left.values(), key=len, default=[])
    return longest[-1] if longest else min(free, default=None)
