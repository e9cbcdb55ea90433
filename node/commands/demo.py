"""`resbm-node demo`: a whole swarm on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from node.commands import options

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.demo import Fault
    from node.demo_view import DemoView


def demo(
    *,
    run: options.RunFile = None,
    preset: options.PresetName = None,
    stages: options.Stages = None,
    steps: options.Steps = None,
    microbatches: options.Microbatches = None,
    codec: options.Codec = None,
    seed: options.Seed = None,
    threads: Annotated[
        int, typer.Option(min=0, help="Processor threads of each peer; 0: the cores shared out among them.")
    ] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the peers compute.")] = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the peers' folders with logs and checkpoints.")] = False,
    json_lines: options.JsonLines = False,
    kill: Annotated[list[str] | None, typer.Option(metavar="STAGE@STEP", hidden=True)] = None,
) -> None:
    """Train a small model with a swarm of your own: a coordinator and one peer per stage, all on this machine.

    Example: resbm-node demo --steps 20
    """
    from node.demo import DemoOptions, Interrupted, run_demo

    config = options.chosen_run(
        run, preset, stages=stages, steps=steps, microbatches=microbatches, codec=codec, seed=seed
    )
    faults = tuple(_fault(config, text) for text in kill or ())
    view = _view(config, json_lines=json_lines)
    try:
        run_demo(config, DemoOptions(threads, device, keep, faults), view)
    except Interrupted:
        raise typer.Exit(130) from None
    finally:
        view.close()
    if not json_lines:
        _tell_what_next()


def _fault(config: RunConfig, text: str) -> Fault:
    from node.demo import Fault

    stage, at, step = text.partition("@")
    if not (at and stage.isdecimal() and step.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not STAGE@STEP")
    if int(stage) >= config.stages or not 1 <= int(step) <= config.plan.steps:
        raise typer.BadParameter(f"the run has {config.stages} stages and {config.plan.steps} steps")
    return Fault(int(stage), int(step))


def _view(config: RunConfig, *, json_lines: bool) -> DemoView:
    from node.demo_view import ConsoleView, JsonView

    if json_lines:
        return JsonView()
    from rich.console import Console

    console = Console(highlight=False)
    return ConsoleView(config, console if console.is_terminal else Console(highlight=False, soft_wrap=True))


def _tell_what_next() -> None:
    typer.echo("what to try next:")
    typer.echo("  resbm-node reference          the same run in one process: the same weights, bit for bit")
    typer.echo("  resbm-node demo --codec none  how much the 4-bit latents cost in loss")
    typer.echo("  resbm-node coordinator        publish a run; other machines take part with resbm-node join TICKET")
