"""The shape that a smaller checkpoint is to have: what follows from what was asked for, and why it may not exist.

D residual width, F FFN width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import Family
from dynaconv.config import SubcloneConfig
from dynaconv.convert.channels import check_head_dim
from dynaconv.errors import ConfigError

GRANULES = (
    128,
    64,
    32,
    16,
    8,
    4,
    2,
)  # what a size that is not whole is rounded to: the largest that is small beside it
ALIGNMENT = (128, 64)  # matrix kernels want sizes that these divide
CHANNELS = ("q_dim", "k_dim", "v_dim")
FIELDS = ("layers", "residual", "ffn", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that a resize can change.

    Attributes:
        layers: L.
        residual: D.
        ffn: F.
        heads: Query heads.
        kv_heads: Key and value heads; as many as query heads where the family has no grouped queries.
        head_dim: Channels of a head.
    """

    layers: int
    residual: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shape:
        """The shape of ``checkpoint``."""
        sizes = checkpoint.sizes
        kv_heads = sizes.get("kv_head", sizes["q_head"])
        return cls(checkpoint.layers, sizes["residual"], sizes["ffn"], sizes["q_head"], kv_heads, sizes["q_dim"])

    @property
    def group(self) -> int:
        """Query heads of each kv head."""
        return self.heads // self.kv_heads

    def sizes(self, source: Mapping[str, int]) -> dict[str, int]:
        """Length of every axis, where ``source`` has those of the parent."""
        changed = {"residual": self.residual, "ffn": self.ffn, "q_head": self.heads, "kv_head": self.kv_heads}
        changed |= dict.fromkeys(CHANNELS, self.head_dim)
        return {axis: changed.get(axis, size) for axis, size in source.items()}

    def words(self) -> str:
        """Such as ``4 layers, residual 128, ffn 512, 2 heads of 64 (1 kv)``."""
        kv = "" if self.kv_heads == self.heads else f" ({self.kv_heads} kv)"
        heads = f"{self.heads} heads of {self.head_dim}{kv}"
        return f"{self.layers} layers, residual {self.residual}, ffn {self.ffn}, {heads}"


def derives_head_dim(checkpoint: Checkpoint) -> bool:
    """Whether the heads make up the residual stream: heads x head_dim = D, as in GPT-2."""
    return checkpoint.family.sizes["q_dim"].field is None


def grouped(checkpoint: Checkpoint) -> bool:
    """Whether the family can have fewer kv heads than query heads."""
    return "kv_head" in checkpoint.sizes


def target_shape(checkpoint: Checkpoint, wanted: SubcloneConfig) -> Shape:
    """The shape that sizes and ratio in ``wanted`` ask for. What nobody asked for stays as it is.

    A ratio is of widths: D, F and the number of heads; a size given beside it wins. Whole kv groups go unless the
    number of kv heads is given.

    Raises:
        ConfigError: The shape is larger than ``checkpoint``'s somewhere, or no model of this family has it.
    """
    source = Shape.of(checkpoint)
    shape = _scaled(checkpoint, source, wanted.ratio) if wanted.ratio is not None else source
    asked = {name: getattr(wanted, name) for name in FIELDS if getattr(wanted, name) is not None}
    zero = [f"{name} is {value}; it must be at least 1" for name, value in asked.items() if value < 1]
    if zero:
        raise ConfigError.from_problems(zero, where="subclone")
    shape = replace(shape, **asked)
    problems: list[str] = []
    if derives_head_dim(checkpoint):
        shape = _derived(shape, source, asked)
    if not grouped(checkpoint):
        if "kv_heads" in asked and asked["kv_heads"] != shape.heads:
            family = checkpoint.family.model_type
            problems.append(f"kv_heads is {asked['kv_heads']}, but {family} has no grouped queries: leave it out")
        shape = replace(shape, kv_heads=shape.heads)
    elif "heads" in asked and "kv_heads" not in asked:
        shape = _kv_for_heads(shape, source)
    elif "kv_heads" in asked and "heads" not in asked:
        shape = replace(shape, heads=shape.kv_heads * source.group)
    problems += shape_problems(checkpoint, shape)
    if not problems:
        check_head_dim(checkpoint, shape.head_dim)
        problems += _stock_problems(checkpoint, shape)
    if problems:
        raise ConfigError.from_problems(problems, where="subclone")
    return shape


def shape_problems(checkpoint: Checkpoint, shape: Shape) -> list[str]:
    """Why a smaller ``checkpoint`` cannot have ``shape``, one sentence each; empty when it can."""
    source, found = Shape.of(checkpoint), []
    for name, size in asdict(shape).items():
        largest = getattr(source, name)
        if name == "head_dim" and size > largest and derives_head_dim(checkpoint):
            found.append(
                f"in {checkpoint.family.model_type} the heads make up the residual stream: {shape.heads} of them would "
                f"have {size} channels of {shape.residual}, and the source's have {largest}: "
                f"residual={shape.heads * largest} heads={shape.heads}"
            )
        elif size > largest:
            found.append(
                f"{name} is {size}, the source has {largest}: subclone only makes smaller (hyperclone grows), "
                f"so {name} is at most {largest}"
            )
        elif size < 1:
            found.append(f"{name} is {size}; it must be at least 1")
    if found:
        return found
    least = min(source.layers, 2)
    if shape.layers < least:
        found.append(f"layers is {shape.layers}; the first and the last are never removed, so at least {least} stay")
    found += _head_problems(shape, source)
    if derives_head_dim(checkpoint) and shape.heads * shape.head_dim != shape.residual:
        found.append(
            f"in {checkpoint.family.model_type} the heads make up the residual stream, but {shape.heads} heads of "
            f"{shape.head_dim} are not {shape.residual}: {_derived_choices(shape, source)}"
        )
    return found


def alignment_warnings(source: Shape, shape: Shape) -> list[str]:
    """Sizes that lost what made them fast: multiples of 128 or 64 that became something else."""
    pairs = {
        "residual": (source.residual, shape.residual),
        "ffn": (source.ffn, shape.ffn),
        "heads x head_dim": (source.heads * source.head_dim, shape.heads * shape.head_dim),
    }
    found = []
    for name, (old, new) in pairs.items():
        lost = next((size for size in ALIGNMENT if old % size == 0), None)
        if lost is not None and new != old and new % ALIGNMENT[-1]:
            below = new - new % ALIGNMENT[-1]
            near = " or ".join(str(size) for size in (below, below + ALIGNMENT[-1]) if 0 < size <= old)
            found.append(f"{name} {new} is not a multiple of 64, which makes matrix products slow: {near} would be")
    return found


def _scaled(checkpoint: Checkpoint, source: Shape, ratio: float) -> Shape:
    """D, F and heads times ``ratio``, rounded to what is possible."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio}; it must be above 0 and at most 1", where="subclone")
    kv_heads = _at_least_one(source.kv_heads * ratio)
    group = min(source.group, _at_least_one(source.heads * ratio / kv_heads))
    shape = replace(source, ffn=rounded(source.ffn * ratio), heads=kv_heads * group, kv_heads=kv_heads)
    if derives_head_dim(checkpoint):
        return replace(shape, residual=shape.heads * source.head_dim)
    residual = rounded(source.residual * ratio)
    if residual % shape.heads and wants_multiple(checkpoint.family, checkpoint.config):
        residual = shape.heads * max(1, round(residual / shape.heads))
    return replace(shape, residual=residual)


def rounded(size: float) -> int:
    """``size`` where it is whole, else the nearest multiple of a power of two that is at most an eighth of it."""
    if abs(size - round(size)) < 1e-6:
        return max(1, round(size))
    granule = next((granule for granule in GRANULES if 8 * granule <= size), 1)
    return max(1, granule * round(size / granule))


def _at_least_one(value: float) -> int:
    return max(1, round(value))


def _derived(shape: Shape, source: Shape, asked: Mapping[str, int]) -> Shape:
    """Heads or head_dim that follow from D in families where the heads make it up."""
    if "heads" not in asked and "head_dim" not in asked and shape.residual % source.head_dim == 0:
        return replace(shape, heads=shape.residual // source.head_dim)
    if "heads" not in asked and "head_dim" in asked and shape.residual % shape.head_dim == 0:
        return replace(shape, heads=shape.residual // shape.head_dim)
    if "head_dim" not in asked and shape.residual % shape.heads == 0:
        return replace(shape, head_dim=shape.residual // shape.heads)
    return shape


def _kv_for_heads(shape: Shape, source: Shape) -> Shape:
    """As many kv heads as keep the groups whole; left as it is where that is impossible, for the caller to refuse."""
    return replace(shape, kv_heads=shape.heads // source.group) if shape.heads % source.group == 0 else shape


def wants_multiple(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether transformers refuses models like ``config``'s whose D is no multiple of the query heads.

    It does for some families although their heads have a length of their own.
    """
    heads, residual = family.sizes_of(config)["q_head"], family.sizes["residual"].field
    return heads > 1 and refused({**config, str(residual): 8 * heads + 1}) is not None


def refused(config: Mapping[str, Any]) -> str | None:
    """What transformers has against a model with ``config``; ``None`` when it takes it."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # it raises its own, those of its hub client, and plain ones
        return str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return None


def _stock_problems(checkpoint: Checkpoint, shape: Shape) -> list[str]:
    """Why transformers would not load ``shape``, though all tensors are there."""
    sizes = shape.sizes(checkpoint.sizes)
    reason = refused(checkpoint.family.resized(checkpoint.config, sizes, range(checkpoint.layers)))
    if reason is None:
        return []
    if shape.residual % shape.heads == 0:
        return [f"transformers loads no {checkpoint.family.model_type} of {shape.words()}: {reason}"]
    below = shape.residual - shape.residual % shape.heads
    largest = checkpoint.sizes["residual"]
    near = " or ".join(f"residual={size}" for size in (below, below + shape.heads) if 0 < size <= largest)
    return [
        f"transformers loads no {checkpoint.family.model_type} whose residual width ({shape.residual}) is not a "
        f"multiple of its heads ({shape.heads}): {near}"
    ]


def _head_problems(shape: Shape, source: Shape) -> list[str]:
    if shape.heads % shape.kv_heads:
        below = shape.heads - shape.heads % shape.kv_heads
        choices = [size for size in (below, below + shape.kv_heads) if 0 < size <= shape.kv_heads * source.group]
        listed = " or ".join(f"heads={size}" for size in choices)
        divisors = [size for size in range(1, source.kv_heads + 1) if shape.heads % size == 0]
        kept = [size for size in divisors if shape.heads // size <= source.group]
        also = " or ".join(f"kv_heads={size}" for size in kept[-2:])
        return [
            f"{shape.heads} query heads cannot share {shape.kv_heads} kv heads evenly: "
            + ", or ".join(part for part in (listed, also) if part)
        ]
    if shape.group > source.group:
        return [
            f"{shape.heads} query heads over {shape.kv_heads} kv heads are {shape.group} a group, and the source has "
            f"only {source.group}: heads={shape.kv_heads * source.group}, or "
            f"kv_heads={-(-shape.heads // source.group)} and more"
        ]
    return []


def _derived_choices(shape: Shape, source: Shape) -> str:
    """Shapes nearby that exist where heads x head_dim = D."""
    below = shape.residual - shape.residual % source.head_dim
    sizes = [size for size in (below, below + source.head_dim) if 0 < size <= source.residual]
    same = " or ".join(f"residual={size} heads={size // source.head_dim}" for size in sizes)
    divisors = [
        heads
        for heads in range(1, source.heads + 1)
        if shape.residual % heads == 0 and shape.residual // heads <= source.head_dim
    ]
    nearest = sorted(divisors, key=lambda heads: (abs(heads - shape.heads), heads))[:2]
    other = " or ".join(f"heads={heads} (of {shape.residual // heads})" for heads in sorted(nearest))
    kept = f", or with residual {shape.residual} {other}" if other else ""
    return f"{same}{kept}"
