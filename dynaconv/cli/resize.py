"""``dynaconv subclone`` and ``dynaconv hyperclone``: a checkpoint in another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from dynaconv.cli.convert import AsJson, Out, run_stages, show_plan
from dynaconv.cli.request import Request, is_run, request
from dynaconv.cli.stages import Again, run_one
from dynaconv.config import RunConfig

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Folder or hub name of a dense checkpoint, or a run to go on with."),
]
Smaller = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="The target: params=1.3e9, ratio=0.5, or sizes (residual= ffn= heads= kv_heads= head_dim= layers=). "
        "Options: order=none rescale=false head_difference=true refit=true; data=PATH|NAME is the text to measure on.",
        show_default=False,
    ),
]
Larger = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Factors of single axes: residual=2 ffn=3 heads=2 kv_heads=same|scale head_dim=2; layers=40 for more "
        "layers; variant=noisy|symmetric|diagonal, snr_db=10.",
        show_default=False,
    ),
]
Factor = Annotated[
    float | None, typer.Option(metavar="N", help="One factor for residual width, FFN and heads.", show_default=False)
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would come out and what it costs; write nothing.")]


def subclone(
    source: Source,
    overrides: Smaller = None,
    out: Out = None,
    plan: Plan = False,
    redo: Again = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller checkpoint: measure what matters, keep that, and scale the weights for it."""
    given = _prefixed("subclone", overrides or ())
    _resize("subclone", source, given, out=out, plan=plan, redo=redo, as_json=as_json)


def hyperclone(
    source: Source,
    overrides: Larger = None,
    factor: Factor = None,
    out: Out = None,
    plan: Plan = False,
    redo: Again = False,
    as_json: AsJson = False,
) -> None:
    """Make a larger checkpoint that computes the same, as a start for training."""
    given = _prefixed("hyperclone", overrides or ())
    if factor is not None:
        given.append(f"hyperclone.factor={factor:g}")
    _resize("hyperclone", source, given, out=out, plan=plan, redo=redo, as_json=as_json)


def _resize(
    stage: str, source: str, overrides: list[str], *, out: Path | None, plan: bool, redo: bool, as_json: bool
) -> None:
    """The recipe of the stage's own name on a checkpoint, or the one stage of a run that has it."""
    again = stage if redo else None
    if is_run(Path(source).expanduser()) and not plan:
        run_one(stage, Path(source).expanduser(), overrides, redo=redo, as_json=as_json)
        return
    asked = request(source, overrides, recipe=stage, out=out)
    if plan:
        show_plan(asked, None, again, as_json=as_json)
        return
    asked.check(redo=again)
    _check_shape(asked)
    run_stages(asked, until=None, redo=again, as_json=as_json)


def _check_shape(asked: Request) -> None:
    """Stops before a folder is made for a run that cannot be."""
    from dynaconv.artifacts.source import resolve
    from dynaconv.pipeline.plan import checked_stages
    from dynaconv.pipeline.runner import check_shapes

    if not is_run(asked.run):
        check_shapes(asked.config, checked_stages(asked.config)[0], resolve(asked.config.source))


def _prefixed(section: str, overrides: Sequence[str]) -> list[str]:
    """``ffn=3`` as ``hyperclone.ffn=3``; what names another section, or a setting of the whole run, as it is."""
    whole = {field.name for field in fields(RunConfig)}
    return [
        each if "." in (key := each.partition("=")[0]) or key in whole else f"{section}.{each}" for each in overrides
    ]
