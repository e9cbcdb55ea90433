"""The file that says what each peer's link is like.

[default]               # of every peer that has no table of its own
rate_mbit = 80
delay_ms = 50

[peers.peer-3]          # its other keys are the default's
rate_mbit = 20
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from node.errors import ConfigInvalid, ConfigUnreadable
from node.lab.shapes import UNSHAPED, LinkShape
from stage_server.config import Frozen

_REMEDY = "correct the named key; a link has rate_mbit, delay_ms and loss"


class Links(Frozen):
    """Links by peer."""

    default: LinkShape = UNSHAPED
    peers: dict[str, LinkShape] = Field(default_factory=dict)

    def of(self, peer: str) -> LinkShape:
        """The link of a peer."""
        return self.peers.get(peer, self.default)


def read_links(path: Path) -> Links:
    """Raises ConfigUnreadable, ConfigInvalid."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigUnreadable(f"{path} is not TOML: {error}", remedy="correct the place named") from None
    except UnicodeDecodeError:
        raise ConfigUnreadable(f"{path} is not UTF-8 text", remedy="save it as UTF-8") from None
    except OSError as error:
        raise ConfigUnreadable(f"{path}: {error.strerror}", remedy="check the path") from None
    return parse_links(values, str(path))


def parse_links(values: dict[str, Any], origin: str) -> Links:
    """The links of parsed TOML; `origin` names it in errors. Raises ConfigInvalid."""
    default, peers = values.get("default", {}), values.get("peers", {})
    if isinstance(default, dict) and isinstance(peers, dict):
        merged = {name: {**default, **own} if isinstance(own, dict) else own for name, own in peers.items()}
        values = {**values, "peers": merged}
    try:
        return Links.model_validate(values)
    except ValidationError as error:
        raise ConfigInvalid(f"{origin}: {_first_problem(error)}", remedy=_REMEDY) from None


def shape_of_options(origin: str, **values: float | None) -> LinkShape:
    """A link from single values. Raises ConfigInvalid."""
    try:
        return LinkShape.model_validate(values)
    except ValidationError as error:
        raise ConfigInvalid(f"{origin}: {_first_problem(error)}", remedy=_REMEDY) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}"
    return f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
