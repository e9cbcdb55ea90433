"""Just enough of PromQL to know which metrics and labels an expression uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'")
_SELECTOR = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*+)\s*+(\{[^}]*\})?+(?!\s*\()")
_LABEL_LIST = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_DURATION = re.compile(r"\[[^\]]*\]")
_KEYWORDS = {
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "bool",
    "offset",
    "Inf",
}


@dataclass(frozen=True)
class Selector:
    """One selected metric and the labels by which it is selected."""

    metric: str
    labels: frozenset[str]


def selectors(expr: str) -> Iterator[Selector]:
    """All metrics that an expression selects."""
    plain = _DURATION.sub("", _LABEL_LIST.sub(" ", _STRING.sub('""', expr)))
    for match in _SELECTOR.finditer(plain):
        name, braces = match[1], match[2] or ""
        before = plain[: match.start()]
        inside_braces = before.count("{") > before.count("}")
        if name not in _KEYWORDS and not inside_braces:
            yield Selector(name, frozenset(re.findall(r"(\w+)\s*[=!]", braces)))
