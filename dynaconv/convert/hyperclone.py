"""HyperCloning (Samragh et al. 2024, arXiv 2409.12903): a larger model that computes exactly what the small one does.

Every hidden vector of the large model is made of copies of the small one's, so that a projection repeats its rows, and
its columns divided by the number of copies: W' = repeat(W, r_out, r_in) / r_in. Norms see the same statistics and the
logits stay. Beyond the paper: FFNs of any size, heads and their groups apart, longer heads, tied and scaled embeddings,
and more layers that at first add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import TensorSpec
from dynaconv.arch.surgery import Piece, Take
from dynaconv.config import HypercloneConfig
from dynaconv.convert import rotary
from dynaconv.convert.growth import Growth, grown_config, growth_of, head_copies, spread
from dynaconv.convert.noise import Copies, Pairs, add_noise, separate
from dynaconv.convert.resize import Resize
from dynaconv.errors import ConfigError

GRANULES = (128, 64)  # matrix units read tiles of this many channels
LONGEST_HEAD = 256  # of most attention kernels
DISTURBED = ("attention", "ffn")  # parts whose copies are told apart

T = TypeVar("T")


def plan_hyperclone(checkpoint: Checkpoint, wanted: HypercloneConfig, seed: int) -> Resize:
    """How to make ``checkpoint`` larger without changing what it computes.

    Args:
        checkpoint: The source; no weight of it is read.
        wanted: How much larger, and what tells copies apart.
        seed: Of the noise.

    Raises:
        ConfigError: What is wanted cannot be exact; says why, and what can be.
    """
    growth = growth_of(checkpoint, wanted)
    sizes = growth.sizes(checkpoint.sizes)
    layers = spread(checkpoint.layers, growth.layers).tolist()
    config = grown_config(checkpoint, growth, layers)
    channels = _channels(checkpoint, growth, config, layers)
    finish = Finishing(
        checkpoint=checkpoint,
        growth=growth,
        sizes=sizes,
        inserted=frozenset(new for new in range(1, len(layers)) if layers[new] == layers[new - 1]),
        variant=wanted.variant,
        snr_db=wanted.snr_db,
        seed=seed,
        queries={layer: each.query for layer, each in channels.items()} if _normalised(checkpoint) else {},
    )
    finish.check()
    return Resize(
        config=config,
        takes=_takes(checkpoint, growth, channels, divided=wanted.variant != "diagonal"),
        layers=layers,
        finish=finish,
        summary=_summary(checkpoint, growth, config, wanted, finish),
        warnings=_warnings(checkpoint, growth, sizes),
    )


def _channels(
    checkpoint: Checkpoint, growth: Growth, config: Mapping[str, Any], layers: list[int]
) -> dict[int, rotary.Channels]:
    """Where the channels of longer heads come from, by layer of the source; ``{}`` where heads keep their length."""
    if growth.head_dim == 1:
        return {}
    old, new = rotary.rotations(checkpoint.config), rotary.rotations(config)
    fixed = checkpoint.family.attention_scale is not None
    head_dim, factor = checkpoint.sizes["q_dim"], growth.head_dim
    kinds = rotary.kinds(old, checkpoint.config, checkpoint.layers)
    grown = {
        kind: rotary.grown(old.get(kind), new.get(kind), head_dim, factor, fixed_scale=fixed) for kind in set(kinds)
    }
    return {layer: grown[kind] for layer, kind in enumerate(kinds)}


def _normalised(checkpoint: Checkpoint) -> bool:
    """Whether queries are normalised: then scaling their projection changes nothing, and the norm must do it."""
    return any(_scales_queries(slot.spec) for slot in checkpoint.slots.values())


def _scales_queries(spec: TensorSpec) -> bool:
    return spec.part == "norm" and any("q_dim" in dimension.axes for dimension in spec.dimensions)


def _takes(
    checkpoint: Checkpoint, growth: Growth, channels: Mapping[int, rotary.Channels], *, divided: bool
) -> tuple[Take, ...]:
    """The copies along every axis that grows; what is summed over them is divided among them if ``divided``."""
    sizes = checkpoint.sizes
    queries, keys = head_copies(sizes["q_head"], sizes.get("kv_head", sizes["q_head"]), growth.heads, growth.kv_heads)
    neurons = spread(sizes["ffn"], growth.ffn)
    index = {
        "residual": torch.arange(sizes["residual"]).repeat(growth.residual),
        "ffn": neurons,
        "q_head": queries,
        **({"kv_head": keys} if "kv_head" in sizes else {}),
        "v_dim": torch.arange(sizes["v_dim"]).repeat(growth.head_dim),
    }
    takes = [
        Take(axis, positions, contracted=1 / Copies.of(positions).count if divided else 1.0)
        for axis, positions in index.items()
        if len(positions) != sizes[axis]
    ]
    if channels:
        indices = {layer: each.index for layer, each in channels.items()}
        normalised = _normalised(checkpoint)
        scaled = 1.0 if normalised else {layer: each.query for layer, each in channels.items()}
        takes += [Take("q_dim", indices, produced=scaled), Take("k_dim", indices)]
    return tuple(takes)


@dataclass
class Finishing:
    """What hyperclones need beyond copies and quotients, piece by piece.

    Attributes:
        checkpoint: The source.
        growth: What it becomes.
        sizes: Length of every axis of the result.
        inserted: Layers of the result that at first add nothing.
        variant: What tells copies apart.
        snr_db: Power of weights over noise, in decibels.
        seed: Of the noise.
        queries: Factors (m*d,) of normalised query channels, by layer of the source; ``{}`` where nothing is to do.
    """

    checkpoint: Checkpoint
    growth: Growth
    sizes: Mapping[str, int]
    inserted: frozenset[int]
    variant: str
    snr_db: float
    seed: int
    queries: Mapping[int, Tensor]
    _known: tuple[str, Any] = ("", None)

    def __call__(self, piece: Piece) -> Tensor:
        """The rows of ``piece`` as they are stored."""
        spec, tensor = piece.slot.spec, piece.tensor
        if spec.closes and piece.slot.layer in self.inserted:
            return torch.full_like(tensor, -spec.offset)
        if spec.part == "embedding":
            return tensor if self.embedding_factor == 1 else tensor.mul_(self.embedding_factor)
        if spec.part == "norm":
            return self._norm(piece)
        if spec.contracts is None or piece.positions[spec.contracts] is None:
            return tensor
        if spec.part not in DISTURBED:
            return self._divided(piece) if self.variant == "diagonal" else tensor
        if self.variant == "symmetric":
            return tensor
        return self._separated(piece) if self.variant == "diagonal" else self._disturbed(piece)

    def check(self) -> None:
        """Raises a ConfigError if the head is tied and no norm stands before it that could make up for the copies."""
        specs = [slot.spec for slot in self.checkpoint.slots.values() if slot.layer is None]
        if self.final_factor != 1 and not any(spec.part == "norm" for spec in specs):
            raise ConfigError(
                "residual cannot grow: the head is the embedding, and no norm before it can make up for the copies",
                where="hyperclone",
                hint="residual=1",
            )

    @property
    def embedding_factor(self) -> float:
        """What embeddings are multiplied with: models that scale them by sqrt(D) would scale them too much."""
        return 1 / sqrt(self.growth.residual) if self.checkpoint.family.embedding_scaled else 1.0

    @property
    def final_factor(self) -> float:
        """What the final norm is multiplied with: a tied head sums over all copies and cannot be divided itself."""
        return 1 / (self.growth.residual * self.embedding_factor) if self.checkpoint.tied else 1.0

    def _norm(self, piece: Piece) -> Tensor:
        spec, tensor = piece.slot.spec, piece.tensor
        if piece.slot.layer is None and self.final_factor != 1:
            return _times(tensor, torch.tensor(self.final_factor), spec.offset)
        if _scales_queries(spec) and self.queries:
            assert piece.source.layer is not None
            query = self.queries[piece.source.layer]
            factors = spec.dimensions[0].spread(lambda axis: query if axis == "q_dim" else torch.ones(self.sizes[axis]))
            return _times(tensor, factors[piece.start : piece.start + len(tensor)], spec.offset)
        return tensor

    def _disturbed(self, piece: Piece) -> Tensor:
        """Opposite noise on the copies of each input."""
        exact, made = piece.tensor, piece.tensor.to(self.checkpoint.reader.tensors[piece.source.name].dtype)
        rows, wide = (made, exact) if piece.slot.spec.contracts == 1 else (made.T, exact.T)
        name, pairs = piece.slot.name, self._remembered(piece, Pairs.of)
        add_noise(rows, wide, pairs, snr_db=self.snr_db, seed=self.seed, name=name, start=piece.start)
        return made

    def _separated(self, piece: Piece) -> Tensor:
        """Each copy of an output reads its own copy of each input."""
        contracts, tensor = piece.slot.spec.contracts, piece.tensor
        rows = tensor if contracts == 1 else tensor.T
        produced = piece.positions[1 - contracts] if contracts is not None else None
        rank = torch.zeros(len(rows), dtype=torch.int64)
        if produced is not None:
            rank = Copies.of(produced).rank[piece.start : piece.start + len(rows)]
        separate(rows, rank, self._remembered(piece, Copies.of))
        return tensor

    def _divided(self, piece: Piece) -> Tensor:
        """Inputs divided among their copies, where the takes did not do it."""
        count = self._remembered(piece, Copies.of).count
        shares = 1 / (count if piece.slot.spec.contracts == 1 else count[:, None])
        return piece.tensor.float().mul_(shares)

    def _remembered(self, piece: Piece, make: Callable[[Tensor], T]) -> T:
        """What ``make`` finds in the old positions of the inputs; pieces of one tensor come one after the other."""
        if self._known[0] != piece.slot.name:
            assert piece.slot.spec.contracts is not None
            positions = piece.positions[piece.slot.spec.contracts]
            assert positions is not None
            self._known = (piece.slot.name, make(positions))
        found: T = self._known[1]
        return found


def _times(tensor: Tensor, factor: Tensor, offset: float) -> Tensor:
    """A tensor that acts as offset + what is stored, times ``factor``."""
    return tensor.double().add_(offset).mul_(factor).sub_(offset)


def _summary(
    checkpoint: Checkpoint, growth: Growth, config: Mapping[str, Any], wanted: HypercloneConfig, finish: Finishing
) -> dict[str, Any]:
    old, new = checkpoint.sizes, finish.sizes
    parameters = sum(prod(slot.shape) for slot in checkpoint.family.slots(config).values())
    return {
        "method": "hyperclone",
        "variant": wanted.variant,
        "snr_db": wanted.snr_db if wanted.variant == "noisy" else None,
        "factors": {axis: round(new[axis] / old[axis], 6) for axis in old if new[axis] != old[axis]},
        "sizes": {axis: [old[axis], new[axis]] for axis in old},
        "layers": [checkpoint.layers, growth.layers],
        "inserted_layers": sorted(finish.inserted),
        "parameters": [checkpoint.parameters, parameters],
    }


def _warnings(checkpoint: Checkpoint, growth: Growth, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What works and is worth knowing: sizes that matrix units dislike, and divisions that round."""
    found, old = [], checkpoint.sizes
    granule = next((size for size in GRANULES if old["ffn"] % size == 0), None)
    if granule is not None and sizes["ffn"] % granule:
        low = sizes["ffn"] // granule * granule
        found.append(
            f"the FFN's {sizes['ffn']} neurons are no multiple of {granule} as the source's {old['ffn']} are, which "
            f"makes matrix products slower; {low} and {low + granule} are"
        )
    if sizes["q_dim"] > LONGEST_HEAD >= old["q_dim"]:
        found.append(f"heads of {sizes['q_dim']} channels: many attention kernels take no more than {LONGEST_HEAD}")
    copies = {growth.residual, growth.heads, growth.head_dim, -(-sizes["ffn"] // old["ffn"])}
    odd = sorted(count for count in copies if count & (count - 1))
    if odd and checkpoint.dtype.itemsize < 4:
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        listed = " and ".join(map(str, odd))
        found.append(f"dividing by {listed} rounds in {dtype}: logits stay as near as its rounding allows")
    return tuple(found)
