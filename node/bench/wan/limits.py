"""What physics allows on a link, and the bandwidth that equals the paper's setting. Pure.

The paper (arXiv 2604.11947) trains over 80 Mbit/s what its accelerators could train far faster: its uncompressed
pipeline falls to 609 of 7530 tokens/s there. A CPU computes slowly, so here another bandwidth does the same to the
dense pipeline; that is the *equivalent* one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PAPER_DENSE_RATIO = 609 / 7530


def link_limit(rate_mbit: float | None, bytes_per_token: float) -> float:
    """Tokens/s that a link carries when nothing is lost or waits; infinite where it is not limited.

    Args:
        rate_mbit: of the up-link and of the down-link.
        bytes_per_token: in the busier direction of the busiest peer's link.
    """
    if rate_mbit is None or bytes_per_token <= 0:
        return math.inf
    return rate_mbit * 1e6 / 8 / bytes_per_token


def next_rate(ratios: Mapping[float, float], target: float = PAPER_DENSE_RATIO) -> float:
    """Mbit/s at which the pipeline should keep `target` of its unshaped speed: to be measured next.

    `ratios`: what it keeps, by Mbit/s, at least one. Between two neighbours around the target the curve is taken as
    straight on logarithmic axes; beyond all of them, speed as proportional to bandwidth, as it is on a full link.
    """
    points = sorted((rate, ratio) for rate, ratio in ratios.items() if ratio > 0)
    if not points:
        raise ValueError("no ratio is known")
    below = [point for point in points if point[1] <= target]
    above = [point for point in points if point[1] > target]
    if not below or not above:
        rate, ratio = min(points, key=lambda point: abs(math.log(point[1] / target)))
        return rate * target / ratio
    low, high = max(below), min(above)
    if low[0] >= high[0]:  # noise: a faster link was no faster
        return math.sqrt(low[0] * high[0])
    slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return float(low[0] * (target / low[1]) ** (1 / slope))


def is_equivalent(ratio: float, target: float = PAPER_DENSE_RATIO) -> bool:
    """Near enough: within a twenty-fifth of the paper's ratio."""
    return abs(ratio / target - 1) <= 0.04
