"""What the convergence benchmark compares: a grid file made into cells. Pure.

A cell is one training: a variant, a learning rate, a seed. Variants share everything that they do not change; cells of
one seed share their data order and, where shapes agree, their initial weights.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from node.config import RunConfig, preset, validated
from node.errors import ConfigInvalid, ConfigUnreadable
from stage_server.config import Frozen

Role = Literal["uncompressed", "fair", "ours_128x", "ours_512x", "control", ""]
"""What the summary needs to find: the plain model, the fair control, the claims, the last stage alone."""


class Variant(Frozen):
    """One row of the comparison."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="short and unique; names its files")
    title: str = Field(description="what people read")
    role: Role = ""
    rates: tuple[float, ...] = Field(
        (1.0,), min_length=1, description="learning rates tried with the first seed, as multiples of the run's own"
    )
    run: dict[str, Any] = Field(default_factory=dict, description="what differs from the grid's run, as in a run file")


class Grid(Frozen):
    """A grid file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    extends: str = Field("", description="shipped grid whose preset, seeds and run this one changes")
    preset: str = Field("demo", description="shipped run that all variants start from")
    seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="of weights and data order")
    run: dict[str, Any] = Field(default_factory=dict, description="what all variants change in the preset")
    variants: tuple[Variant, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [variant.name for variant in variants]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two variants are called {twice[0]}")
        return variants


@dataclass(frozen=True, slots=True)
class Cell:
    """One training."""

    variant: str
    rate: float
    seed: int
    config: RunConfig

    @property
    def key(self) -> str:
        """Names its files: another config is another cell."""
        return f"{self.variant}-r{self.rate:g}-s{self.seed}-{self.config.run_id}"


def parse(text: str, origin: str) -> Grid:
    """The grid of a TOML text. Raises ConfigUnreadable, ConfigInvalid."""
    try:
        grid = Grid.model_validate(tomllib.loads(text))
        return grid if not grid.extends else _extended(shipped(grid.extends), grid)
    except tomllib.TOMLDecodeError as error:
        raise ConfigUnreadable(f"{origin} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ConfigInvalid(f"{origin}: {path}: {first['msg']}") from error


def _extended(base: Grid, grid: Grid) -> Grid:
    """A grid with what it leaves unsaid taken from another one; their runs are merged."""
    unsaid = {key: getattr(base, key) for key in ("preset", "seeds") if key not in grid.model_fields_set}
    return grid.model_copy(update=unsaid | {"run": _merged(base.run, grid.run)})


def shipped(name: str) -> Grid:
    """A grid that comes with the software. Raises ConfigInvalid for an unknown name."""
    folder = resources.files("node.bench.grids")
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if name not in names:
        raise ConfigInvalid(f"there is no grid {name!r}", remedy=f"choose one of: {', '.join(names)}; or name a file")
    return parse(folder.joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"grid {name}")


def config_of(grid: Grid, variant: Variant, rate: float, seed: int) -> RunConfig:
    """The run of one cell. Raises ConfigInvalid, ConfigImpossible."""
    values = _merged(preset(grid.preset).model_dump(), grid.run)
    values = _merged(values, variant.run)
    for key in ("muon_lr", "adamw_lr"):
        values["optimizer"][key] *= rate
    values |= {"seed": seed, "name": variant.name}
    return validated(values, f"grid {grid.name}, variant {variant.name}")


def cells_to_run(grid: Grid, losses: Mapping[str, float]) -> list[Cell]:
    """Cells not yet done that can be run now, in the order of the grid; `losses`: final ones of done cells, by key.

    A variant's learning rate is chosen with the first seed alone; its other seeds wait for that, and come after the
    first seeds of all variants: a part of the grid then compares everything once.
    """
    first_seeds: list[Cell] = []
    found: list[Cell] = []
    for variant in grid.variants:
        tuning = [_cell(grid, variant, rate, grid.seeds[0]) for rate in variant.rates]
        if missing := [cell for cell in tuning if cell.key not in losses]:
            first_seeds += missing
            continue
        rest = [_cell(grid, variant, best_rate(tuning, losses), seed) for seed in grid.seeds[1:]]
        found += [cell for cell in rest if cell.key not in losses]
    return first_seeds + found


def best_rate(tuning: Sequence[Cell], losses: Mapping[str, float]) -> float:
    """The learning rate with the least validation loss."""
    return min(tuning, key=lambda cell: losses[cell.key]).rate


def num_cells(grid: Grid) -> int:
    """Trainings in the whole grid."""
    return sum(len(variant.rates) + len(grid.seeds) - 1 for variant in grid.variants)


def _cell(grid: Grid, variant: Variant, rate: float, seed: int) -> Cell:
    return Cell(variant.name, rate, seed, config_of(grid, variant, rate, seed))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested: tables are merged, everything else is replaced."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, change) if isinstance(old, dict) and isinstance(change, Mapping) else change
    return merged
