"""``dynaconv convert`` and ``dynaconv plan``: the whole pipeline, or what it would do and cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynaconv.artifacts.files import size_text
from dynaconv.cli.listing import print_stages
from dynaconv.cli.output import in_short, print_json, print_note, say, say_wrapped
from dynaconv.cli.ranks import Hostfile, Nproc, all_ranks, launch_if_wanted, with_ranks
from dynaconv.cli.request import Request, fill_source, request
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError, DynaconvError

if TYPE_CHECKING:
    from dynaconv.pipeline.plan import Plan
    from dynaconv.ranks import Ranks

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="Folder or hub name of a dense checkpoint, or a run to go on with. Left out: a tiny embedded one.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings over the recipe's, such as block_size=32; data=PATH|NAME names the text, several with commas.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="A recipe; `dynaconv recipes` lists them.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Folder of the run; runs/SOURCE-RECIPE unless given.", show_default=False),
]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.", show_default=False)]
Redo = Annotated[
    str | None, typer.Option(metavar="STAGE", help="Make this stage and all after it again.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
PLAN_COLUMNS = (
    Column("stage", words=True),
    Column("action", words=True),
    Column("memory"),
    Column("disk", optional=1),
    Column("FLOPs", optional=2),
    Column("why, and what comes out", words=True, wraps=24),
)
RESIZING = ("subclone", "hyperclone")


def convert(
    source: Source = None,
    overrides: Overrides = None,
    recipe: Recipe = None,
    out: Out = None,
    until: Until = None,
    redo: Redo = None,
    as_json: AsJson = False,
    nproc: Nproc = None,
    hostfile: Hostfile = None,
) -> None:
    """Convert a dense checkpoint into a model with a dial.

    Runs the recipe's stages in order, keeps what is done already, and goes on where it was interrupted.
    """
    with all_ranks() as ranks:
        asked = request(source, with_ranks(overrides, nproc, hostfile), recipe=recipe, out=out)
        asked.check(until, redo)
        launch_if_wanted(asked)
        fill_source(asked.config, quiet=as_json)
        run_stages(asked, until=until, redo=redo, as_json=as_json, ranks=ranks)


def run_stages(
    asked: Request, *, until: str | None, redo: str | None, as_json: bool, ranks: Ranks | None = None
) -> None:
    """Runs what was asked for and prints where the run stands then."""
    from dynaconv.artifacts.run import Run
    from dynaconv.pipeline.runner import run_pipeline
    from dynaconv.pipeline.status import status
    from dynaconv.progress import Progress

    run = Run.create(asked.run)
    with Progress(quiet=as_json) as progress:
        run_pipeline(asked.config, run, until=until, redo=redo, progress=progress, ranks=ranks)
    if as_json:
        print_json(status(run))
        return
    print_stages(status(run))
    record = run.manifest.record(asked.config.stages[-1])
    if record is None or record.superseded:
        return
    if record.stage == "export":
        say(f"The model is in {run.folder(record)}; `dynaconv dial-k {asked.run}` shows its dial.")
    elif record.stage in RESIZING:
        say(f"The model is in {run.folder(record)}: a plain checkpoint, with a model card.")


def plan(
    source: Source = None,
    overrides: Overrides = None,
    recipe: Recipe = None,
    out: Out = None,
    until: Until = None,
    redo: Redo = None,
    as_json: AsJson = False,
) -> None:
    """Say what convert would do and cost, and list every mistake. Takes the same arguments and writes nothing."""
    show_plan(request(source, overrides or (), recipe=recipe, out=out), until, redo, as_json=as_json)


def show_plan(asked: Request, until: str | None, redo: str | None, *, as_json: bool) -> None:
    """Prints what would be done; leaves with an exit code where something is wrong."""
    made, problems, exit_code = _planned(asked, until, redo)
    if as_json:
        from dynaconv.pipeline.plan import as_json as plan_as_json

        stages = plan_as_json(made) if made is not None else {"stages": []}
        print_json({**stages, "run": str(asked.run), "source": asked.config.source, "problems": problems})
    else:
        _show(asked, made, problems)
    if problems:
        raise typer.Exit(exit_code)


def _planned(asked: Request, until: str | None, redo: str | None) -> tuple[Plan | None, list[str], int]:
    """The plan as far as one can be made, every mistake, and the exit code."""
    from dynaconv.artifacts.manifest import MANIFEST_FILE
    from dynaconv.artifacts.run import Run
    from dynaconv.artifacts.source import resolve
    from dynaconv.pipeline.plan import make_plan

    try:
        source = resolve(asked.config.source or _embedded())
        run = Run.open(asked.run) if (asked.run / MANIFEST_FILE).is_file() else None
    except DynaconvError as error:
        found = asked.problems(until, redo)
        return None, [*found, str(error)], 2 if found else error.exit_code
    mistakes = asked.draft.mistakes
    made = make_plan(asked.config, run, source, until=until, redo=redo)
    return made, [*mistakes, *made.problems], 2 if mistakes else made.exit_code


def _embedded() -> str:
    """The embedded default, if it was made before: a plan writes nothing, so it makes none.

    Raises:
        ArtifactError: It was not made yet.
    """
    from dynaconv.train.defaults import default_folder

    folder = default_folder()
    if not (folder / "config.json").is_file():
        hint = "name a SOURCE, or let `dynaconv convert --until profile` make the default, in about two minutes"
        raise ArtifactError("no SOURCE given, and the embedded default was not made yet", where=folder, hint=hint)
    return str(folder)


def _show(asked: Request, made: Plan | None, problems: list[str]) -> None:
    say(f"source  {asked.config.source or 'the embedded default'}")
    say(f"run     {asked.run}")
    if made is not None and made.stages:
        rows = [
            [
                stage.folder,
                stage.action,
                size_text(stage.estimate.peak_bytes),
                size_text(stage.estimate.disk_bytes),
                in_short(stage.estimate.flops),
                "\n".join([*stage.reasons, *stage.estimate.notes]),
            ]
            for stage in made.stages
        ]
        print_table(PLAN_COLUMNS, rows)
        total = f"peak memory {size_text(made.peak_bytes)} with Python and its libraries"
        say_wrapped(f"In all: {total}, {size_text(made.disk_bytes)} on disk, {in_short(made.flops)}FLOP.")
    for warning in made.warnings if made is not None else ():
        print_note(f"warning: {warning}")
    if problems:
        print_note(f"{len(problems)} mistake{'s' * (len(problems) > 1)}:")
    for number, problem in enumerate(problems, 1):
        print_note(f"  {number}. " + problem.replace("\n", "\n   "))
