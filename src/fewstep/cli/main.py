"""The `fewstep` program: its commands, and the conversion of exceptions into messages and exit codes."""

import sys
import threading
import warnings
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep.cli.cache_trajectories import cache
from fewstep.cli.convert import convert
from fewstep.cli.distill import distill
from fewstep.cli.empty_values import empty_option
from fewstep.cli.encode_prompts import prompts
from fewstep.cli.evaluate import evaluate
from fewstep.cli.export import export
from fewstep.cli.generate import generate
from fewstep.cli.lora import app as lora
from fewstep.cli.plan import plan
from fewstep.cli.prefs import app as prefs
from fewstep.cli.serve import serve
from fewstep.cli.steps import app as steps
from fewstep.cli.tune import tune
from fewstep.core.registry import commands, load_plugins
from fewstep.errors import UserError
from fewstep.machine import describe


class ErrorBoundary(TyperGroup):
    """Turns user errors and errors of the machine into one line and an exit code; bugs keep their tracebacks."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (option := empty_option(self, args)) is not None:
            raise typer.BadParameter(f"{option} is empty; give a value, or leave it out", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _print_line(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            _print_line(str(error) or "interrupted")
            raise typer.Exit(130) from None
        except OSError as error:
            line = describe(error)  # Typer handles broken pipes
            if line is None:
                raise
            _print_line(f"error: {line}")
            raise typer.Exit(1) from None
        except (RuntimeError, MemoryError) as error:
            from fewstep.core.device import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            _print_line("error: out of memory; take smaller batches or images, or see what fits: fewstep plan RECIPE")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="fewstep",
    cls=ErrorBoundary,
    help="Distill multi-step flow-matching text-to-image models into models that need 8, 4, 2 or 1 steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def program(  # noqa: D103
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    # no docstring: it would replace the program's help
    warnings.showwarning = _print_warning


app.command()(distill)
app.command()(generate)
app.command()(evaluate)
app.command()(serve)
app.command()(plan)
app.command()(tune)
app.command("cache-trajectories")(cache)
app.command("encode-prompts")(prompts)
app.command()(convert)
app.command()(export)
app.add_typer(lora, name="lora")
app.add_typer(prefs, name="prefs")
app.add_typer(steps, name="steps")
try:
    load_plugins()
except UserError as error:
    sys.exit(f"error: {error}")
for name in commands.names():
    app.add_typer(commands.get(name), name=name)


def main() -> None:
    """Entry point of the `fewstep` program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # characters that a terminal lacks must not stop a command
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _thread_failed
    app()


def _print_warning(message: Warning | str, *place: object, **more: object) -> None:
    """A warning in one line, without its place in the code."""
    _print_line(f"warning: {' '.join(str(message).split())}")


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A full disk under a library's writing thread: it raises the error again where it is used next."""
    if not isinstance(failed.exc_value, OSError) or describe(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
