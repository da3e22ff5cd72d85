"""The benchmark's baselines: what they cost equals numbers found by hand, and nothing left out is the parent itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_checkpoint

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.stock import load_dense
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError, ConfigError
from dynaconv.evaluation.scoring import most_likely, score

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
HIDDEN, NEURONS = 64, 96
MODULES = ("quality_ffn", "quality_quantised", "quality_peers")


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import quality_ffn
    import quality_peers
    import quality_quantised

    yield SimpleNamespace(**{**vars(quality_quantised), **vars(quality_peers), **vars(quality_ffn)})
    for name in MODULES:
        sys.modules.pop(name, None)


class Scene:
    """A tiny parent that is sure of what it says, and windows that it has written itself."""

    def __init__(self, lib: Any, folder: Path, **sizes: Any) -> None:
        checkpoint = make_checkpoint(folder, hidden=HIDDEN, **{"ffn": NEURONS, **sizes})
        self.model = load_dense(checkpoint, torch.device("cpu"))
        with torch.no_grad():
            self.model.lm_head.weight.mul_(5)
        self.parent = lib.Parent(self.model, Checkpoint.open(checkpoint))
        self.batches = [Batch(self._written(seed)) for seed in range(2)]
        self.wanted = most_likely(self.model, self.batches)
        self.inputs = self.parent.inputs(self.batches)
        self.loss = score(self.model, self.batches).loss

    @torch.no_grad()
    def _written(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(257, (16, 1), generator=generator)
        for _ in range(31):
            chances = self.model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        return ids

    def score(self, method: Any) -> Any:
        return self.parent.score(method, self.inputs, self.batches, self.wanted)

    def logits(self, method: Any) -> torch.Tensor:
        ids = self.batches[0].input_ids
        networks = [method.fit(ffn, own) for ffn, own in zip(self.parent.ffns, self.inputs, strict=True)]
        with torch.no_grad(), self.parent._replaced(networks):
            return self.model(input_ids=ids).logits

    def dense(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=self.batches[0].input_ids).logits


@pytest.fixture
def scene(lib: Any, tmp_path: Path) -> Scene:
    return Scene(lib, tmp_path / "model")


def test_with_nothing_left_out_a_baseline_is_the_parent(lib: Any, scene: Scene) -> None:
    for method in (lib.TEAL(0.0), lib.CATS(1.0), lib.CoarseExperts(16), lib.Oracle(1.0)):
        assert torch.equal(scene.logits(method), scene.dense()), method.name
        got = scene.score(method)
        assert (got.loss, got.agreement) == (scene.loss, 1.0), method.name
        assert (got.bytes_share, got.flops_share, got.active_share) == (1.0, 1.0, 1.0), method.name
    assert not torch.equal(scene.logits(lib.TEAL(0.5)), scene.dense())
    assert torch.equal(scene.logits(lib.TEAL(0.0)), scene.dense()), "the parent is left as it was"


def test_fewer_bits_cost_more_loss(lib: Any, scene: Scene) -> None:
    for kind in (lib.Symmetric, lib.Asymmetric):
        losses = [scene.score(kind(bits)).loss for bits in (8, 4, 3, 2)]
        assert losses == sorted(losses), kind.name
        assert losses[0] - scene.loss < 0.005 < losses[2] - scene.loss, kind.name
    assert scene.score(lib.Asymmetric(2)).loss < scene.score(lib.Symmetric(2)).loss


def test_less_of_the_ffn_costs_more_loss_and_what_is_kept_is_counted(lib: Any, scene: Scene) -> None:
    for kind, settings in ((lib.TEAL, (0.25, 0.5, 0.75)), (lib.CATS, (0.75, 0.5, 0.1)), (lib.Oracle, (0.5, 0.25, 0.1))):
        got = [scene.score(kind(setting)) for setting in settings]
        assert got[0].loss < got[1].loss < got[2].loss, kind
        assert got[0].bytes_share > got[1].bytes_share > got[2].bytes_share, kind
        for row, setting in zip(got, settings, strict=True):
            near = pytest.approx(
                kind(setting).share, abs=0.05
            )  # thresholds are the dense model's: shares drift a little
            assert (row.bytes_share, row.flops_share) == (near, near), kind
            assert row.bytes_share == pytest.approx(row.flops_share), kind


@pytest.mark.parametrize(
    ("kind", "bits", "share"),
    [
        ("Symmetric", 8, (8 + 0.5) / 16),
        ("Symmetric", 4, 0.28125),
        ("Asymmetric", 4, 0.3125),
        ("Asymmetric", 3, 0.25),
        ("HQQ", 2, 0.1875),
    ],
)
def test_bytes_of_quantised_weights(lib: Any, kind: str, bits: int, share: float) -> None:
    method = getattr(lib, kind)(bits)
    assert method.share == share
    if kind != "HQQ":  # its library may be missing
        ffn = lib.FFN(torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96), torch.nn.functional.silu)
        assert method.fit(ffn, torch.empty(0, 64))(torch.randn(2, 64))[1] == (share, 1.0, 1.0)


def test_weights_that_are_left_out_can_have_few_bits_too(lib: Any, scene: Scene) -> None:
    codes = lib.Asymmetric(4)
    on = torch.zeros(2, 96, dtype=torch.bool)
    on[0, :5] = True  # one group of three, and for the other token none
    assert codes.columns_read(on) == pytest.approx((4 * 5 + 32) / (2 * 96 * 16))
    for method in (lib.TEAL(0.0, codes), lib.CATS(1.0, codes), lib.Oracle(1.0, codes)):
        assert torch.equal(scene.logits(method), scene.logits(codes)), method.name
        assert scene.score(method).bytes_share == pytest.approx(0.3125), method.name
        assert method.name.endswith(" on RTN asymmetric, 4 bits")
    for kind, setting in ((lib.TEAL, 0.5), (lib.CATS, 0.5), (lib.Oracle, 0.25)):
        few, exact = scene.score(kind(setting, codes)), scene.score(kind(setting))
        assert few.flops_share == pytest.approx(exact.flops_share, abs=0.02), kind
        assert 0.25 * exact.bytes_share < few.bytes_share < 0.3125 * exact.bytes_share + 0.0625, kind


def test_a_group_that_is_not_full_has_a_scale_of_its_own(lib: Any) -> None:
    method, weight = lib.Asymmetric(4), torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    rounded = method.rounded(weight)
    assert torch.equal(rounded[:, :32], method.rounded(weight[:, :32]))
    assert torch.equal(rounded[:, 32:], method.rounded(weight[:, 32:]))
    ffn = lib.FFN(torch.randn(64, 40), torch.randn(64, 40), torch.randn(40, 64), torch.nn.functional.silu)
    read = method.fit(ffn, torch.empty(0, 40))(torch.randn(2, 40))[1].bytes
    pairs = 2 * 64 * 2 + 40 * 2  # groups of gate and up, and of down
    assert read == pytest.approx((4 * 3 * 40 * 64 + 32 * pairs) / (16 * 3 * 40 * 64))


def test_rounding_to_nearest(lib: Any) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4, 8):
        groups = weight.reshape(-1, 32)
        step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
        error = (lib.Asymmetric(bits).rounded(weight) - weight).reshape(-1, 32).abs().amax(1)
        assert (error <= 0.51 * step + 2e-3).all() and (error > 0.3 * step).all()
        assert len(lib.Symmetric(bits).rounded(weight)[0, :32].unique()) <= 2**bits - 1
    assert torch.equal(lib.Asymmetric(4).rounded(torch.full((2, 32), 0.25)), torch.full((2, 32), 0.25))
    assert torch.equal(lib.Symmetric(4).rounded(torch.zeros(2, 32)), torch.zeros(2, 32))


def test_gptq_makes_up_for_rounding_on_its_inputs(lib: Any, scene: Scene) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 40, generator=generator) @ torch.randn(40, 40, generator=generator)  # they correlate
    weight = torch.randn(24, 40, generator=generator)
    rounded = lib.GPTQ(3).compensated(weight, lib._error_factor(inputs))
    plain = lib.Asymmetric(3).rounded(weight)
    errors = [float((inputs @ (other - weight).t()).square().mean()) for other in (rounded, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert all(len(rounded[row, part].unique()) <= 8 for row in range(24) for part in (slice(0, 32), slice(32, 40)))
    white = torch.eye(40)  # nothing to make up with
    assert torch.equal(lib.GPTQ(3).compensated(weight, lib._error_factor(white)), plain)
    assert scene.score(lib.GPTQ(2)).loss < scene.score(lib.Asymmetric(2)).loss


def test_the_library_is_only_needed_where_it_is_used(lib: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(lib.HQQ, "missing", staticmethod(lambda: True))
    assert not any(method.name == "HQQ" for method in lib.peers(said.append))
    assert "pip install hqq" in said[0]
    with pytest.raises(ConfigError, match="hqq package"):
        scene.score(lib.HQQ(3))


def test_hqq_is_better_than_rounding_to_nearest(lib: Any, scene: Scene) -> None:
    pytest.importorskip("hqq")
    assert scene.score(lib.HQQ(2)).loss < scene.score(lib.Asymmetric(2)).loss


def test_coarse_experts(lib: Any, scene: Scene) -> None:
    method, ffn = lib.CoarseExperts(4), scene.parent.ffns[0]
    always, expert, routers = method._grouped(ffn, scene.inputs[0])
    assert int(always.sum()) == 2 * NEURONS // 16
    assert torch.bincount(expert[~always], minlength=14).tolist() == [NEURONS // 16] * 14
    assert not always[routers].any() and expert[routers].tolist() == list(range(14))
    got = scene.score(method)
    assert got.active_share == 0.25
    assert got.bytes_share == pytest.approx(0.25 + 14 * 2 * HIDDEN / (3 * HIDDEN * NEURONS))
    assert scene.loss < scene.score(lib.CoarseExperts(12)).loss < got.loss


def test_a_model_whose_ffns_the_baselines_do_not_know(lib: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gate, up and down"):
        Scene(lib, tmp_path / "gpt2", family="gpt2")
    with pytest.raises(CheckpointError, match="biases"):
        Scene(lib, tmp_path / "biased", mlp_bias=True)
    uneven = Scene(lib, tmp_path / "uneven", ffn=90)
    with pytest.raises(ConfigError, match="16 divides"):
        uneven.score(lib.CoarseExperts(4))
    assert uneven.score(lib.Asymmetric(4)).bytes_share > 0.3125, "the last group of down is not full"
