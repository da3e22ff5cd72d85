"""Codes of weights: what is read of them is near the weights, nearer with every plane, whatever the weights are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynaconv.kernels import codes
from dynaconv.kernels.codes import Codes, bytes_a_row

MATRICES = ["normal", "positive", "negative", "far from zero", "outliers", "zero", "one value", "zero rows"]


def matrix(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights (R, C) float32 of one ``kind``."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "positive":
        return drawn.abs()
    if kind == "negative":
        return -drawn.abs()
    if kind == "far from zero":
        return 5 + 0.1 * drawn
    if kind == "outliers":
        return drawn.index_fill(1, torch.tensor([0]), 40.0)
    if kind == "zero":
        return torch.zeros(rows, columns)
    if kind == "one value":
        return torch.full((rows, columns), -0.7)
    return drawn * (torch.arange(rows) % 2)[:, None] if kind == "zero rows" else drawn


def code_values(made: Codes) -> Tensor:
    """The whole codes (R, C) int64, unpacked one bit at a time."""
    found = torch.zeros(made.planes.shape[1], made.columns, dtype=torch.int64)
    for plane in made.planes.tolist():
        for row, packed in enumerate(plane):
            for column in range(made.columns):
                found[row, column] = 2 * found[row, column] + (packed[column // 8] >> (7 - column % 8) & 1)
    return found


def by_definition(made: Codes, read: int) -> Tensor:
    """What the first ``read`` planes say, weight by weight: the middle of the codes that begin with these bits."""
    cut = 2 ** (made.bits - read)
    middle = code_values(made) // cut * cut + (cut - 1) / 2
    group = torch.arange(made.columns) // made.group
    scale = made.scales.double() * made.units[:, :1].double()
    minimum = made.minimums.double() * made.units[:, 1:].double()
    return middle * scale[:, group] - minimum[:, group]


def error(weight: Tensor, found: Tensor) -> float:
    """Mean square, relative to that of the weights."""
    return float((found - weight.float()).square().sum() / weight.float().square().sum().clamp_min(1e-30))


@settings(max_examples=40)
@given(
    kind=st.sampled_from(MATRICES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    bits=st.integers(1, 8),
    group=st.sampled_from([1, 3, 8, 32, 100]),
    seed=st.integers(0, 99),
)
def test_planes_are_the_high_bits_of_one_code(
    kind: str, rows: int, columns: int, bits: int, group: int, seed: int
) -> None:
    weight = matrix(kind, rows, columns, seed)
    made = Codes.of(weight, bits, group)
    groups = -(-columns // group)
    assert (made.bits, made.columns, made.group) == (bits, columns, group)
    assert made.planes.shape == (bits, rows, -(-columns // 8)) and made.planes.dtype == torch.uint8
    assert made.scales.shape == made.minimums.shape == (rows, groups) and made.units.shape == (rows, 2)
    for read in range(1, bits + 1):
        torch.testing.assert_close(made.values(read).double(), by_definition(made, read), rtol=1e-5, atol=1e-5)
    assert torch.equal(made.values(), made.values(bits))
    stored = made.planes.element_size() * made.planes[:, 0].numel() + made.scales[0].nbytes + made.minimums[0].nbytes
    assert stored + made.units[0].nbytes == bytes_a_row(columns, bits, group)


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "outliers", "zero rows"])
def test_more_bits_and_more_planes_are_nearer(kind: str) -> None:
    weight = matrix(kind, 24, 131)
    written = [error(weight, Codes.of(weight, bits).values()) for bits in range(1, 9)]
    assert all(more < 0.7 * less for less, more in pairwise(written)), written
    made = Codes.of(weight, 6)
    read = [error(weight, made.values(planes)) for planes in range(1, 7)]
    assert all(more < 0.9 * less for less, more in pairwise(read)), read
    assert read[-1] == error(weight, made.values())


@pytest.mark.parametrize("kind", MATRICES)
def test_no_weight_is_further_off_than_its_interval(kind: str) -> None:
    """What p of b planes leave open is 2^(b - p) steps wide; the shrunken ranges cut off a fifth of a range at most."""
    weight, bits = matrix(kind, 12, 77), 4
    made = Codes.of(weight, bits)
    step = (made.scales.float() * made.units[:, :1].float()).repeat_interleave(made.group, 1)[:, :77]
    whole = made.values()
    for read in range(1, bits + 1):
        assert bool(((made.values(read) - whole).abs() <= step * (2 ** (bits - read) - 1) / 2 * 1.0001).all())
    cut_off = 0.2 * (2**bits - 1) / 0.8 + 1
    assert bool(((whole - weight).abs() <= step * cut_off + 1e-6).all())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zeros_and_single_values_are_exact_enough(bits: int) -> None:
    assert Codes.of(torch.zeros(3, 40), bits).values().abs().max() < 1e-30
    for value in (0.7, -0.7, 1e-3, 300.0):
        found = Codes.of(torch.full((2, 40), value), bits).values()
        torch.testing.assert_close(found, torch.full((2, 40), value), rtol=0.02, atol=0)
    single = torch.tensor([[0.3]])
    torch.testing.assert_close(Codes.of(single, bits).values(), single, rtol=0.02, atol=0)


@pytest.mark.parametrize("power", [-20, -9, 6, 12])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_size_of_the_weights_does_not_matter(bits: int, power: int) -> None:
    weight = matrix("normal", 8, 64)
    one, other = Codes.of(weight, bits), Codes.of(weight * 2.0**power, bits)
    assert torch.equal(other.values(), one.values() * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype_have_the_codes_of_their_values(dtype: torch.dtype) -> None:
    weight = matrix("normal", 6, 45).to(dtype)
    made, same = Codes.of(weight, 4), Codes.of(weight.float(), 4)
    assert torch.equal(made.planes, same.planes) and torch.equal(made.scales, same.scales)
    assert torch.equal(made.values(dtype=dtype), same.values().to(dtype))


def test_pieces_change_nothing_and_rows_are_coded_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix("normal", 9, 50)
    whole = Codes.of(weight, 3)
    again = Codes.of(weight.clone(), 3)
    monkeypatch.setattr(codes, "PIECE", 100)  # two rows at once
    pieces = Codes.of(weight, 3)
    for name in ("planes", "scales", "minimums", "units"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(again, name), expected) and torch.equal(getattr(pieces, name), expected)
        row = getattr(Codes.of(weight[4:5], 3), name)
        assert torch.equal(row, expected[:, 4:5] if name == "planes" else expected[4:5])
    assert torch.equal(pieces.values(2), whole.values(2))


def test_bytes_of_a_row_by_hand() -> None:
    assert bytes_a_row(64, 4) == 4 * 8 + 2 * 2 + 4
    assert bytes_a_row(65, 2, 16) == 2 * 9 + 2 * 5 + 4
    assert bytes_a_row(65, 2, 16, further=True) == 2 * 9
    assert bytes_a_row(64, 0, further=True) == 0
    assert bytes_a_row(64, 2) + bytes_a_row(64, 1, further=True) == bytes_a_row(64, 3)
