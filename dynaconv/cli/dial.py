"""``dynaconv dial-k``: the measured frontier, and the point of it that a budget or a quality asks for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynaconv.artifacts.files import size_text, write_json
from dynaconv.calibrate.frontier import (
    Choice,
    Frontier,
    OperatingPoint,
    check_budget,
    check_quality,
    select_by_budget,
    select_by_quality,
)
from dynaconv.cli.folders import Calibrated, find_calibrated
from dynaconv.cli.output import in_short, print_json, print_table, say
from dynaconv.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from rich.text import Text

COLUMNS = ["", "budget", "active share", "FLOPs/token", "bytes/token", "loss", "quality", "agreement", "tokens/s"]


def dial_k(
    path: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run, or an exported model.")],
    budget: Annotated[
        float | None, typer.Option(metavar="S", help="Active FFN share to spend at most, in (0, 1].")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(metavar="Q", help="exp(parent loss - loss) to hold; 1 is the parent's perplexity.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Store the point in the model: its dial from then on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Pick an operating point from the calibrated frontier. With neither option, show where the model stands."""
    _check(budget, quality, write)
    found = find_calibrated(path)
    if budget is not None:
        choice = select_by_budget(found.frontier.points, budget)
    elif quality is not None:
        choice = select_by_quality(found.frontier.points, quality)
    else:
        choice = _stored(found)
    written = _write(found, choice) if write else None
    if as_json:
        print_json({**found.content, "operating_point": _as_json(choice)})
    else:
        _show(found, choice, written)


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


def _stored(found: Calibrated) -> Choice:
    """The operating point the model has now: the one that was written, or the full dial."""
    budget = 1.0
    if found.stored is not None and found.stored.is_file():
        try:
            budget = float(json.loads(found.stored.read_text(encoding="utf-8"))["budget"])
        except (ValueError, KeyError, TypeError) as error:
            hint = "dial-k --budget S --write writes it anew"
            raise ArtifactError("the stored dial cannot be read", where=found.stored, found=error, hint=hint) from error
    return select_by_budget(found.frontier.points, budget)


def _write(found: Calibrated, choice: Choice) -> Path:
    if found.stored is None:
        hint = f"dynaconv export {found.folder}"
        raise ArtifactError("there is no exported model to write the dial into", where=found.folder, hint=hint)
    write_json(found.stored, {"budget": choice.budget, "quality": choice.point.quality})
    return found.stored


def _as_json(choice: Choice) -> dict[str, Any]:
    """The measured point; ``dial`` is where the dial goes, and ``between`` the measured budgets on its two sides."""
    between = [choice.point.budget, choice.above.budget] if choice.above is not None else None
    return {**asdict(choice.point), "dial": choice.budget, "between": between}


def _show(found: Calibrated, choice: Choice, written: Path | None) -> None:
    frontier: Frontier = found.frontier
    rows = [_row("parent", frontier.parent)]
    rows += [_row("→" if point is choice.point else "", point) for point in frontier.points]
    print_table(COLUMNS, rows)
    say(_sentence(choice))
    if written is not None:
        say(f"Written to {written}: calls that name no dial use it.")
    if found.picture is not None:
        say(f"Picture: {found.picture}")


def _row(mark: str, point: OperatingPoint) -> list[str | Text]:
    from rich.text import Text

    cells = [
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
    return [Text(cell, style="bold green" if mark == "→" else "") for cell in cells]


def _sentence(choice: Choice) -> str:
    point = choice.point
    if choice.above is None:
        share = f"{point.active_share:.1%} of the FFN on average"
        return f"Operating point: budget {point.budget:g}, quality {point.quality:.4f}, {share}."
    return (
        f"Operating point: budget {choice.budget:g}, between two measured ones: {point.budget:g} "
        f"(quality {point.quality:.4f}) and {choice.above.budget:g} (quality {choice.above.quality:.4f}). "
        "Thresholds are interpolated there; expect a quality between the two."
    )
