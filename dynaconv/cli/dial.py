"""``dynaconv dial-k``: the measured frontier, and the point of it that a cost or a quality asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dynaconv.artifacts.files import size_text, write_json
from dynaconv.cli.folders import Calibrated, find_calibrated, frontier_errors
from dynaconv.cli.output import in_short, print_json, say, say_wrapped
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.frontier import (
    UNITS,
    BudgetPosition,
    Frontier,
    OperatingPoint,
    check_budget,
    check_flops,
    check_quality,
)

Shown = tuple[Column, Callable[[OperatingPoint], str]]
"""A column, and a point's cell in it."""


def dial_k(
    path: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run, or an exported model.")],
    budget: Annotated[
        float | None,
        typer.Option(
            "--bytes", "--budget", metavar="S", help="Share of the parent's FFN bytes to read for a token, in (0, 1]."
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="S", help="Share of the parent's FFN FLOPs to compute at most, in (0, 1]."),
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
    """Pick an operating point from the calibrated frontier: by bytes, by FLOPs or by quality, routers included.

    With none of the three, show where the model stands.
    """
    with frontier_errors():
        _check(budget, flops, quality, write)
        found = find_calibrated(path)
        if flops is not None:
            budget = found.frontier.budget_for_flops(flops)
        elif quality is not None:
            budget = found.frontier.budget_for_quality(quality)
        position = found.frontier.at(_stored(found) if budget is None else budget)
    written = _write(found, position) if write else None
    if as_json:
        print_json({**found.frontier.to_json(), "operating_point": _as_json(position)})
    else:
        _show(found, position, written)


def _check(budget: float | None, flops: float | None, quality: float | None, write: bool) -> None:
    """Stops at options that no frontier could answer."""
    options = {
        "--bytes": (budget, check_budget),
        "--flops": (flops, check_flops),
        "--quality": (quality, check_quality),
    }
    given = [name for name, (value, _) in options.items() if value is not None]
    if len(given) > 1:
        both = "both" if len(given) == 2 else "all"
        raise ConfigError(f"{' and '.join(given)} are {both} given", hint="give one of them")
    for value, check in options.values():
        if value is not None:
            check(value)
    if write and not given:
        raise ConfigError("--write needs a point to write", hint="add --bytes S, --flops S or --quality Q")


def _stored(found: Calibrated) -> float:
    """The budget the model has now: the one that was written, or that of the full dial."""
    if found.stored is None or not found.stored.is_file():
        return 1.0
    try:
        return float(json.loads(found.stored.read_text(encoding="utf-8"))["budget"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "dial-k --bytes S --write writes it anew"
        raise ArtifactError("the stored dial cannot be read", where=found.stored, found=error, hint=hint) from error


def _write(found: Calibrated, position: BudgetPosition) -> Path:
    if found.stored is None:
        hint = f"dynaconv export {found.folder}"
        raise ArtifactError("there is no exported model to write the dial into", where=found.folder, hint=hint)
    write_json(found.stored, {"budget": position.budget, "quality": position.quality})
    return found.stored


def _as_json(position: BudgetPosition) -> dict[str, Any]:
    """``budget`` is where the dial goes, and ``between`` the measured budgets on its two sides.

    What was not measured at that budget is null there; its quality and shares are interpolated.
    """
    measured = asdict(position.below)
    if position.above is None:
        return {**measured, "dial": position.budget, "between": None}
    unknown = dict.fromkeys(measured)
    names = ("quality", "bytes_share", "flops_share", "active_share", "exact_share")
    there = {"budget": position.budget, "dial": position.budget, **{n: position.interpolated(n) for n in names}}
    return {**unknown, **there, "between": [position.below.budget, position.above.budget]}


def _show(found: Calibrated, position: BudgetPosition, written: Path | None) -> None:
    frontier = found.frontier
    columns, points = _columns(frontier), frontier.points
    parent = ["" if column.name == "budget" else cell(frontier.parent) for column, cell in columns]
    rows = [["→" if point is position.below else "", *(cell(point) for _, cell in columns)] for point in points]
    header = [Column("", words=True), *(column for column, _ in columns)]
    print_table(header, [["parent", *parent], *rows], marked=1 + points.index(position.below))
    if frontier.unit != "bytes":
        say_wrapped(f"An earlier version calibrated this model: here a budget is {UNITS[frontier.unit]}.")
    say_wrapped(_sentence(frontier, position))
    if written is not None:
        say(f"Written to {written}: calls that name no dial use it.")
    if found.picture is not None:
        say(f"Picture: {found.picture}")


def _columns(frontier: Frontier) -> list[Shown]:
    """What this frontier has to show, and what goes first where it is too wide."""
    counted = frontier.unit == "bytes"
    prompted = any(point.prompted_quality is not None for point in frontier.points)
    columns: list[tuple[bool, Column, Callable[[OperatingPoint], str]]] = [
        (True, Column("budget"), lambda point: f"{point.budget:g}"),
        (counted, Column("FFN bytes"), lambda point: f"{point.bytes_share:.3f}"),
        (counted, Column("FFN FLOPs"), lambda point: f"{point.flops_share:.3f}"),
        (True, Column("neurons", optional=1), lambda point: f"{point.active_share:.3f}"),
        (frontier.reads_low_bit_values, Column("exact neurons", optional=3), lambda point: f"{point.exact_share:.3f}"),
        (True, Column("loss", optional=4), lambda point: f"{point.loss:.4f}"),
        (True, Column("quality"), lambda point: f"{point.quality:.4f}"),
        (prompted, Column("prompted quality", optional=2), lambda point: _or_dash(point.prompted_quality)),
        (True, Column("agreement", optional=5), lambda point: f"{point.agreement:.3f}"),
        (True, Column("FLOPs/token", optional=6), lambda point: in_short(point.flops_per_token)),
        (True, Column("bytes/token", optional=7), lambda point: size_text(point.bytes_per_token)),
        (True, Column("tokens/s"), lambda point: in_short(point.tokens_per_s)),
    ]
    return [(column, cell) for shown, column, cell in columns if shown]


def _or_dash(quality: float | None) -> str:
    return "-" if quality is None else f"{quality:.4f}"


def _sentence(frontier: Frontier, position: BudgetPosition) -> str:
    below, above = position.below, position.above
    if above is None:
        prompted = below.prompted_quality
        after = f" ({prompted:.4f} after a prompt read at the full dial)" if prompted is not None else ""
        first = f"Operating point: budget {below.budget:g}, quality {below.quality:.4f}{after}."
        return f"{first} {_spent(frontier, position)}."
    return (
        f"Operating point: budget {position.budget:g}, between two measured ones: {below.budget:g} "
        f"(quality {below.quality:.4f}) and {above.budget:g} (quality {above.quality:.4f}). "
        f"Thresholds are interpolated there, and so are the quality to expect, {position.quality:.4f}, and the costs. "
        f"{_spent(frontier, position)}."
    )


def _spent(frontier: Frontier, position: BudgetPosition) -> str:
    """What a token costs there, in words."""
    names = ("bytes_share", "flops_share", "active_share", "exact_share")
    bytes_share, flops_share, active, exact = (f"{position.interpolated(name):.1%}" for name in names)
    neurons = f"{active} of the neurons are active"
    if frontier.reads_low_bit_values:
        neurons += f", {exact} with exact values"
    if frontier.unit != "bytes":
        return f"On average {neurons}"
    return (
        f"On average a token reads {bytes_share} of the parent's FFN bytes and computes {flops_share} of its FFN "
        f"FLOPs, routers included; {neurons}"
    )
