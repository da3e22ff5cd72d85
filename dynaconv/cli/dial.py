"""``dynaconv dial-k``: the measured frontier, and the point of it that a budget or a quality asks for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dynaconv.artifacts.files import size_text, write_json
from dynaconv.cli.folders import Calibrated, find_calibrated, frontier_errors
from dynaconv.cli.output import in_short, print_json, say, say_wrapped
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.frontier import BudgetPosition, OperatingPoint, check_budget, check_quality

COLUMNS = (
    Column("", words=True),
    Column("budget"),
    Column("active share", optional=2),
    Column("FLOPs/token"),
    Column("bytes/token", optional=4),
    Column("loss", optional=1),
    Column("quality"),
    Column("agreement", optional=3),
    Column("tokens/s"),
)


def dial_k(
    path: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run, or an exported model.")],
    budget: Annotated[
        float | None, typer.Option(metavar="S", help="Active FFN share to spend at most, in (0, 1].")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="Q", help="exp(parent loss - loss) to hold; 1 is the parent's perplexity, more is better."
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Store the point in the model: its dial from then on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Pick an operating point from the calibrated frontier. With neither option, show where the model stands."""
    with frontier_errors():
        _check(budget, quality, write)
        found = find_calibrated(path)
        if quality is not None:
            budget = found.frontier.budget_for_quality(quality)
        position = found.frontier.at(_stored(found) if budget is None else budget)
    written = _write(found, position) if write else None
    if as_json:
        print_json({**found.frontier.to_json(), "operating_point": _as_json(position)})
    else:
        _show(found, position, written)


def _check(budget: float | None, quality: float | None, write: bool) -> None:
    """Stops at options that no frontier could answer."""
    if budget is not None and quality is not None:
        raise ConfigError("--budget and --quality are both given", hint="give one of them")
    if budget is not None:
        check_budget(budget)
    elif quality is not None:
        check_quality(quality)
    elif write:
        raise ConfigError("--write needs a point to write", hint="add --budget S or --quality Q")


def _stored(found: Calibrated) -> float:
    """The budget the model has now: the one that was written, or that of the full dial."""
    if found.stored is None or not found.stored.is_file():
        return 1.0
    try:
        return float(json.loads(found.stored.read_text(encoding="utf-8"))["budget"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "dial-k --budget S --write writes it anew"
        raise ArtifactError("the stored dial cannot be read", where=found.stored, found=error, hint=hint) from error


def _write(found: Calibrated, position: BudgetPosition) -> Path:
    if found.stored is None:
        hint = f"dynaconv export {found.folder}"
        raise ArtifactError("there is no exported model to write the dial into", where=found.folder, hint=hint)
    write_json(found.stored, {"budget": position.budget, "quality": position.quality})
    return found.stored


def _as_json(position: BudgetPosition) -> dict[str, Any]:
    """``budget`` is where the dial goes, and ``between`` the measured budgets on its two sides.

    What was not measured at that budget is null there; its quality is interpolated.
    """
    measured = asdict(position.below)
    if position.above is None:
        return {**measured, "dial": position.budget, "between": None}
    unknown = dict.fromkeys(measured)
    between = [position.below.budget, position.above.budget]
    there = {"budget": position.budget, "quality": position.quality, "dial": position.budget}
    return {**unknown, **there, "between": between}


def _show(found: Calibrated, position: BudgetPosition, written: Path | None) -> None:
    points = found.frontier.points
    rows = [_row("parent", found.frontier.parent)]
    rows += [_row("→" if point is position.below else "", point) for point in points]
    print_table(COLUMNS, rows, marked=1 + points.index(position.below))
    say_wrapped(_sentence(position))
    if written is not None:
        say(f"Written to {written}: calls that name no dial use it.")
    if found.picture is not None:
        say(f"Picture: {found.picture}")


def _row(mark: str, point: OperatingPoint) -> list[str]:
    return [
        mark,
        f"{point.budget:g}" if mark != "parent" else "",
        f"{point.active_share:.3f}",
        in_short(point.flops_per_token),
        size_text(point.bytes_per_token),
        f"{point.loss:.4f}",
        f"{point.quality:.4f}",
        f"{point.agreement:.3f}",
        in_short(point.tokens_per_s),
    ]


def _sentence(position: BudgetPosition) -> str:
    below, above = position.below, position.above
    if above is None:
        share = f"{below.active_share:.1%} of the FFN on average"
        return f"Operating point: budget {below.budget:g}, quality {below.quality:.4f}, {share}."
    return (
        f"Operating point: budget {position.budget:g}, between two measured ones: {below.budget:g} "
        f"(quality {below.quality:.4f}) and {above.budget:g} (quality {above.quality:.4f}). "
        f"Thresholds are interpolated there; so is the quality to expect, {position.quality:.4f}."
    )
