"""What tokens cost: numbers computed by hand, and never less for more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_models import dynamic_model, neurons_model, token_ids
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.dynamic.cost import NEURONS, FFNShape, UnitCost, ffn_cost
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout, RouterLayout
from dynaconv.dynamic.policy import Full
from dynaconv.dynamic.recorder import Recorder

Maker = Callable[..., Path]
SHARES = st.floats(0, 1)
D, F = 64, 96


def row(bits: int) -> int:
    """Bytes of a row of 64 weights in ``bits`` bits: planes, two groups' scales and minimums, two units."""
    return bits * 8 + 2 * 2 + 4


def test_a_gated_ffn_by_hand() -> None:
    shape, copy = FFNShape(D, F, inputs=2, itemsize=2, biases=0), FewBitCopy(CopyLayout(4, 32), bits=3, coarse=2)
    assert shape.bytes == 3 * D * F * 2 and shape.flops == 3 * 2 * D * F
    first, second, low = copy.first_cost(shape), copy.second_cost(shape), copy.low_cost(shape)
    assert first == (F * (row(2) + 2), F * 2 * D)
    assert second == (8 + row(3) + 2, 2 * 2 * D)  # another plane of gate, three of up, the norm of down
    assert low == (2 * 8 + row(4), 3 * 2 * D)  # the fourth planes of gate and up, and down
    cost = ffn_cost(shape, router=first, closer=second, low=low, means=True)
    assert cost.bytes.fixed == pytest.approx((first[0] + 2 * D) / shape.bytes)
    assert cost.bytes.exact == pytest.approx(1 + 2 * F / shape.bytes)
    assert cost.bytes.low == pytest.approx(F * (low[0] + 2) / shape.bytes)
    assert cost.bytes.closer == pytest.approx(F * second[0] / shape.bytes)
    assert cost.flops == pytest.approx((1 / 3, 1.0, 1.0, 2 / 3))
    assert ffn_cost(shape, router=first).bytes == pytest.approx((first[0] / shape.bytes, 1.0, 0.0, 0.0))


def test_an_ungated_ffn_with_biases_by_hand() -> None:
    shape, copy = FFNShape(D, F, inputs=1, itemsize=4, biases=F + D), FewBitCopy(CopyLayout(4, 32), bits=4, coarse=2)
    assert shape.bytes == 4 * (2 * D * F + F + D) and shape.flops == 2 * 2 * D * F
    assert copy.first_cost(shape) == (F * (row(2) + 2), F * 2 * D)
    assert copy.second_cost(shape) == (2 * 8 + 2, 2 * D)
    assert copy.low_cost(shape) == (row(4), 2 * D), "all planes of up have been read"


@given(
    cost=st.builds(UnitCost, SHARES, SHARES, SHARES, SHARES).filter(lambda one: one.low <= one.exact),
    shares=st.tuples(SHARES, SHARES, SHARES),
    more=st.tuples(SHARES, SHARES, SHARES),
)
def test_more_costs_no_less(
    cost: UnitCost, shares: tuple[float, float, float], more: tuple[float, float, float]
) -> None:
    exact, active, closer = sorted(shares)
    larger = [part + (1 - part) * add for part, add in zip((active, exact, closer), more, strict=True)]
    larger[1] = min(larger[0], larger[1])
    assert cost.of(active, exact, closer) <= cost.of(*larger) + 1e-12
    assert NEURONS.of(active, active, closer) == active


def test_the_model_charges_what_its_parts_are(tiny_checkpoint: Maker) -> None:
    for family in ("llama", "opt"):
        model = neurons_model(tiny_checkpoint(family, dtype=torch.bfloat16))
        ffn = model.ffns()[0]
        inputs = 2 if family == "llama" else 1
        stored = [part for part in ffn.weights() if isinstance(part, torch.Tensor)]
        biases = sum(part.numel() for part in stored if part.dim() == 1)
        shape = FFNShape(D, F, inputs, 2, biases)
        assert shape.bytes == sum(part.nbytes for part in stored)
        few = ffn.copy
        expected = ffn_cost(
            shape, router=few.first_cost(shape), closer=few.second_cost(shape), low=few.low_cost(shape), means=True
        )
        assert ffn.cost == expected
    linear = dynamic_model(tiny_checkpoint(), "linear").ffns()[0]
    elements = sum(p.numel() for p in linear.router.parameters())
    assert linear.cost.bytes == pytest.approx((4 * elements / (4 * 3 * D * F), 1.0, 0.0, 0.0))
    assert linear.cost.flops == pytest.approx((2 * elements / (2 * 3 * D * F), 1.0, 0.0, 0.0))


def test_low_bit_values_and_less_looking_are_cheaper(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    costs = [neurons_model(folder, copy=CopyLayout(bits)).ffns()[0].cost for bits in (3, 4, 6, 8)]
    assert [cost.bytes.low for cost in costs] == sorted(cost.bytes.low for cost in costs)
    assert all(0 < cost.bytes.low < cost.bytes.exact for cost in costs)
    looks = [RouterLayout("sketch", bits=bits, coarse=coarse) for bits, coarse in ((2, 1), (3, 2), (4, 3), (4, 4))]
    fixed = [neurons_model(folder, router=look).ffns()[0].cost.bytes.fixed for look in looks]
    assert fixed == sorted(fixed) and fixed[0] < fixed[-1]


def test_a_record_adds_up_neuron_by_neuron(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids()
    chosen: list = []

    class Keeping(Recorder):
        def record(self, record) -> None:  # type: ignore[no-untyped-def]
            super().record(record)
            chosen.append(record.choice)

    recorder = Keeping()
    with torch.no_grad(), model.call.using(model.policy(0.4), recorder):
        model(ids)
    cost = model.ffns()[0].cost.bytes
    for choice, shares in zip(chosen, recorder.all_costs().unbind(1), strict=True):
        active, exact, read, _ = shares
        assert torch.equal(active, choice.on.flatten(0, 1).double().mean(-1))
        assert torch.equal(exact, choice.exact.flatten(0, 1).double().mean(-1))
        assert bool((choice.exact <= choice.on).all()) and bool((choice.on <= choice.closer).all())
        closer = choice.closer.flatten(0, 1).double().mean(-1)
        by_hand = cost.fixed + cost.exact * exact + cost.low * (active - exact) + cost.closer * closer
        torch.testing.assert_close(read, by_hand)
    assert 0 < float(recorder.all_costs()[1].mean()) < float(recorder.all_costs()[0].mean()) < 1
    full = Recorder()
    with torch.no_grad(), model.call.using(Full(), full):
        model(ids)
    assert bool((full.all_costs() == 1).all()), "no router runs at the full dial"
