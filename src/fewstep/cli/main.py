"""The `fewstep` program: its commands, and the border at which exceptions become lines and exit codes."""

import errno
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep.cli.cache_trajectories import cache
from fewstep.cli.convert import convert
from fewstep.cli.distill import distill
from fewstep.cli.encode_prompts import prompts
from fewstep.cli.evaluate import evaluate
from fewstep.cli.generate import generate
from fewstep.cli.plan import plan
from fewstep.core.registry import commands, load_plugins
from fewstep.errors import UserError

# What the machine, not the program, is to blame for.
_MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
}


class Border(TyperGroup):
    """Ends the mistakes of users, and the troubles of machines, with one line and a status; bugs keep tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say(f"error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            _say(str(error) or "interrupted")
            raise typer.Exit(130) from None
        except OSError as error:
            # A broken pipe is typer's to end quietly. An error that names no file may well be a bug.
            if error.errno not in _MACHINE_ERRORS or (error.filename is None and error.errno != errno.ENOSPC):
                raise
            _say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="fewstep",
    cls=Border,
    help="Turns a multi-step flow-matching text-to-image model into one that needs 8, 4, 2 or 1 steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    warnings.showwarning = _warn


app.command()(distill)
app.command()(generate)
app.command()(evaluate)
app.command()(plan)
app.command()(cache)
app.command()(prompts)
app.command()(convert)
try:
    load_plugins()
except UserError as error:
    sys.exit(f"error: {error}")
for name in commands.names():
    app.add_typer(commands.get(name), name=name)


def main() -> None:
    """The entry point."""
    app()


def _warn(message: Warning | str, *place: object, **more: object) -> None:
    """Warnings in one line; where in the code they come from is of no use to who gave the command."""
    _say(f"warning: {' '.join(str(message).split())}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
