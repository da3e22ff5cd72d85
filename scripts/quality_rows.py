"""Rows of the quality benchmark: measured once, kept in files, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import typer

from dynaconv.artifacts.files import read_json, write_json

SHARES = ("bytes_share", "flops_share", "active_share")
OWN_POLICY = {  # what each recipe makes, by the policy it is meant for
    "tune": "sketched",
    "routed": "routed",
    "nested": "routed",
    "nested-difficulty": "routed",
    "nested-uniform": "uniform width",
    "static-half": "uniform width",
}


class Measured(Protocol):
    """What a row says: a :class:`dynaconv.evaluation.scoring.Score`, or what a baseline gives in its place."""

    @property
    def loss(self) -> float:
        """Nats a token."""

    @property
    def agreement(self) -> float | None:
        """Share of positions with the parent's most likely token."""

    @property
    def bytes_share(self) -> float:
        """Share of the parent's FFN bytes that is read for a token."""

    @property
    def flops_share(self) -> float:
        """Share of the parent's FFN FLOPs."""

    @property
    def active_share(self) -> float:
        """Share of the neurons."""

    @property
    def widths(self) -> tuple[float, ...]:
        """Mean width of each layer in blocks; empty where there are none."""


@dataclass
class Rows:
    """Measured rows in a file of their own; a row that is there is not measured again.

    Attributes:
        path: The file.
        settings: What the rows depend on; rows of other settings are dropped.
        seed: Of the copy that is measured.
        ffn_share: Share that the parent's FFNs have in the bytes of all linear layers, the output head included.
    """

    path: Path
    settings: dict[str, Any]
    seed: int = 0
    ffn_share: float = 1.0

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = known_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def row(self, weights: str, policy: str, share: float, measure: Callable[[], Measured]) -> dict[str, Any]:
        """Measures and saves one row, or finds it."""
        key = {"weights": weights, "seed": self.seed, "policy": policy, "share": share}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        got = measure()
        row = key | {name: getattr(got, name) for name in ("loss", "agreement", *SHARES)}
        row["linear_bytes_share"] = 1 - self.ffn_share + self.ffn_share * got.bytes_share
        row["width_by_layer"] = list(got.widths)
        self.rows.append(row)
        write_json(self.path, {"settings": self.settings, "rows": self.rows})
        spent = " ".join(f"{name.removesuffix('_share')} {row[name]:.4f}" for name in SHARES)
        typer.echo(f"{weights:30} {policy:26} {spent} linear {row['linear_bytes_share']:.4f} loss {got.loss:.4f}")
        return row


def known_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the file at ``path`` that were measured with ``settings``."""
    known = read_json(path) if path.is_file() else {}
    return known["rows"] if known.get("settings") == settings else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each recipe by its own policy, against plain dense training on the same tokens; lists are by seed.

    ``loss`` by share; ``full_dial_cost``: relative loss of the full dial over dense training's; ``perplexity_over``:
    relative perplexity over dense training's, by share; ``ahead``: nats by which the mean of routed, or of nested, is
    below another's.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["policy"] in (OWN_POLICY.get(row["weights"]), "full dial", "dense"):
            losses.setdefault(row["weights"], {}).setdefault(f"{row['share']:g}", []).append(row["loss"])
    found: dict[str, Any] = {"loss": losses}
    if "dense" in losses:
        dense = losses["dense"]["1"][0]
        dials = {name: by_share for name, by_share in losses.items() if name in OWN_POLICY}
        found["full_dial_cost"] = {
            name: [loss / dense - 1 for loss in by_share["1"]] for name, by_share in dials.items() if "1" in by_share
        }
        found["perplexity_over"] = {
            name: {share: [math.expm1(loss - dense) for loss in each] for share, each in by_share.items()}
            for name, by_share in dials.items()
        }
    found["ahead"] = {ours: _ahead(ours, losses) for ours in ("tune", "routed", "nested") if ours in losses}
    return found


def _ahead(ours: str, losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    own = losses[ours]
    return {
        name: {share: _mean(each) - _mean(own[share]) for share, each in by_share.items() if share in own}
        for name, by_share in losses.items()
        if name in OWN_POLICY and name != ours
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[tuple[float, float]]]]:
    """Points (bytes_share, nats over the parent) of each method, a list a seed, by ascending bytes.

    Of tuned copies only the policy that each is meant for; of what is not trained, everything.
    """
    parent = next(row["loss"] for row in rows if row["weights"] == "parent")
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        weights = row["weights"]
        if weights in ("parent", "dense") or weights.startswith("carved for"):
            continue
        if weights in OWN_POLICY and row["policy"] not in (OWN_POLICY[weights], "full dial"):
            continue
        name = f"{weights}, tuned" if weights in OWN_POLICY else weights
        found.setdefault(name, {}).setdefault(row["seed"], []).append((row["bytes_share"], row["loss"] - parent))
    return {name: [sorted(points) for _, points in sorted(by_seed.items())] for name, by_seed in found.items()}
