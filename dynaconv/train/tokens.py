"""Tokens that are not padding: the only ones that count in thresholds, shares, and what routers learn."""

from __future__ import annotations

from torch import Tensor


def real_tokens(values: Tensor, mask: Tensor | None, *, features: int = 0) -> Tensor:
    """``values`` of the tokens that are not padding: (M,), or (M, n) where there are ``features``.

    Args:
        values: (B, T) or (B, T, n); (B * T) or (B * T, n) of models (OPT) that flatten tokens before their FFNs.
        mask: (B, T) bool, False on padding; ``None`` where nothing is padded.
        features: Dimensions beyond those of the tokens, 0 or 1.
    """
    flat = values.flatten(0, values.dim() - 1 - features)
    return flat if mask is None else flat[mask.flatten()]
