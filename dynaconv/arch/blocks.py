"""Where the neurons of an FFN are cut into blocks. Profile measures along these edges and carve cuts at them."""

from __future__ import annotations

from dynaconv.errors import ConfigError

MAX_BLOCKS = 64  # a token's choice of blocks is the bits of one int64
GRANULES = (128, 16)  # kernels read tiles of this many neurons; the smaller one is for tiny models


def block_edges(neurons: int, blocks: int, experts: str = "nested") -> tuple[int, ...]:
    """Cuts ``neurons`` into ``blocks`` blocks that differ by at most one granule, and cover every neuron once.

    Inner edges are multiples of 128 where each block can have 128 neurons, else of 16 where it can have 16, else
    of 1; what does not fill a granule falls to the last block. Blocks of routed experts are all alike.

    Args:
        neurons: F.
        blocks: N, from 1 to 64.
        experts: ``nested`` or ``routed``.

    Returns:
        N + 1 strictly ascending positions, the first 0 and the last F. Block n is ``[edges[n], edges[n + 1])``.

    Raises:
        ConfigError: ``blocks`` is out of range, or more than there are neurons, or does not divide those of routed
            experts.
    """
    if not 1 <= blocks <= MAX_BLOCKS:
        raise ConfigError(f"blocks is {blocks}; it must be a whole number from 1 to {MAX_BLOCKS}")
    if blocks > neurons:
        raise ConfigError(
            f"blocks is {blocks}, but the FFNs have {neurons} neurons",
            hint=f"blocks={min(neurons, MAX_BLOCKS)} or less",
        )
    if experts == "routed":
        if neurons % blocks:
            near = sorted((n for n in range(1, MAX_BLOCKS + 1) if neurons % n == 0), key=lambda n: abs(n - blocks))
            raise ConfigError(
                f"blocks is {blocks}, which does not divide the FFNs' {neurons} neurons",
                expected="equal blocks, since experts is 'routed'",
                hint=" or ".join(f"blocks={n}" for n in sorted(near[:2])),
            )
        return tuple(range(0, neurons + 1, neurons // blocks))
    granule = next((size for size in GRANULES if neurons >= size * blocks), 1)
    step = blocks * granule
    inner = (granule * ((2 * i * neurons + step) // (2 * step)) for i in range(1, blocks))  # rounded to the nearest
    return (0, *inner, neurons)
