"""``dynaconv status`` and ``dynaconv recipes``: what there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dynaconv.artifacts.files import size_text
from dynaconv.cli.output import in_time, print_json, say
from dynaconv.cli.table import Column, print_table

SHOWN_METRICS = 4
STAGE_COLUMNS = (
    Column("stage", words=True),
    Column("status", words=True),
    Column("time"),
    Column("peak memory", optional=1),
    Column("fingerprint", optional=2),
    Column("measured", words=True, wraps=32),
)


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Say which stages of a run are done, what they measured, and what they took."""
    from dynaconv.artifacts.run import Run
    from dynaconv.pipeline.status import status as status_of

    found = status_of(Run.open(run))
    if as_json:
        print_json(found)
    else:
        print_stages(found)


def print_stages(found: Mapping[str, Any]) -> None:
    """Prints the table of a run's stages."""
    rows = [
        [
            stage["name"],
            stage["status"],
            in_time(stage["seconds"]),
            size_text(stage["peak_rss_bytes"]) if stage["peak_rss_bytes"] else "-",
            (stage["fingerprint"] or "-")[:12],
            _metrics(stage["metrics"] or {}),
        ]
        for stage in found["stages"]
    ]
    print_table(STAGE_COLUMNS, rows)
    if "problem" in found:
        say(f"This dynaconv cannot continue this run; what it made can be used. {found['problem']}")


def _metrics(metrics: Mapping[str, Any]) -> str:
    """The first few plain numbers."""
    plain = [(name, value) for name, value in metrics.items() if type(value) in (int, float)]
    return "  ".join(f"{name} {value:.5g}" for name, value in plain[:SHOWN_METRICS])


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME|FILE", help="Print this one.", show_default=False)] = None,
) -> None:
    """List the recipes, or print one."""
    from dynaconv.recipes import available, find

    if name is not None:
        say(find(name).path.read_text(encoding="utf-8").rstrip())
        return
    shipped = available()
    longest = max(map(len, shipped))
    for recipe in shipped.values():
        say(f"{recipe.name:<{longest}}  {recipe.summary}")
    say("\nPrint one with `dynaconv recipes NAME`; copy, change and use it with `--recipe FILE`.")
