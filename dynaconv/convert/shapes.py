"""Which shape a smaller model of so many parameters should have, from the importance of what each shape would keep.

Every shape on sensible granules is tried: so many layers, residual channels, kv groups and heads in each; the FFN width
that meets the number of parameters follows. A shape's loss is a weighted sum over axes of -log(share of the importance
that stays): of the residual stream, of neurons and heads on average over the layers that stay, and of the layers that
may go (the first and the last never do) half by their influence and half by their number, for a layer that adds little
now may add much when its neighbours are gone.

The weights (ours) are what that sum must have to be proportional to the rise of the loss, measured on five shapes of
2.8M parameters made from a 4.5M Llama and trained on 60k tokens; on four others of 1.5M they put first what ends at
3.14 and last what ends at 4.03, which equal weights would have chosen. Before training a residual channel counts for
still more, after much training it probably counts for less, so runners-up of other proportions are returned too.

D residual width, F FFN width, L layers, Q query heads, K kv heads, d head width; primes are of a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.spec import Family
from dynaconv.convert.importance import Importance
from dynaconv.convert.selection import kept_layers
from dynaconv.convert.target import Shape, wants_multiple
from dynaconv.errors import ConfigError

TOLERANCE = 0.02  # of the parameters asked for
GRANULES = (128, 64, 16)  # the first of which an axis has 32; on small models 8, and 1 on the tiniest
RUNNERS_UP = 4
WEIGHTS = {"residual": 3.0, "ffn": 1.0, "heads": 1.0, "layers": 1.2}
LEAST = 1e-6  # a share of nothing has no logarithm


@dataclass(frozen=True)
class Candidate:
    """A shape of about the parameters that were asked for.

    Attributes:
        shape: Its sizes.
        parameters: Its parameters, tied ones once.
        lost: The weighted sum of -log of the shares that it keeps; the lowest is chosen.
        kept: Share of the importance that stays, by axis.
        reason: Why it is where it is, one line.
    """

    shape: Shape
    parameters: int
    lost: float
    kept: Mapping[str, float]
    reason: str = ""


def find_shapes(family: Family, config: Mapping[str, Any], importance: Importance, params: float) -> list[Candidate]:
    """The best shape with ``params`` parameters to within 2 %, and runners-up of other proportions, best first.

    Where no shape comes so near, the nearest is the only one.

    Args:
        family: The architecture.
        config: Content of the parent's ``config.json``.
        importance: What was measured on the parent.
        params: Parameters of the result.

    Raises:
        ConfigError: The parent has fewer parameters, or even the smallest shape has far more.
    """
    count = Counter(family, config)
    source = count.source
    most = count(source)
    if params > most:
        raise ConfigError(
            f"params is {params:.4g}, and the source has {most:.4g}: subclone only makes smaller (hyperclone grows)",
            where="subclone",
        )
    if params == most:
        return [Candidate(source, most, 0.0, dict.fromkeys(WEIGHTS, 1.0), "the source")]
    shares = Shares(importance, source)
    found = [_candidate(shape, size, shares) for shape, size in _shapes(family, config, count, params)]
    if not found:
        raise ConfigError(f"no shape of this model has about {params:.4g} parameters", where="subclone")
    within = [each for each in found if abs(each.parameters - params) <= TOLERANCE * params]
    if within:
        return _explained(_various(sorted(within, key=lambda each: (each.lost, -each.parameters)), source))
    nearest = min(found, key=lambda each: (abs(each.parameters - params), each.lost))
    if nearest.parameters > 2 * params:
        raise ConfigError(
            f"params is {params:.4g}, and the smallest shape has {nearest.parameters:.4g}",
            where="subclone",
            hint=f"params={nearest.parameters} or more; the vocabulary alone limits how small a model can be",
        )
    off = nearest.parameters / params - 1
    return [replace(nearest, reason=f"the nearest there is: {off:+.1%} parameters, {_keeps(nearest)}")]


class Counter:
    """Parameters of a family's models, exactly, without making the list of their tensors.

    Args:
        family: The architecture.
        config: Content of a ``config.json``; says which tensors there are.

    Attributes:
        sizes: Length of every axis of ``config``'s model.
        source: Its shape.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.sizes = family.sizes_of(config)
        kv_heads = self.sizes.get("kv_head", self.sizes["q_head"])
        layers, heads = family.layer_count(config), self.sizes["q_head"]
        self.source = Shape(layers, self.sizes["residual"], self.sizes["ffn"], heads, kv_heads, self.sizes["q_dim"])
        specs = {slot.spec.name: slot.spec for slot in family.slots(config).values()}.values()
        self._outside = [spec.dimensions for spec in specs if "{layer}" not in spec.name]
        self._inside = [spec.dimensions for spec in specs if "{layer}" in spec.name]

    def __call__(self, shape: Shape) -> int:
        """Parameters of a model of ``shape``."""
        outside, inside = self.parts(shape)
        return outside + shape.layers * inside

    def parts(self, shape: Shape) -> tuple[int, int]:
        """Parameters outside of the layers, and of one layer."""
        sizes = shape.sizes(self.sizes)
        outside, inside = (
            sum(math.prod(dimension.size(sizes) for dimension in dimensions) for dimensions in tensors)
            for tensors in (self._outside, self._inside)
        )
        return outside, inside


class Shares:
    """Share of the importance that shapes keep, looked up: a search asks hundreds of thousands of times.

    Args:
        importance: What was measured on the parent.
        source: The parent's shape.
    """

    def __init__(self, importance: Importance, source: Shape) -> None:
        self._residual = _cumulated(importance.residual).tolist()
        ffn, heads = _cumulated(importance.neurons), _heads(importance, source)
        self._layers: dict[int, float] = {}
        self._ffn: dict[int, list[float]] = {}
        self._heads: dict[int, list[list[float]]] = {}
        influence = importance.influence.double()
        for count in range(min(2, source.layers), source.layers + 1):
            layers = list(kept_layers(importance.influence, count))
            stays, total = float(influence[layers[1:-1]].sum()), float(influence[1:-1].sum())
            number = (count - 2) / (source.layers - 2) if source.layers > 2 else 1.0
            self._layers[count] = (number + (stays / total if total > 0 else number)) / 2
            self._ffn[count], self._heads[count] = ffn[layers].mean(0).tolist(), heads[layers].mean(0).tolist()

    def kept(self, shape: Shape) -> dict[str, float]:
        """Share of each axis that ``shape`` keeps."""
        return {
            "residual": self._residual[shape.residual],
            "ffn": self._ffn[shape.layers][shape.ffn],
            "heads": self._heads[shape.layers][shape.kv_heads - 1][shape.group],
            "layers": self._layers[shape.layers],
        }


def _heads(importance: Importance, source: Shape) -> Tensor:
    """Share that 1, 2, ... K kv groups have of which 0, 1, ... heads stay: (L, K, group + 1)."""
    scores = importance.heads.view(source.layers, source.kv_heads, source.group)
    order = scores.mean(2).argsort(dim=1, descending=True, stable=True)  # (L, K)
    within = _cumulated(scores, normalised=False)
    ranked = within.gather(1, order[..., None].expand_as(within)).cumsum(1)
    return ranked / ranked[:, -1:, -1:].clamp_min(torch.finfo(torch.float64).tiny)


def granule(size: int) -> int:
    """What sizes along an axis of ``size`` should be multiples of."""
    return next((granule for granule in GRANULES if 32 * granule <= size), 8 if size >= 16 else 1)


def _cumulated(scores: Tensor, *, normalised: bool = True) -> Tensor:
    """Sums (..., n + 1) of the largest 0, 1, ... n of ``scores`` (..., n)."""
    ranked = scores.double().sort(dim=-1, descending=True).values
    sums = torch.nn.functional.pad(ranked.cumsum(-1), (1, 0))
    return sums / sums[..., -1:].clamp_min(torch.finfo(torch.float64).tiny) if normalised else sums


def _candidate(shape: Shape, parameters: int, shares: Shares) -> Candidate:
    kept = shares.kept(shape)
    lost = sum(-weight * math.log(max(kept[axis], LEAST)) for axis, weight in WEIGHTS.items())
    return Candidate(shape, parameters, lost, kept)


def _shapes(family: Family, config: Mapping[str, Any], count: Counter, params: float) -> Iterator[tuple[Shape, int]]:
    """For every choice of layers, residual channels and heads the FFN width that comes nearest to ``params``."""
    source = count.source
    step = granule(source.ffn)
    multiple = wants_multiple(family, config)
    for narrow in _narrower(family, count):
        if multiple and narrow.residual % narrow.heads:
            continue
        outside, inside = count.parts(replace(narrow, ffn=step))
        neuron = (count.parts(replace(narrow, ffn=2 * step))[1] - inside) / step if 2 * step <= source.ffn else 0
        for layers in range(min(2, source.layers), source.layers + 1):
            room = (params - outside) / layers - inside
            wanted = step + (room / neuron if neuron else 0)
            ffn = min(source.ffn, max(step, step * round(wanted / step)))
            yield replace(narrow, layers=layers, ffn=ffn), round(outside + layers * (inside + (ffn - step) * neuron))


def _narrower(family: Family, count: Counter) -> Iterator[Shape]:
    """Every choice of residual channels and heads."""
    source = count.source
    derived = family.sizes["q_dim"].field is None
    step = source.head_dim if derived else granule(source.residual)
    for residual in sorted({*range(step, source.residual + 1, step), source.residual}):
        if derived:
            heads = residual // source.head_dim
            yield replace(source, residual=residual, heads=heads, kv_heads=heads)
            continue
        for kv_heads in range(1, source.kv_heads + 1):
            for group in range(1, source.group + 1):
                yield replace(source, residual=residual, heads=kv_heads * group, kv_heads=kv_heads)


def _various(ranked: list[Candidate], source: Shape) -> list[Candidate]:
    """The best, and runners-up that differ from all before by more than a tenth of the layers or residual channels."""

    def near(one: Shape, other: Shape) -> bool:
        layers, residual = abs(one.layers - other.layers), abs(one.residual - other.residual)
        return 10 * layers <= source.layers and 10 * residual <= source.residual

    chosen: list[Candidate] = []
    for each in ranked:
        if not any(near(each.shape, other.shape) for other in chosen):
            chosen.append(each)
        if len(chosen) == 1 + RUNNERS_UP:
            break
    return chosen


def _explained(candidates: list[Candidate]) -> list[Candidate]:
    """With reasons: the first by what it keeps, the others by what they trade for it."""
    best = candidates[0]
    explained = [replace(best, reason=f"loses least importance: {_keeps(best)}")]
    for other in candidates[1:]:
        less = [axis for axis in other.kept if other.kept[axis] < best.kept[axis] - 5e-4]
        more = [axis for axis in other.kept if other.kept[axis] > best.kept[axis] + 5e-4]
        trade = f"less of {_and(less)}" + (f" for more of {_and(more)}" if more else "")
        reason = f"{other.lost - best.lost:.3f} more lost: {trade or 'the same'}; {_keeps(other)}"
        explained.append(replace(other, reason=reason))
    return explained


def _keeps(candidate: Candidate) -> str:
    return "keeps " + ", ".join(f"{share:.0%} of {axis}" for axis, share in candidate.kept.items())


def _and(axes: list[str]) -> str:
    return " and ".join([", ".join(axes[:-1]), axes[-1]] if len(axes) > 1 else axes)
