"""Options that several commands share, declared once, and the run that they choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stage_server.codec_names import CodecName

if TYPE_CHECKING:
    from node.config import RunConfig

RunFile = Annotated[
    Path | None, typer.Option("--run", help="Run file to use.", metavar="FILE", rich_help_panel="The run")
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Shipped run to use: demo, narrow, wide, tiny, qwen3-tiny.",
        show_default="demo",
        rich_help_panel="The run",
    ),
]
Stages = Annotated[int | None, typer.Option("--stages", help="Pipeline stages.", rich_help_panel="Changes to the run")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", rich_help_panel="Changes to the run")]
Microbatches = Annotated[
    int | None, typer.Option("--microbatches", help="Microbatches in a step.", rich_help_panel="Changes to the run")
]
Codec = Annotated[
    CodecName | None,
    typer.Option("--codec", help="Encoding of latents and their gradients.", rich_help_panel="Changes to the run"),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of weights, data and rounding.", rich_help_panel="Changes to the run"),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines only, for scripts.")]


def kept_ticket(state_dir: Path | None) -> str:
    """The newest ticket that this machine's coordinator or peer has left in a state folder (default: the user's).

    Raises:
        typer.BadParameter: neither has.
    """
    from node import folders, invitation

    folder = state_dir or folders.state_folder()
    text = invitation.read(folder)
    if not text:
        raise typer.BadParameter(f"neither a coordinator nor a peer has left a ticket in {folder}: give one")
    return text


def chosen_run(
    run: Path | None,
    preset: str | None,
    *,
    stages: int | None = None,
    steps: int | None = None,
    microbatches: int | None = None,
    codec: CodecName | None = None,
    seed: int | None = None,
) -> RunConfig:
    """The run file or preset (default: demo), with the changes of the command line.

    Raises:
        typer.BadParameter: both a file and a preset were given.
        ConfigUnreadable, ConfigInvalid, ConfigImpossible: as node.config says.
    """
    from node import config as run_config

    if run is not None and preset is not None:
        raise typer.BadParameter("give --run or --preset, not both")
    base = run_config.load(run) if run is not None else run_config.preset(preset or "demo")
    return base.with_overrides(stages=stages, steps=steps, microbatches=microbatches, codec=codec, seed=seed)
