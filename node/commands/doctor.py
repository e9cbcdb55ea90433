"""`resbm-node doctor`: can this machine take part?"""

from __future__ import annotations

import dataclasses
import json

import typer

from node.commands.options import JsonLines


def doctor(json_lines: JsonLines = False) -> None:
    """Check this machine and say what to mend. Exit status 1 if it cannot take part.

    Example: resbm-node doctor
    """
    from rich.console import Console
    from rich.markup import escape

    from node.checks import run_checks

    console = Console(highlight=False, soft_wrap=True)
    marks = {"ok": "[green]ok    [/]", "warn": "[yellow]warn  [/]", "failed": "[red]failed[/]"}
    failed = 0
    for check in run_checks():
        failed += check.verdict == "failed"
        if json_lines:
            typer.echo(json.dumps({"event": "check", **dataclasses.asdict(check)}))
            continue
        console.print(f"{marks[check.verdict]}  {check.name:<14} {escape(check.detail)}")
        if check.remedy:
            console.print(f"{'':<8}remedy: {escape(check.remedy)}")
    if json_lines:
        typer.echo(json.dumps({"event": "summary", "fit": not failed, "failed": failed}))
    else:
        console.print("this machine can take part" if not failed else f"{failed} checks failed", style="bold")
    if failed:
        raise typer.Exit(1)
