"""`resbm-node init`: a run file that explains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.", show_default=True)] = Path("run.toml"),
    preset: Annotated[
        str, typer.Option(help="Which run to start from: demo, narrow, wide, tiny, qwen3-tiny, h4096, h4096-narrow.")
    ] = "demo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")] = False,
) -> None:
    """Write a run file with every setting and what it means.

    Example: resbm-node init my-run.toml --preset demo
    """
    from node import config
    from node.errors import ConfigUnreadable, FileExists

    text = config.dump_toml(config.preset(preset))
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileExists(f"{path} exists already") from error
    except OSError as error:
        raise ConfigUnreadable(
            f"{path} cannot be written: {error.strerror}", remedy="choose a path in a folder that you can write to"
        ) from error
    typer.echo(f"wrote {path}")
    typer.echo(f"next: edit it, then  resbm-node reference --run {path}  or  resbm-node coordinator --run {path}")
