"""``dynaconv.json``: what a converted folder says about its blocks, routers and dial.

Ships with every exported model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dynaconv.dynamic.site import Site
from dynaconv.frontier import Frontier
from dynaconv.kernels.partition import Partition

SCHEMA = 3
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
        kind: Name of a router kind (``routers/kinds.py``), ``none`` where there are no routers.
        linear: Whether there is a linear branch.
        rank: Hidden width of the Linear-SiLU-Linear branch; 0 where there is none.
        bound: Largest score of a kind whose scores are bounded.
        bits: Bit planes of the weights' few-bit copy that the second look of a ``sketch`` reads; 0 for other kinds.
        coarse: Those that its first look reads of all neurons.
        reach: How far below the threshold, in nats, the first look may put neurons that are looked at again.
    """

    kind: str = "none"
    linear: bool = False
    rank: int = 0
    bound: float = 2.0
    bits: int = 0
    coarse: int = 0
    reach: float = 0.0


@dataclass(frozen=True)
class CopyLayout:
    """How the copy is made.

    Attributes:
        bits: Bits of low-bit values, b.
        group: Adjacent weights of a neuron that share a scale and a minimum.
        values: Whether tokens may use low-bit values; otherwise the copy serves the router alone.
    """

    bits: int = 4
    group: int = 32
    values: bool = True


@dataclass(frozen=True)
class DialTable:
    """What calibration solved: the threshold of each site's router at each budget of a grid.

    Attributes:
        budgets: Shares of the parent's FFN bytes, ascending, G values, the last 1.
        thresholds: ``thresholds[g][l]``, one a site, never rising with the budget.
        exact: Thresholds above which values are exact, likewise; empty where all active blocks are exact.
        unit: What budgets are shares of: ``bytes``, or ``neurons`` (files of schemas 1 and 2, routers not counted).
    """

    budgets: tuple[float, ...]
    thresholds: tuple[tuple[float, ...], ...]
    exact: tuple[tuple[float, ...], ...] = ()
    unit: str = "bytes"


@dataclass(frozen=True)
class Layout:
    """Content of ``dynaconv.json``.

    Attributes:
        partition: The blocks of each FFN.
        layers: Number of decoder layers, L; each has one site, its FFN.
        ffn: Where the FFNs are.
        router: What the routers are.
        copy: How the few-bit copy of the weights is made; ``None`` where there is none.
        means: Budgets at which the means of neurons that are off were measured, ascending; between them they are
            interpolated. Empty where such neurons give nothing.
        itemsize: Bytes of a weight in the checkpoint: what costs are counted in.
        dial: The calibrated dial, ``None`` before calibration.
        lineage: Where it came from: source, recipe and stage fingerprints.
        frontier: What calibration measured, ``None`` before it.
    """

    partition: Partition
    layers: int
    ffn: FFNLayout
    router: RouterLayout = field(default_factory=RouterLayout)
    copy: CopyLayout | None = None
    means: tuple[float, ...] = ()
    itemsize: int = 4
    dial: DialTable | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    frontier: Frontier | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The L sites, in order."""
        return tuple(Site(f"layers.{layer}.ffn", layer, self.partition) for layer in range(self.layers))

    @property
    def blocks(self) -> int:
        """Number of blocks of an FFN, N."""
        return self.partition.blocks

    def save(self, folder: Path) -> None:
        """Writes ``dynaconv.json`` into ``folder``."""
        content = {
            **asdict(self),
            "schema": SCHEMA,
            "partition": self.partition.to_json(),
            "frontier": None if self.frontier is None else self.frontier.to_json(),
        }
        text = json.dumps(content, indent=1, sort_keys=True)
        (Path(folder) / LAYOUT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Layout:
        """Reads ``dynaconv.json`` from ``folder``; files of older schemas are translated.

        Raises:
            FileNotFoundError: The folder was not made by dynaconv.
            ValueError: The file is damaged, or of a schema that this dynaconv does not know.
        """
        path = Path(folder) / LAYOUT_FILE
        text = path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
            schema = content.pop("schema", None)
            if schema == 1:
                content = _from_schema_1(content)
            if schema in (1, 2):
                content = _from_schema_2(content)
            if schema in (1, 2, SCHEMA):
                return _read(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged ({found}): export the model again") from error
        newer = isinstance(schema, int) and schema > SCHEMA
        way_out = "upgrade dynaconv" if newer else "export the model again"
        raise ValueError(f"{path} has schema {schema!r}; this dynaconv reads 1 to {SCHEMA}: {way_out}")

    def with_dial(self, dial: DialTable, frontier: Frontier | None) -> Layout:
        """The same layout with what calibration found."""
        return replace(self, dial=dial, frontier=frontier)


def _read(content: dict[str, Any]) -> Layout:
    """The layout of a file of schema 3; any error of lookup, type or value says that it is damaged."""
    layers, dial = content["layers"], content["dial"]
    if type(layers) is not int or layers < 1:
        raise ValueError(f"layers is {layers!r}")
    if content["itemsize"] not in (1, 2, 4, 8):
        raise ValueError(f"itemsize is {content['itemsize']!r}")
    router, copy = RouterLayout(**content["router"]), content["copy"]
    if copy is not None:
        copy = CopyLayout(**copy)
        if not (1 <= copy.bits <= 8 and copy.group >= 1):
            raise ValueError(f"the few-bit copy has {copy.bits} bits in groups of {copy.group}")
    if router.kind == "sketch" and not (copy and 1 <= router.coarse <= router.bits <= copy.bits):
        raise ValueError(f"the sketch reads {router.coarse}, then {router.bits} of {copy.bits if copy else 0} bits")
    partition = Partition.from_json(content["partition"])
    if router.kind == "sketch" and partition.blocks != partition.neurons:
        raise ValueError(f"the sketch chooses among {partition.blocks} blocks, not {partition.neurons} neurons")
    means = tuple(map(float, content["means"]))
    if means and not _ascending(means):
        raise ValueError(f"means are of budgets {means}, not ascending within (0, 1]")
    return Layout(
        partition=partition,
        layers=layers,
        ffn=FFNLayout(**content["ffn"]),
        router=router,
        copy=copy,
        means=means,
        itemsize=int(content["itemsize"]),
        dial=None if dial is None else _dial_table(dial, layers),
        lineage=content["lineage"],
        frontier=Frontier.from_json(content["frontier"]) if content["frontier"] else None,
    )


def _dial_table(content: Any, layers: int) -> DialTable:
    budgets = tuple(map(float, content["budgets"]))
    rows = {name: tuple(tuple(map(float, row)) for row in content[name]) for name in ("thresholds", "exact")}
    if not budgets or not _ascending(budgets):
        raise ValueError(f"budgets are {budgets}, not ascending within (0, 1]")
    for name, table in rows.items():
        if (table or name == "thresholds") and [len(row) for row in table] != [layers] * len(budgets):
            raise ValueError(f"{name} are not {len(budgets)} rows of {layers}")
    if content["unit"] not in ("bytes", "neurons"):
        raise ValueError(f"budgets are shares of {content['unit']!r}")
    return DialTable(budgets, **rows, unit=content["unit"])


def _ascending(budgets: tuple[float, ...]) -> bool:
    """Whether they rise, within (0, 1]."""
    return list(budgets) == sorted(set(budgets)) and 0 < budgets[0] <= budgets[-1] <= 1


def _from_schema_1(old: dict[str, Any]) -> dict[str, Any]:
    """Content of schema 1 as schema 2 says it: routers had other names, and a rising level where thresholds fall."""
    kind = {"gate": "width", "blocks": "linear"}.get(old["router"]["kind"], old["router"]["kind"])
    dial = old["dial"]
    if dial is not None:
        rows = [[1 - level if kind == "class" else -level for level in row] for row in dial["levels"]]
        dial = {"budgets": dial["budgets"], "thresholds": rows}
    new = {**old, "partition": {"edges": old["edges"]}, "router": {**old["router"], "kind": kind}, "dial": dial}
    return {name: new[name] for name in ("partition", "layers", "ffn", "router", "dial", "lineage", "frontier")}


def _from_schema_2(old: dict[str, Any]) -> dict[str, Any]:
    """Content of schema 2 as schema 3 says it: all values were exact, and budgets were shares of neurons."""
    dial = old["dial"]
    if dial is not None:
        dial = {**dial, "exact": [], "unit": "neurons"}
    return {**old, "dial": dial, "copy": None, "means": [], "itemsize": 4}
