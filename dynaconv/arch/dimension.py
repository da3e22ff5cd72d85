"""Dimensions of tensors as expressions of named axes.

A query projection's rows are ``q_head*q_dim``: heads, each with its channels, the slowest axis first. Projections that
are stored as one are sums: Phi-3's gate and up ``ffn+ffn``, GPT-NeoX's queries, keys and values, interleaved by head,
``q_head*(q_dim+k_dim+v_dim)``. Whoever edits an axis reaches it wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOKEN = re.compile(r"\s*([a-z_]+|[+*()])")


@dataclass(frozen=True)
class Dimension:
    """A sum of products of axes and sums. Make one with :func:`dimension`.

    Attributes:
        text: As it was written.
        terms: What is added: each a product, the slowest factor first; a factor is an axis or a dimension.
    """

    text: str
    terms: tuple[tuple[str | Dimension, ...], ...]

    @property
    def axes(self) -> frozenset[str]:
        """Every axis in it."""
        factors = [factor for term in self.terms for factor in term]
        return frozenset().union(*({f} if isinstance(f, str) else f.axes for f in factors))

    def size(self, sizes: Mapping[str, int]) -> int:
        """Its length, from the lengths of the axes."""
        return sum(prod(sizes[f] if isinstance(f, str) else f.size(sizes) for f in term) for term in self.terms)

    def positions(self, sizes: Mapping[str, int], index: Callable[[str], Tensor | None]) -> Tensor:
        """Old positions (n,) int64 in their new order, when each axis is taken from at ``index(axis)``.

        Args:
            sizes: Old lengths of the axes.
            index: Positions (m,) int64 that are taken of an axis; ``None`` takes all.
        """
        import torch

        parts, offset = [], 0
        for term in self.terms:
            taken, length = torch.zeros(1, dtype=torch.int64), 1
            for factor in term:
                if isinstance(factor, str):
                    size, chosen = sizes[factor], index(factor)
                    inner = torch.arange(size) if chosen is None else chosen
                else:
                    size, inner = factor.size(sizes), factor.positions(sizes, index)
                taken = (taken[:, None] * size + inner).flatten()
                length *= size
            parts.append(taken + offset)
            offset += length
        return torch.cat(parts)

    def spread(self, value: Callable[[str], Tensor]) -> Tensor:
        """Values (n,) of every position: the product of its axes' values, ``value(axis)`` (m,) float each."""
        import torch

        parts = []
        for term in self.terms:
            product = torch.ones(1)
            for factor in term:
                inner = value(factor) if isinstance(factor, str) else factor.spread(value)
                product = (product[:, None] * inner).flatten()
            parts.append(product)
        return torch.cat(parts)


@cache
def dimension(text: str) -> Dimension:
    """Reads an expression such as ``q_head*(q_dim+k_dim+v_dim)``.

    Raises:
        ValueError: It is not a sum of products of axes.
    """
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"no dimension can be read from {text!r}")
        tokens.append(match.group(1))
        place = match.end()
    found = _sum(tokens, text)
    if tokens:
        raise ValueError(f"no dimension can be read from {text!r}: {tokens[0]!r} is left over")
    return found


def _sum(tokens: list[str], text: str) -> Dimension:
    terms = [_product(tokens, text)]
    while tokens and tokens[0] == "+":
        tokens.pop(0)
        terms.append(_product(tokens, text))
    return Dimension(text, tuple(terms))


def _product(tokens: list[str], text: str) -> tuple[str | Dimension, ...]:
    factors = [_factor(tokens, text)]
    while tokens and tokens[0] == "*":
        tokens.pop(0)
        factors.append(_factor(tokens, text))
    return tuple(factors)


def _factor(tokens: list[str], text: str) -> str | Dimension:
    token = tokens.pop(0) if tokens else ""
    if token == "(":
        inner = _sum(tokens, text)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError(f"no dimension can be read from {text!r}: a bracket is not closed")
        return inner
    if not token or token in "+*)":
        raise ValueError(f"no dimension can be read from {text!r}: an axis is missing")
    return token
