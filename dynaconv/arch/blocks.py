"""Where the neurons of an FFN are cut into blocks. Profile measures along these edges and carve cuts at them."""

from __future__ import annotations

from dynaconv.errors import ConfigError

MAX_BLOCKS = 64  # a token's choice of blocks is the bits of one int64
GRANULES = (128, 16)  # kernels read tiles of this many neurons; the smaller one is for tiny models


def block_edges(neurons: int, blocks: int) -> tuple[int, ...]:
    """Cuts ``neurons`` into ``blocks`` blocks that differ by at most one granule, and cover every neuron once.

    Inner edges are multiples of 128 where each block can have 128 neurons, else of 16 where it can have 16, else
    of 1; what does not fill a granule falls to the last block.

    Args:
        neurons: F.
        blocks: N, from 1 to 64.

    Returns:
        N + 1 strictly ascending positions, the first 0 and the last F. Width n is the neurons ``[0, edges[n])``.

    Raises:
        ConfigError: ``blocks`` is out of range, or more than there are neurons.
    """
    if not 1 <= blocks <= MAX_BLOCKS:
        raise ConfigError(f"blocks is {blocks}; it must be a whole number from 1 to {MAX_BLOCKS}")
    if blocks > neurons:
        raise ConfigError(
            f"blocks is {blocks}, but the FFNs have {neurons} neurons",
            hint=f"blocks={min(neurons, MAX_BLOCKS)} or less",
        )
    granule = next((size for size in GRANULES if neurons >= size * blocks), 1)
    step = blocks * granule
    inner = (granule * ((2 * i * neurons + step) // (2 * step)) for i in range(1, blocks))  # rounded to the nearest
    return (0, *inner, neurons)
