"""Where the neurons of an FFN are cut into blocks. Profile measures along these blocks and carve cuts at them."""

from __future__ import annotations

from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError
from dynaconv.kernels.partition import Partition

BLOCKS = 8  # of nested experts, where the recipe does not say how many
BLOCK_SIZE = 16  # neurons a block of routed experts, where the recipe does not say how many, ...
FEWEST_BLOCKS = 64  # ... and fewer in a narrow FFN, so that tokens have as many blocks to choose from
GRANULES = (128, 16)  # kernels read tiles of this many neurons; the smaller one is for tiny models


def ffn_partition(neurons: int, config: RunConfig) -> Partition:
    """How ``config`` cuts an FFN of F ``neurons``: one by one, or into routed blocks, or nested ones.

    Raises:
        ConfigError: ``blocks`` or ``block_size`` does not fit the FFN.
    """
    if config.experts == "neurons":
        return Partition.equal(neurons, 1)
    if config.experts == "routed":
        return routed_partition(neurons, config.block_size)
    return nested_partition(neurons, config.blocks)


def nested_partition(neurons: int, blocks: int | None = None) -> Partition:
    """Cuts ``neurons`` into ``blocks`` blocks that differ by at most one granule.

    Inner edges are multiples of 128 where each block can have 128 neurons, else of 16 where it can have 16, else
    of 1; what does not fill a granule falls to the last block.

    Args:
        neurons: F.
        blocks: N, from 1 to F; ``None`` takes 8, or F where there are fewer neurons.

    Raises:
        ConfigError: ``blocks`` is not from 1 to F.
    """
    if blocks is None:
        blocks = min(BLOCKS, neurons)
    _require_from_one("blocks", blocks, neurons)
    granule = next((size for size in GRANULES if neurons >= size * blocks), 1)
    step = blocks * granule
    inner = (granule * ((2 * i * neurons + step) // (2 * step)) for i in range(1, blocks))  # rounded to the nearest
    return Partition.at((0, *inner, neurons))


def routed_partition(neurons: int, block_size: int | None = None) -> Partition:
    """Cuts ``neurons`` into blocks of ``block_size``; the last block holds what is left.

    Args:
        neurons: F.
        block_size: Neurons a block, from 1 to F; ``None`` takes 16, or fewer where F has no 64 blocks of 16.

    Raises:
        ConfigError: ``block_size`` is not from 1 to F.
    """
    if block_size is None:
        block_size = min(BLOCK_SIZE, max(1, neurons // FEWEST_BLOCKS))
    _require_from_one("block_size", block_size, neurons)
    return Partition.equal(neurons, block_size)


def partition_text(layers: int, partition: Partition) -> str:
    """For people: ``30 FFNs of 1536 neurons in 96 blocks of 16``."""
    if partition.block_size == 1:
        return f"{layers} FFNs of {partition.neurons} neurons, each for itself"
    *sizes, last = partition.sizes
    if partition.block_size:
        shown = str(partition.block_size)
        if sizes and last != partition.block_size:
            shown += f", the last of {last}"
    else:
        shown = " or ".join(map(str, sorted({*sizes, last})))
    blocks = f"{partition.blocks} blocks" if sizes else "1 block"
    return f"{layers} FFNs of {partition.neurons} neurons in {blocks} of {shown}"


def _require_from_one(name: str, value: int, neurons: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be a whole number of at least 1")
    if value > neurons:
        hint = f"{name}={neurons} or less"
        raise ConfigError(f"{name} is {value}, but the FFNs have {neurons} neurons", hint=hint)
