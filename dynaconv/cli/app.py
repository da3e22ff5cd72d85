"""``dynaconv``: the commands, and what their errors turn into.

Importing this file imports neither torch nor hydra: each command imports what it needs when it runs.
Exit codes: 0 done, 1 a bug, 2 usage or configuration, 3 a missing, stale or damaged artifact, 4 a quality gate,
5 an export check, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dynaconv.cli import bench, convert, dial, doctor, listing, model, resize, stages
from dynaconv.cli.output import print_error, print_note, say
from dynaconv.cli.quiet import silence_libraries
from dynaconv.errors import DynaconvError
from dynaconv.ranks import leave, started_by_launcher
from dynaconv.threads import limit_spinning
from dynaconv.version import __version__

INTERRUPTED = 130


class Commands(TyperGroup):
    """Runs a command; turns an error of ours into one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for. What is no :class:`DynaconvError` is a bug and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except DynaconvError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print_note("interrupted: rerun the same command to go on")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def dynaconv(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Turn a dense language-model checkpoint into one with a dial that trades compute for quality."""
    silence_libraries()
    limit_spinning()


app.command("convert")(convert.convert)
app.command("plan")(convert.plan)
app.command("subclone")(resize.subclone)
app.command("hyperclone")(resize.hyperclone)
for _name, _command in stages.COMMANDS.items():
    app.command(_name)(_command)
app.command("status")(listing.status)
app.command("dial-k")(dial.dial_k)
app.command("eval")(model.evaluate)
app.command("generate")(model.generate)
app.command("bench")(bench.bench)
app.command("recipes")(listing.recipes)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the ``dynaconv`` command."""
    try:
        app()
    except SystemExit as end:
        if not started_by_launcher():
            raise
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()
