"""Subclones: the identity at ratio 1, whole for stock transformers at every shape, and what matters stays.

Planted models compute nothing with half of their neurons, heads, channels or a layer: a subclone without them computes
the same if importance finds them, and if the rest lands where it belongs.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given, settings
from subclones import difference, edited, logits, measured_importance, positions, random_importance, subcloned
from tiny_families import FAMILIES
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.registry import known_families
from dynaconv.arch.spec import Slot
from dynaconv.config import SubcloneConfig
from dynaconv.convert.target import FIELDS, Shape, derives_head_dim


@st.composite
def cases(draw: st.DrawFn, family: str) -> tuple[dict[str, Any], dict[str, int], int]:
    """Sizes of a tiny source, sizes of something smaller, and a seed."""
    known = known_families()[family]
    derived, grouped = known.sizes["q_dim"].field is None, "kv_head" in known.sizes
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from((8, 12, 16)))
    heads = kv_heads * group
    source: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "hidden": heads * (head_dim if derived else draw(st.sampled_from((6, 8, 12)))),
        "ffn": draw(st.integers(16, 48)),
        "layers": draw(st.integers(1, 4)),
        "tied": draw(st.booleans()),
    }
    wanted: dict[str, int] = {"ffn": draw(st.integers(1, source["ffn"]))}
    if source["layers"] > 2:
        wanted["layers"] = draw(st.integers(2, source["layers"]))
    wanted["head_dim"] = draw(st.sampled_from([size for size in (4, 8, 12, 16) if size <= head_dim]))
    if grouped:
        wanted["kv_heads"] = draw(st.integers(1, kv_heads))
        wanted["heads"] = wanted["kv_heads"] * draw(st.integers(1, group))
    else:
        wanted["heads"] = draw(st.integers(1, heads))
    hidden = source["hidden"]
    width = wanted["head_dim"] if derived else draw(st.integers(1, hidden // heads))
    wanted["residual"] = wanted["heads"] * width  # transformers wants a multiple of the heads for some families
    if family == "gpt_neox":  # a quarter of the channels turns, and in pairs
        source |= {"head_dim": 16, "hidden": 16 * heads}
        wanted |= {"head_dim": draw(st.sampled_from((8, 16)))}
        wanted["residual"] = wanted["heads"] * wanted["head_dim"]
    return source, wanted, draw(st.integers(0, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_1_is_the_identity_and_every_smaller_shape_is_whole(family: str) -> None:
    @settings(max_examples=3)
    @given(case=cases(family))
    def check(case: tuple[dict[str, Any], dict[str, int], int]) -> None:
        source, wanted, seed = case
        with TemporaryDirectory() as made:
            checkpoint = Checkpoint.open(make_checkpoint(Path(made, "parent"), family, **source))
            importance = random_importance(checkpoint, seed)
            same = subcloned(checkpoint, importance, SubcloneConfig(ratio=1.0), Path(made, "same"))
            assert difference(logits(Path(made, "same")), logits(checkpoint.folder)) <= 1e-5
            assert same.summary["source"] == same.summary["target"]
            assert not same.warnings
            moved = Checkpoint.open(Path(made, "same"))
            name = next(n for n, slot in checkpoint.slots.items() if slot.spec.part == "embedding")
            assert not torch.equal(moved.reader.read(name), checkpoint.reader.read(name))  # it was a permutation

            smaller = subcloned(checkpoint, importance, SubcloneConfig(**wanted), Path(made, "smaller"))
            result = Shape.of(Checkpoint.open(Path(made, "smaller")))
            assert {field: getattr(result, field) for field in wanted} == wanted
            assert smaller.summary["target"] == {field: getattr(result, field) for field in FIELDS}
            assert bool(logits(Path(made, "smaller")).isfinite().all())

    check()


def some(count: int, of: int, seed: int) -> Tensor:
    """``count`` of ``of`` positions, in random order."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count]


def without_heads(checkpoint: Checkpoint) -> bool:
    """Whether heads can go alone: not where they make up the residual stream, or are normalised together."""
    norms = [spec for spec in checkpoint.family.tensors if spec.part == "norm"]
    return not derives_head_dim(checkpoint) and not any("q_head" in axis for spec in norms for axis in spec.axes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole_groups", [True, False])
def test_neurons_heads_and_a_layer_that_do_nothing_go(family: str, whole_groups: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "parent", family, heads=8, kv_heads=4, layers=4, ffn=40)
    checkpoint = Checkpoint.open(folder)
    heads_go, grouped = without_heads(checkpoint), "kv_head" in checkpoint.sizes

    def kill(slot: Slot, tensor: Tensor) -> None:
        spec, layer = slot.spec, slot.layer
        if layer is None:
            return
        dead = {"ffn": some(20, 40, layer)}
        if heads_go:
            groups = some(2, 4, 10 + layer)
            within = 2 * torch.arange(4) + torch.randint(2, (4,), generator=torch.Generator().manual_seed(layer))
            dead["q_head"] = torch.cat([2 * groups, 2 * groups + 1]) if whole_groups else within
        if spec.contracts is not None:
            for axis in dead.keys() & spec.dimensions[spec.contracts].axes:
                tensor.index_fill_(spec.contracts, positions(slot, spec.contracts, checkpoint, {axis: dead[axis]}), 0)
        if layer == 2 and spec.closes:
            tensor.fill_(-spec.offset)

    checkpoint = edited(folder, kill)
    wanted = SubcloneConfig(ffn=20, layers=3, rescale=False)
    if heads_go:
        wanted.heads, wanted.kv_heads = 4, (2 if whole_groups else 4) if grouped else None
    importance = measured_importance(checkpoint, tmp_path / "importance")
    resize = subcloned(checkpoint, importance, wanted, tmp_path / "smaller")
    assert resize.layers == (0, 1, 3)
    assert resize.summary["removed_layers"] == [2]
    assert resize.summary["kept_importance"]["ffn"] == pytest.approx(1)
    assert difference(logits(tmp_path / "smaller"), logits(folder)) <= 1e-5
    wanted.order = "none"
    subcloned(checkpoint, importance, wanted, tmp_path / "unordered")
    assert difference(logits(tmp_path / "unordered"), logits(folder)) > 1e-2


def plain_rms_norms(family: str) -> bool:
    """Whether all norms are RMSNorms that only what the layers read passes through."""
    norms = [spec for spec in known_families()[family].tensors if spec.part == "norm"]
    return all(spec.name.endswith("weight") and not spec.closes for spec in norms)


@pytest.mark.parametrize("family", [family for family in FAMILIES if plain_rms_norms(family)])
@pytest.mark.parametrize("tied", [True, False])
def test_residual_channels_that_are_always_0_go_and_the_rest_is_rescaled(family: str, tied: bool, tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "parent", family, tied=tied, rms_norm_eps=1e-12)
    dead = some(32, 64, 3)

    def kill(slot: Slot, tensor: Tensor) -> None:
        for number, dimension in enumerate(slot.spec.dimensions):
            writes = number != slot.spec.contracts and slot.spec.part != "norm"
            if writes and dimension.axes == {"residual"}:
                tensor.index_fill_(number, dead, 0)

    checkpoint = edited(folder, kill)
    importance = measured_importance(checkpoint, tmp_path / "importance")
    for rescale in (True, False):
        subcloned(checkpoint, importance, SubcloneConfig(residual=32, rescale=rescale), tmp_path / f"{rescale}")
        found = difference(logits(tmp_path / f"{rescale}"), logits(folder))
        assert found <= 1e-5 if rescale else found > 1e-2


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_rotary_pairs_that_say_nothing_go_where_the_frequencies_stay(family: str, tmp_path: Path) -> None:
    """The scale of these families' scores is fixed, so it does not change with the length of a head."""
    folder = make_checkpoint(tmp_path / "parent", family, head_dim=16, layers=2)
    checkpoint = Checkpoint.open(folder)
    odd = torch.tensor([1, 3, 5, 7, 9, 11, 13, 15])  # every other pair: a head of half the length has the even ones

    def kill(slot: Slot, tensor: Tensor) -> None:
        spec = slot.spec
        if spec.part != "attention" or spec.contracts is None:
            return
        made = spec.dimensions[1 - spec.contracts]
        if made.axes == {"q_head", "q_dim"}:
            tensor[positions(slot, 0, checkpoint, {"q_dim": odd})] = 0
        if "v_dim" in spec.dimensions[spec.contracts].axes:
            dead = {"v_dim": some(8, 16, 5 + (slot.layer or 0))}
            tensor[:, positions(slot, 1, checkpoint, dead)] = 0

    checkpoint = edited(folder, kill)
    importance = measured_importance(checkpoint, tmp_path / "importance")
    wanted = SubcloneConfig(head_dim=8, rescale=False)
    subcloned(checkpoint, importance, wanted, tmp_path / "smaller")
    assert difference(logits(tmp_path / "smaller"), logits(folder)) <= 1e-5


def test_a_layer_keeps_the_scale_of_its_own_number(tmp_path: Path) -> None:
    """GPT-2 may divide scores by the layer's number, and removing a layer changes those of all behind it."""
    folder = make_checkpoint(tmp_path / "parent", "gpt2", layers=4, scale_attn_by_inverse_layer_idx=True)

    def close(slot: Slot, tensor: Tensor) -> None:
        if slot.layer == 1 and slot.spec.closes:
            tensor.zero_()

    checkpoint = edited(folder, close)
    subcloned(checkpoint, measured_importance(checkpoint, tmp_path / "i"), SubcloneConfig(layers=3), tmp_path / "out")
    assert difference(logits(tmp_path / "out"), logits(folder)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_a_refit_lets_the_neurons_that_stay_do_what_their_copies_did(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "parent", family, ffn=40)
    checkpoint = Checkpoint.open(folder)
    half = torch.arange(20)

    def copy(slot: Slot, tensor: Tensor) -> None:
        for number, dimension in enumerate(slot.spec.dimensions):
            if "ffn" in dimension.axes and number != slot.spec.contracts:
                first = positions(slot, number, checkpoint, {"ffn": half})
                second = positions(slot, number, checkpoint, {"ffn": half + 20})
                tensor.index_copy_(number, second, tensor.index_select(number, first))

    checkpoint = edited(folder, copy)
    importance = measured_importance(checkpoint, tmp_path / "importance", second_moments=True)
    wanted = SubcloneConfig(ffn=20, order="none", refit=True, refit_ridge=1e-7)
    subcloned(checkpoint, importance, wanted, tmp_path / "fitted")
    assert difference(logits(tmp_path / "fitted"), logits(folder)) <= 1e-3
    wanted.refit = False
    subcloned(checkpoint, importance, wanted, tmp_path / "plain")
    assert difference(logits(tmp_path / "plain"), logits(folder)) > 1e-2
    same = SubcloneConfig(ratio=1.0, refit=True)  # nothing goes, so nothing is fitted
    subcloned(checkpoint, importance, same, tmp_path / "same")
    assert difference(logits(tmp_path / "same"), logits(folder)) <= 1e-5
