"""Numbers as Grafana writes them, for the units that the dashboards use."""

from __future__ import annotations

import math

_Scales = tuple[tuple[float, str], ...]
_SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2.0**40, "Ti"), (2.0**30, "Gi"), (2.0**20, "Mi"), (2.0**10, "Ki"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_UNITS: dict[str, tuple[_Scales, str]] = {
    "short": (_SHORT, ""),
    "bps": (_SI, "b/s"),
    "Bps": (_SI, "B/s"),
    "bytes": (_BINARY, "B"),
    "s": (_SECONDS, ""),
}


def written(value: float, unit: str, decimals: int | None = None) -> str:
    """A number with its unit."""
    if not math.isfinite(value):
        return "-"
    if unit.startswith("suffix:"):
        return _digits(value, decimals) + unit.removeprefix("suffix:")
    if unit == "percentunit":
        return f"{_digits(100 * value, decimals)} %"
    scales, ending = _UNITS.get(unit, ((), ""))
    scale, name = next((pair for pair in scales if abs(value) >= pair[0]), (1.0, unit if unit == "s" else ""))
    text = f"{_digits(value / scale, decimals)} {name}{ending}"
    return text.rstrip()


def _digits(value: float, decimals: int | None) -> str:
    if decimals is None:
        size = abs(value)
        decimals = 0 if size >= 100 or value == round(value) else 1 if size >= 10 else 2 if size >= 0.1 else 3
    return f"{value:.{decimals}f}"
