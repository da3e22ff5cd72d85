"""Routers: at every grain, every kind's choice grows as its threshold falls, reaches both ends, and meets a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from dynamic_models import ROUTERS, THRESHOLDS, dynamic_model, token_ids
from ffn_networks import random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import dynaconv
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout, DialTable, RouterLayout
from dynaconv.dynamic.modeling import attach
from dynaconv.dynamic.recorder import Recorder
from dynaconv.dynamic.routers.base import Router, as_threshold
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.dynamic.thresholds import solve_threshold
from dynaconv.kernels.choice import Choice, Subset
from dynaconv.kernels.partition import Partition

UNEVEN = Partition.at((0, 3, 7, 8, 16, 20))
PARTITIONS = {
    "uneven": UNEVEN,
    "the last smaller": Partition.equal(50, 16),
    "neurons": Partition.equal(20, 1),
    "one block": Partition.equal(20, 20),
    "hundreds": Partition.equal(1500, 3),
}
Maker = Callable[..., Path]
every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
with_parameters = pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].objective != "weights"])
every_partition = pytest.mark.parametrize("cut", PARTITIONS)


def router(kind: str, seed: int = 0, partition: Partition = UNEVEN) -> Router:
    """One with random opinions."""
    if kind == "sketch":
        return sketch(seed, partition.blocks)
    made = KINDS[kind](6, partition, ROUTERS[kind])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def sketch(seed: int, neurons: int) -> SketchRouter:
    """One of an FFN of its own."""
    made = SketchRouter(6, Partition.equal(neurons, 1), ROUTERS["sketch"])
    copy, weights = FewBitCopy(CopyLayout(4, 3), 3, 2), random_network(6, neurons, dtype=torch.float32, seed=seed)
    copy.follow(weights)
    made.follow(copy, weights)
    return made


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def between(made: Router, part: float) -> float:
    lowest, highest = made.threshold_range()
    return lowest + part * (highest - lowest)


def mask(made: Router, scores: Tensor, threshold: Tensor | float) -> Tensor:
    return made.choose(scores, threshold).mask(made.blocks)


@pytest.mark.parametrize("kind", KINDS)
@every_partition
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_lower_threshold_never_removes_a_block(cut: str, kind: str, seed: int, parts: tuple[float, float]) -> None:
    made = router(kind, seed, PARTITIONS[cut])
    scores = made(tokens(50)).detach()
    low, high = (between(made, part) for part in sorted(parts))
    assert not bool((mask(made, scores, high) & ~mask(made, scores, low)).any())


@pytest.mark.parametrize("kind", KINDS)
@every_partition
def test_both_ends_of_the_range_are_reached(cut: str, kind: str) -> None:
    partition = PARTITIONS[cut]
    for seed in range(5):
        made = router(kind, seed, partition)
        scores = made(tokens(400, seed)).detach()
        everything, nothing = made.threshold_range()
        assert everything < nothing
        assert bool(mask(made, scores, -math.inf).all())
        assert bool(mask(made, scores, everything).all())
        assert int(made.choose(scores, nothing).width().max()) <= 1  # a class router's smallest class is one block


@every_kind
def test_a_threshold_per_sequence_is_the_threshold_of_each(kind: str) -> None:
    made = router(kind, 3)
    scores = made(tokens(18).view(2, 9, 6)).detach()
    thresholds = torch.tensor([between(made, 0.4), between(made, 0.7)])
    both = mask(made, scores, thresholds[:, None])
    for row in range(2):
        assert torch.equal(both[row], mask(made, scores[row], float(thresholds[row])))


@every_kind
@every_partition
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_the_solved_threshold_spends_the_budget(kind: str, budget: float, cut: str) -> None:
    """To one jump of the share: above the threshold that was found, less than the budget is spent."""
    routers = [router(kind, seed, PARTITIONS[cut]) for seed in range(3)]
    partition = routers[0].partition
    count = 400 if partition.blocks > 100 else 3000
    scores = [made(tokens(count, 7)).detach() for made in routers]

    def spent(threshold: float) -> float:
        return sum(float(mask_share(made, one, threshold)) for made, one in zip(routers, scores, strict=True)) / 3

    threshold = solve_threshold(routers[0], scores, budget)
    if kind == "class" and spent(KINDS[kind](6, partition, ROUTERS[kind]).threshold_range()[1]) > budget:
        return  # one block is the least that this kind gives
    assert spent(threshold) >= budget - 1e-9
    assert spent(threshold) == pytest.approx(budget, abs=0.01)


def mask_share(made: Router, scores: Tensor, threshold: float) -> Tensor:
    """Mean share of the neurons, counted one by one."""
    return made.partition.spread(mask(made, scores, threshold)).double().mean()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].objective == "dial"])
@every_partition
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.1, 0.95))
def test_a_threshold_lies_in_the_middle_between_two_scores(cut: str, kind: str, seed: int, budget: float) -> None:
    """So that no block hangs on how a score was rounded."""
    made = router(kind, seed, PARTITIONS[cut])
    scores = made(tokens(40)).detach()
    threshold = solve_threshold(made, [scores], budget)
    margins = made.margins(scores, threshold).flatten()  # a block goes on or off where its margin is 0
    assert torch.equal(margins.view(40, -1) > 0, mask(made, scores, threshold))
    if not bool((margins <= 0).any()):
        return
    last_on, first_off = float(margins[margins > 0].min()), float(-margins[margins <= 0].max())
    assert last_on == pytest.approx(first_off, abs=2e-6 + 4 * torch.finfo(torch.float32).eps * abs(threshold))


def test_blocks_count_by_their_size() -> None:
    made = KINDS["linear"](6, Partition.at((0, 90, 100)), ROUTERS["linear"])
    scores = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert made.choose(scores, 0.0).active_share(made.partition).tolist() == pytest.approx([0.9, 0.1])
    assert -1 < solve_threshold(made, [scores], 0.5) < 1  # (90 + 10) / 200 of the neurons
    assert solve_threshold(made, [scores], 0.51) < -1


@with_parameters
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_precision(kind: str, dtype: torch.dtype) -> None:
    exact, made = router(kind), router(kind).to(dtype)
    x = tokens(50)
    for given_x in (x, x.to(dtype)):
        scores, expected = made(given_x).detach(), exact(x).detach()
        assert scores.dtype == torch.float32
        assert scores.shape == expected.shape
        assert float((scores - expected).abs().max()) < 0.2
        mask(made, scores, between(made, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(x), router(kind)(x)), "autocast is not for routers: their scores meet thresholds"


@with_parameters
def test_a_router_starts_silent_and_says_what_it_costs(kind: str) -> None:
    made = KINDS[kind](6, UNEVEN, ROUTERS[kind])
    scores = made(tokens(10)).detach()
    assert bool((scores == 0).all())
    assert scores.dim() == 1 + made.features
    elements = sum(parameter.numel() for parameter in made.parameters())
    assert (made.flops_per_token, made.bytes_per_token) == (2 * elements, 4 * elements)
    assert made.half().bytes_per_token == 2 * elements


@pytest.mark.parametrize("kind", ["width", "linear"])
def test_scores_are_bounded(kind: str) -> None:
    loud = router(kind)
    with torch.no_grad():
        loud.output.weight.mul_(1e4)  # type: ignore[union-attr]
    assert float(loud(tokens(100)).detach().abs().max()) <= 3.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(0, 4))
def test_the_top_blocks_of_routed_experts_are_the_highest_scored(seed: int, width: int) -> None:
    made, x = router("linear", seed), tokens(50)
    fewer, more = (made.top(x, n).mask(5) for n in (width, width + 1))
    assert bool((fewer.sum(-1) == width).all())
    assert not bool((fewer & ~more).any())
    for row, on in zip(made(x), fewer, strict=True):
        assert width == 0 or float(row[on].min()) >= float(row[~on].max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].experts == "nested"])
def test_the_top_blocks_of_nested_experts_are_the_first(kind: str) -> None:
    assert (
        router(kind).top(tokens(6).view(2, 3, 6), 2).mask(5).tolist() == [[[True, True, False, False, False]] * 3] * 2
    )


def test_curve_width_is_the_cheapest_trade() -> None:
    made = KINDS["curve"](6, UNEVEN, ROUTERS["curve"])
    scores = torch.randn(40, 5)
    threshold, share = -0.7, UNEVEN.prefix_shares()
    errors = torch.cat([scores.exp(), torch.zeros(40, 1)], dim=1)
    expected = [min(range(6), key=lambda n: float(row[n] + math.exp(threshold) * share[n])) for row in errors]
    assert made.choose(scores, threshold).width().tolist() == expected


def test_class_width_is_the_smallest_that_is_likely_enough() -> None:
    made, scores = KINDS["class"](6, UNEVEN, ROUTERS["class"]), torch.randn(40, 5)
    enough = scores.softmax(-1).cumsum(-1)
    expected = [next(n + 1 for n in range(5) if n == 4 or float(row[n]) >= 0.7) for row in enough]
    assert made.choose(scores, 0.3).width().tolist() == expected


class LastBlocksRouter(Router):
    """A kind that nobody has: one score, and the last blocks instead of the first."""

    kind: ClassVar[str] = "last"
    experts = "routed"
    objective = "dial"
    features = 0

    def outputs(self) -> int:
        return 1

    def bounded(self, raw: Tensor) -> Tensor:
        return self.soft_cap(raw.squeeze(-1))

    def margins(self, scores: Tensor, threshold: Tensor | float) -> Tensor:
        wanted = (scores - as_threshold(threshold, scores))[..., None]
        return wanted - (torch.arange(self.blocks - 1, -1, -1) + 0.5)

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        return Subset(self.margins(scores, threshold) > 0)

    def threshold_range(self) -> tuple[float, float]:
        return -self.blocks - self.bound - 0.5, self.bound + 0.5


def test_a_new_kind_is_one_class_and_one_line(
    tiny_checkpoint: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING shows how; ``KINDS`` is where the line goes. Nothing else knows of it."""
    monkeypatch.setitem(KINDS, "last", LastBlocksRouter)
    monkeypatch.setitem(ROUTERS, "last", RouterLayout("last", linear=True, rank=4, bound=3.0))
    monkeypatch.setitem(THRESHOLDS, "last", (0.0, 0.0, 0.0))
    folder = tiny_checkpoint(layers=1)
    model, ids = dynamic_model(folder, "last"), token_ids(4, 30)
    recorder = Recorder()
    with torch.no_grad(), model.call.using(recorder=recorder):
        model(ids, dial=0.5)
    router_of_site, scores = model.ffns()[0].router, [one[0] for one in recorder.scores.values()]
    budgets = (0.25, 0.5, 1.0)
    rows = tuple((solve_threshold(router_of_site, scores, budget),) for budget in budgets)
    solved = model.layout.with_dial(DialTable(budgets, rows), None)
    calibrated = attach(AutoModelForCausalLM.from_pretrained(folder), solved, model.router_state()).eval()
    share = Recorder()
    with torch.no_grad(), calibrated.call.using(recorder=share):
        logits = calibrated(ids, dial=0.5).logits
    assert float(share.all_shares().mean()) == pytest.approx(0.5, abs=0.01)
    calibrated.save_pretrained(tmp_path / "saved")
    again = dynaconv.load(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, dial=0.5).logits, logits)
        assert not torch.equal(again(ids, dial=1.0).logits, logits)
