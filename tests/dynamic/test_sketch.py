"""Sketch routers: scores are what neurons would give by the first bits of the weights; two looks are one rule."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import neurons_model, token_ids
from ffn_networks import random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dynaconv
from dynaconv import Dial
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout, RouterLayout
from dynaconv.dynamic.recorder import Recorder
from dynaconv.dynamic.routers.sketch import SMALLEST, SketchRouter, blurred
from dynaconv.kernels.choice import Subset
from dynaconv.kernels.codes import Codes
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.weights import FFNWeights

WIDTH, NEURONS = 13, 37
Maker = Callable[..., Path]


def tokens(count: int = 40, seed: int = 5) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, **settings: Any) -> FFNWeights:
    return random_network(WIDTH, NEURONS, **{"dtype": torch.float32, **settings}, seed=seed)


def sketch(weights: FFNWeights, *, bits: int = 3, coarse: int = 2, reach: float = 0.7) -> SketchRouter:
    router = SketchRouter(WIDTH, Partition.equal(NEURONS, 1), RouterLayout("sketch", bits=bits, reach=reach))
    few = FewBitCopy(CopyLayout(4, 5), bits, coarse)
    few.follow(weights)
    router.follow(few, weights)
    router.up_mean.copy_(torch.linspace(0.1, 0.4, NEURONS))
    return router


def read(matrix: Tensor, bits: int) -> Tensor:
    return Codes.of(matrix, 4, 5).values(bits)


def seen(weights: FFNWeights, x: Tensor, part: str, bits: int) -> Tensor:
    """What the activation sees of ``part`` in ``bits`` bits, softened where it is flat below 0."""
    matrix, bias = (weights.gate, weights.gate_bias) if part == "gate" else (weights.up, weights.up_bias)
    assert matrix is not None
    found = x @ read(matrix, bits).T + (0 if bias is None else bias)
    if float(weights.activation(torch.tensor(-1.0))):
        return found
    error = (read(matrix, bits) - matrix).square().mean().sqrt() * x.norm(dim=-1, keepdim=True)
    return (found.double() + (found.double().square() + error.double().square()).sqrt()).float() / 2


def first_look(weights: FFNWeights, x: Tensor, bits: int, up_mean: Tensor) -> Tensor:
    """Scores of the first look in ``bits`` bits, from the definition."""
    given = weights.activation(seen(weights, x, "up" if weights.gate is None else "gate", bits)).abs()
    sizes = weights.down.norm(dim=0) * (1 if weights.gate is None else up_mean * x.norm(dim=-1, keepdim=True))
    return (given * sizes).clamp_min(SMALLEST).log()


def second_look(weights: FFNWeights, x: Tensor, bits: int) -> Tensor:
    """Scores of the second look in ``bits`` bits, from the definition."""
    given = weights.activation(seen(weights, x, "up" if weights.gate is None else "gate", bits))
    if weights.gate is not None:
        given = given * (x @ read(weights.up, bits).T + (0 if weights.up_bias is None else weights.up_bias))
    return (given.abs() * weights.down.norm(dim=0)).clamp_min(SMALLEST).log()


@pytest.mark.parametrize("activation", [1, 2], ids=["gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("coarse", [1, 2, 3])
def test_scores_are_what_neurons_would_give(coarse: int, gated: bool, bias: bool, activation: int) -> None:
    weights, x = network(gated=gated, bias=bias, activation=activation), tokens()
    router = sketch(weights, coarse=coarse)
    first = first_look(weights, x, coarse, router.up_mean) + 0.7
    scores = router(x)
    assert scores.shape == (40, 2 * NEURONS) and scores.dtype == torch.float32
    expected = torch.cat([torch.minimum(first, second_look(weights, x, 3)), first], dim=-1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(router.parts(scores), dim=-1), scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision(tiny_checkpoint: Maker, dtype: torch.dtype) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids()
    with torch.no_grad():
        expected, full = (model(ids, dial=dial).logits for dial in (0.25, 1.0))
        found = model.to(dtype)(ids, dial=0.25).logits
    assert found.dtype == dtype
    difference = float((found.float() - expected).norm() / expected.norm())
    assert difference < (1e-5 if dtype == torch.float64 else 0.1) < float((full - expected).norm() / expected.norm())


@settings(max_examples=30)
@given(
    threshold=st.floats(-8, 2),
    reach=st.sampled_from([0.0, 0.3, 2.0, 50.0]),
    coarse=st.integers(1, 3),
    gated=st.booleans(),
    activation=st.sampled_from([0, 2]),
    seed=st.integers(0, 50),
)
def test_two_looks_leave_out_what_either_leaves_out(
    threshold: float, reach: float, coarse: int, gated: bool, activation: int, seed: int
) -> None:
    weights, x = network(seed, gated=gated, activation=activation), tokens(seed=seed)
    router = sketch(weights, bits=3, coarse=coarse, reach=reach)
    choice = router.choose(router(x), threshold)
    assert isinstance(choice, Subset)
    first, second = first_look(weights, x, coarse, router.up_mean) + reach, second_look(weights, x, 3)
    sure = ((first - threshold).abs() > 1e-4) & ((second - threshold).abs() > 1e-4)  # not a matter of rounding
    closer = first > threshold
    assert choice.closer is not None
    assert torch.equal(choice.closer[sure], closer[sure])
    assert torch.equal(choice.on[sure], (closer & (second > threshold))[sure])
    assert not bool((choice.on & ~choice.closer).any()), "a neuron is used only after the second look"


def test_one_threshold_a_token_and_both_ends() -> None:
    weights, x = network(activation=2), tokens()
    weights.down[:, 3] = 0  # gives exactly nothing
    router = sketch(weights)
    scores = router(x)
    assert bool(scores.isfinite().all()) and float(scores.min()) < math.log(SMALLEST) + 1
    lowest, highest = router.threshold_range()
    for threshold, everything in ((-math.inf, True), (lowest, True), (highest, False), (math.inf, False)):
        choice = router.choose(scores, threshold)
        assert bool((choice.mask(NEURONS) == everything).all())
        assert bool((choice.closer == everything).all())  # type: ignore[union-attr]
    each = torch.linspace(-4, 1, len(x))
    found = router.choose(scores, each)
    for row, threshold in enumerate(each.tolist()):
        assert torch.equal(found.mask(NEURONS)[row], router.choose(scores[row], threshold).mask(NEURONS))


@pytest.mark.parametrize("gated", [False, True])
def test_neurons_that_a_relu_puts_at_0_are_told_apart(gated: bool) -> None:
    """Those that rounding may have put there come first, and they come after those that give something."""
    weights, x = network(gated=gated, activation=2), tokens()
    compared, looked = sketch(weights, reach=50.0).parts(sketch(weights, reach=50.0)(x))
    matrix = weights.up if weights.gate is None else weights.gate
    assert matrix is not None
    active = x @ matrix.T > 0
    below = x @ read(matrix, 3).T < 0
    assert bool((active & below).any()), "rounding moved something across"
    for scores in (compared, looked):
        assert float(scores.min()) > math.log(SMALLEST) / 2
    assert float(compared[active & below].mean()) > float(compared[below & ~active].mean()) + 0.3


@given(st.floats(-1e4, 1e4), st.floats(0, 1e3))
def test_blurred_is_relu_give_or_take_a_width(value: float, width: float) -> None:
    found = float(blurred(torch.tensor([value]), torch.tensor([width])))
    value, width = (float(torch.tensor(one)) for one in (value, width))
    assert max(value, 0.0) <= found <= max(value, 0.0) + width / 2 + 1e-6 * abs(value)
    exact = width**2 / (abs(value) + math.hypot(value, width)) / 2 if width else 0.0
    assert found - max(value, 0.0) == pytest.approx(exact, rel=1e-5, abs=1e-6 * max(value, 1e-20))


def test_the_offset_moves_every_score_alike() -> None:
    weights, x = network(), tokens()
    router, moved = sketch(weights), sketch(weights)
    moved.offset.fill_(1.5)
    torch.testing.assert_close(moved(x), router(x) - 1.5, rtol=0, atol=1e-6)
    assert torch.equal(moved.choose(moved(x), -2.0).mask(NEURONS), router.choose(router(x) - 1.5, -2.0).mask(NEURONS))


def test_the_top_neurons_are_the_highest_scored() -> None:
    router, x = sketch(network()), tokens()
    compared, _ = router.parts(router(x))
    for width in (0, 1, 20, NEURONS):
        top = router.top(x, width)
        assert bool((top.width() == width).all())
        for row, on in zip(compared, top.mask(NEURONS), strict=True):
            assert width in (0, NEURONS) or float(row[on].min()) >= float(row[~on].max())
        assert isinstance(top, Subset) and top.closer is not None and bool(top.closer.all())


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_scores_follow_weights_that_change_in_place(part: str) -> None:
    weights, x = network(), tokens()
    router = sketch(weights)
    few = router.copy
    before, (_, kept) = router(x), few.second(weights.up.dtype)
    few.follow(weights)
    assert few.second(weights.up.dtype)[1] is kept, "the same weights need no new copy"
    with torch.no_grad():
        getattr(weights, part).mul_(-1.7).add_(0.01)
    few.follow(weights)
    assert not torch.equal(router(x), before)
    assert torch.equal(router(x), sketch(weights)(x))
    with torch.no_grad():
        low = few.low(weights)
    torch.testing.assert_close(low.down.T, Codes.of(weights.down.T, 4, 5).values())


def test_a_step_of_an_optimizer_moves_scores_and_low_bit_values(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(ids, labels=ids, dial=0.25).loss.backward()
    optimizer.step()
    with torch.no_grad():
        found = model(ids, dial=0.25).logits
        fresh = pickle.loads(pickle.dumps(model))  # makes its copies anew
        torch.testing.assert_close(found, fresh(ids, dial=0.25).logits, rtol=1e-5, atol=1e-5)


def test_other_weights_in_the_same_place_are_noticed(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids()
    other = neurons_model(tiny_checkpoint(seed=3))
    with torch.no_grad():
        model(ids, dial=0.25)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(ids, dial=0.25).logits, other(ids, dial=0.25).logits, rtol=1e-5, atol=1e-5)
        half = model.to(torch.bfloat16)
        expected = copy.deepcopy(half)(ids, dial=0.25).logits
        assert torch.equal(half(ids, dial=0.25).logits, expected)


def test_the_few_bit_copy_is_not_saved(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids()
    names = {"means", "router.offset", "router.up_mean"}
    assert set(model.router_state()) == {f"layers.{layer}.{name}" for layer in range(2) for name in names}
    with torch.no_grad():
        expected = {dial: model(ids, dial=dial).logits for dial in (0.25, 0.6, 1.0)}
        state = pickle.dumps(model.ffns()[0].copy), pickle.dumps(model.ffns()[0].router)
        assert all(len(part) < 5000 for part in state), "copies are made, not kept"
        model.save_pretrained(tmp_path / "saved")
        again = dynaconv.load(tmp_path / "saved").eval()
        assert again.layout == model.layout
        for dial, logits in expected.items():
            torch.testing.assert_close(again(ids, dial=dial).logits, logits, rtol=1e-5, atol=1e-5)
            assert not torch.equal(logits, expected[1.0]) or dial == 1.0
    names = set(again.dense_state())
    assert not any("offset" in name or "mean" in name for name in names)


def test_a_dial_for_each_sequence_is_the_dial_of_each(tiny_checkpoint: Maker) -> None:
    for family in ("llama", "opt"):
        model, ids = neurons_model(tiny_checkpoint(family)), token_ids(4)
        dials, recorder = [0.25, 0.4, 1.0, 0.6], Recorder()
        with torch.no_grad():
            with model.call.using(recorder=recorder):
                together = model(ids, dial=dials).logits
            alone = [model(ids[row : row + 1], dial=dial).logits[0] for row, dial in enumerate(dials)]
        for row in range(4):
            torch.testing.assert_close(together[row], alone[row], rtol=1e-4, atol=1e-4)
        spent = recorder.all_costs()[2].mean(0).view(4, -1).mean(1).tolist()
        assert spent[0] < spent[1] < spent[3] < spent[2]


@pytest.mark.parametrize(
    ("family", "means", "values"),
    [("llama", (), False), ("llama", (0.25, 0.5), True), ("gpt2", (), True), ("opt", (0.25, 0.5), True)],
)
def test_compiled_models_say_the_same(
    tiny_checkpoint: Maker, family: str, means: tuple[float, ...], values: bool
) -> None:
    torch._dynamo.reset()
    model, ids = neurons_model(tiny_checkpoint(family), copy=CopyLayout(4, 32, values), means=means), token_ids()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for dial in (0.25, 0.4, 1.0):
            model.dial = dial
            found = compiled(ids).logits  # before anything has made the few-bit copy
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_generation_at_a_low_dial(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dial = Dial(0.25, prompt=Dial(0.25), controlled=False)
    found = model.generate(ids, dial=dial, **settings)
    assert torch.equal(found, model.generate(ids, dial=dial, use_cache=False, **settings))
    assert model.generate(ids, dial=0.25, **settings).shape == found.shape == (2, 12)
