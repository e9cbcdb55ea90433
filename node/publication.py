"""What a coordinator remembers of the run that it has published, to publish it again at the same address."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from node.config import RunConfig, load_toml
from node.errors import ConfigUnreadable
from node.folders import replace_text
from stage_server.config import Frozen

FILE_NAME = "published.json"


class Publication(Frozen):
    """One published run and where its coordinator listened."""

    config_toml: str
    host: str
    announce: str
    port: int = Field(ge=0, le=65535)

    @property
    def config(self) -> RunConfig:
        """Raises ConfigInvalid, ConfigImpossible."""
        return load_toml(self.config_toml)


def remember(folder: Path, publication: Publication) -> None:
    """In place of the one before. Raises OSError."""
    replace_text(folder / FILE_NAME, publication.model_dump_json())


def recall(folder: Path) -> Publication:
    """The last one. Raises ConfigUnreadable when nothing readable is there."""
    path = folder / FILE_NAME
    try:
        return Publication.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise ConfigUnreadable(
            f"no run was published from {folder}, or {path.name} cannot be read",
            remedy="publish one with --run or --preset, or name the coordinator's folder with --state-dir",
        ) from error
