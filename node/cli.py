"""The command line: which commands there are, and how anything that goes wrong is told.

Each command lives in node/commands with its own options and imports what is heavy only when it runs.
Exit status: 0 done, 1 the command's verdict is bad, 2 refused (with a code and a remedy), 130 stopped with Ctrl+C.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from node.bench.churn.command import churn
from node.bench.codec import codec
from node.bench.convergence import convergence
from node.bench.local import local
from node.bench.overhead import overhead
from node.bench.placement import placement
from node.bench.wan.command import wan
from node.bench.wire import wire
from node.commands.coordinator import coordinator
from node.commands.demo import demo
from node.commands.doctor import doctor
from node.commands.init import init
from node.commands.join import join
from node.commands.reference import reference
from node.commands.status import status
from node.commands.ticket import ticket
from node.errors import CodedError, as_event, describe

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

EPILOG = "Start here: resbm-node demo. What an error code means: docs/errors.md."


def build_app() -> typer.Typer:
    """The application with all commands."""
    app = typer.Typer(
        name="resbm-node",
        help="Train one language model together, over ordinary internet links.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in (demo, init, coordinator, join, ticket, status, reference, doctor):
        app.command(command.__name__)(guarded(command))
    bench = typer.Typer(
        help="Measure: each benchmark compares in one run and writes its full result to a file.",
        epilog="Start here: resbm-node bench codec --quick.",
        no_args_is_help=True,
    )
    for benchmark in (codec, wire, local, convergence, overhead, wan, placement, churn):
        bench.command(benchmark.__name__)(guarded(benchmark))
    app.add_typer(bench, name="bench")
    return app


def main() -> None:
    """Entry point of `resbm-node`."""
    try:
        build_app()()
    except KeyboardInterrupt:  # before a command began
        raise SystemExit(EXIT_INTERRUPTED) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from node.version import __version__

        typer.echo(f"resbm-node {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the program itself; `version` has done its work before this is called."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its refusals told in two lines and Ctrl+C in none."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise  # a fault of ours: its traceback is what helps
            tell(refusal, as_json="--json" in sys.argv)
            raise typer.Exit(EXIT_REFUSED) from None

    return run


def _refusal(error: BaseException) -> CodedError | None:
    """The refusal that `error` is, or that it holds alone, as a task group's error does."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, CodedError) else None


def tell(error: CodedError, *, as_json: bool) -> None:
    """Prints a refusal: for people on stderr, and for scripts as a JSON line on stdout."""
    typer.echo(describe(error), err=True)
    if as_json:
        typer.echo(json.dumps(as_event(error)))


if __name__ == "__main__":
    main()
