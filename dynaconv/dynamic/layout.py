"""``dynaconv.json``: what a converted folder says about its blocks, routers and dial.

Ships with every exported model, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SCHEMA = 1
LAYOUT_FILE = "dynaconv.json"
ROUTER_FILE = "dynaconv.safetensors"
OPERATING_POINT_FILE = "dial.json"


@dataclass(frozen=True)
class FFNLayout:
    """Where the feed-forward networks are and what their projections are called.

    Attributes:
        path: Module path with ``{layer}``, such as ``model.layers.{layer}.mlp``; that of the decoder layer where the
            projections lie in it directly.
        gate: Name of the gate projection; ``None`` where the FFN has no gate, the name of the up projection where both
            are stored as one, the gate's rows first.
        up: Name of the up projection (the first, where there is no gate).
        down: Name of the down projection.
        activation: Field of ``config.json`` that names the activation.
    """

    path: str
    gate: str | None
    up: str
    down: str
    activation: str


@dataclass(frozen=True)
class RouterLayout:
    """What the routers are.

    Attributes:
        kind: ``gate`` (one wanted width), ``curve`` (log error of every width), ``class`` (logits over widths),
            ``blocks`` (a score for each routed block), or ``none``.
        linear: Whether there is a linear branch.
        rank: Hidden width of the Linear-SiLU-Linear branch; 0 where there is none.
        bound: Largest score of a ``gate`` router, in blocks, or of a ``blocks`` router.
    """

    kind: str = "none"
    linear: bool = False
    rank: int = 0
    bound: float = 3.0


@dataclass(frozen=True)
class DialTable:
    """Thresholds solved by calibration: the level of each layer's router at each budget.

    Attributes:
        budgets: Active FFN shares, ascending, G values, the last 1.
        levels: ``levels[g][l]``, one level a layer, never falling with the budget.
        qualities: exp(parent loss - loss) at each budget, measured.
    """

    budgets: tuple[float, ...]
    levels: tuple[tuple[float, ...], ...]
    qualities: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """Content of ``dynaconv.json``.

    Attributes:
        edges: N + 1 neuron positions; block n is the neurons [edges[n], edges[n + 1]). Of nested experts, width n is
            the first n blocks.
        layers: Number of decoder layers, L.
        ffn: Where the FFNs are.
        router: What the routers are.
        dial: The calibrated dial, ``None`` before calibration.
        lineage: Where it came from: source, recipe and stage fingerprints.
        frontier: What calibration measured, as ``frontier.json``.
    """

    edges: tuple[int, ...]
    layers: int
    ffn: FFNLayout
    router: RouterLayout = field(default_factory=RouterLayout)
    dial: DialTable | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    frontier: dict[str, Any] = field(default_factory=dict)

    @property
    def routed(self) -> bool:
        """Whether tokens choose blocks one by one (routed experts), and not how many (nested experts)."""
        return self.router.kind == "blocks"

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return len(self.edges) - 1

    def width_within(self, budget: float) -> int:
        """The largest width that uses at most the share ``budget`` of the neurons."""
        return max(n for n, edge in enumerate(self.edges) if edge <= budget * self.edges[-1] + 1e-9)

    def save(self, folder: Path) -> None:
        """Writes ``dynaconv.json`` into ``folder``."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)
        (Path(folder) / LAYOUT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Layout:
        """Reads ``dynaconv.json`` from ``folder``.

        Raises:
            FileNotFoundError: The folder was not made by dynaconv.
            ValueError: The file was written by a newer dynaconv.
        """
        content = json.loads((Path(folder) / LAYOUT_FILE).read_text(encoding="utf-8"))
        schema = content.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"{LAYOUT_FILE} has schema {schema}, this dynaconv reads {SCHEMA}: upgrade dynaconv")
        dial = content["dial"]
        if dial is not None:
            levels = tuple(tuple(row) for row in dial["levels"])
            dial = DialTable(tuple(dial["budgets"]), levels, tuple(dial["qualities"]))
        return cls(
            edges=tuple(content["edges"]),
            layers=content["layers"],
            ffn=FFNLayout(**content["ffn"]),
            router=RouterLayout(**content["router"]),
            dial=dial,
            lineage=content["lineage"],
            frontier=content["frontier"],
        )

    def with_dial(self, dial: DialTable, frontier: dict[str, Any]) -> Layout:
        """The same layout with what calibration found."""
        return replace(self, dial=dial, frontier=frontier)
