"""The shape that is chosen for a number of parameters: counted exactly, and none tried loses less importance."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny_families import FAMILIES, tiny_settings

from dynaconv.arch.registry import known_families
from dynaconv.convert.importance import Importance
from dynaconv.convert.shapes import TOLERANCE, WEIGHTS, Counter, Shares, find_shapes, granule
from dynaconv.convert.target import Shape
from dynaconv.errors import ConfigError

LARGE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def tiny_config(family: str, **sizes: int) -> dict:
    """Content of ``config.json`` of a tiny model."""
    from transformers import AutoConfig

    wanted = {"vocab": 257, "hidden": 64, "ffn": 96, "layers": 4, "heads": 4, "kv_heads": 2, "positions": 64}
    settings = tiny_settings(family, {**wanted, "tied": False, "scale": 0.1, **sizes})
    return dict(AutoConfig.for_model(family, **settings).to_dict())


def scores(config: dict, seed: int = 0, spread: float = 1.0) -> Importance:
    """Importance as it falls in real models: log-normal, and most of it at the ends."""
    made = torch.Generator().manual_seed(seed)
    source = Counter(known_families()[config["model_type"]], config).source

    def drawn(*shape: int) -> torch.Tensor:
        return (spread * torch.randn(*shape, generator=made)).exp()

    return Importance(
        residual=drawn(source.residual),
        neurons=drawn(source.layers, source.ffn),
        attention=drawn(source.layers, source.heads, 1).expand(-1, -1, source.head_dim),
        influence=0.05 + torch.linspace(-1, 1, source.layers).abs() ** 3,
    )


def slots_of(family: str, config: dict, shape: Shape) -> int:
    known = known_families()[family]
    sizes = shape.sizes(known.sizes_of(config))
    resized = known.resized(config, sizes, range(shape.layers))
    return sum(torch.Size(slot.shape).numel() for slot in known.slots(resized).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_have_the_parameters_that_were_asked_for(family: str) -> None:
    config = tiny_config(family)
    count = Counter(known_families()[family], config)
    most = count(count.source)
    assert most == slots_of(family, config, count.source)
    found = find_shapes(known_families()[family], config, scores(config), 0.6 * most)
    for each in found:
        assert each.parameters == count(each.shape) == slots_of(family, config, each.shape)
        assert abs(each.parameters / (0.6 * most) - 1) <= TOLERANCE
        assert each.reason
    assert [each.lost for each in found] == sorted(each.lost for each in found)


def test_no_shape_on_the_grid_loses_less() -> None:
    config = tiny_config("qwen2", layers=3, ffn=64)
    family, importance = known_families()["qwen2"], scores(config)
    count = Counter(family, config)
    params, shares = 0.7 * count(count.source), Shares(importance, count.source)
    best = find_shapes(family, config, importance, params)[0]

    def lost(shape: Shape) -> float:
        return -sum(WEIGHTS[axis] * math.log(max(share, 1e-6)) for axis, share in shares.kept(shape).items())

    grid = itertools.product((2, 3), range(8, 65, 8), range(8, 65, 8), (1, 2), (1, 2))
    shapes = [Shape(layers, d, ffn, k * g, k, count.source.head_dim) for layers, d, ffn, k, g in grid]
    near = [shape for shape in shapes if abs(count(shape) / params - 1) <= TOLERANCE]
    assert best.lost == pytest.approx(lost(best.shape), abs=1e-5)
    assert best.lost <= min(map(lost, near)) + 1e-6
    assert len(near) > 3


def test_kept_shares_are_those_of_the_most_important() -> None:
    config = tiny_config("qwen2")
    importance, source = scores(config), Counter(known_families()["qwen2"], config).source
    kept = Shares(importance, source).kept(replace(source, layers=3, residual=16, ffn=32, heads=1, kv_heads=1))
    assert kept["residual"] == pytest.approx(
        float(importance.residual.sort(descending=True).values[:16].sum() / importance.residual.sum())
    )
    assert kept["layers"] == pytest.approx(0.5)  # of the two that may go
    groups = importance.heads.view(4, 2, 2)
    best = groups[torch.arange(4), groups.mean(2).argmax(1)].max(1).values / importance.heads.sum(1)
    assert kept["heads"] == pytest.approx(float(best[[0, 1, 3]].mean())) or kept["heads"] == pytest.approx(
        float(best[[0, 2, 3]].mean())
    )


@pytest.mark.parametrize("params", [2e9, 1.3e9])
def test_a_model_of_3_billion_parameters(params: float) -> None:
    """No weights are needed, and the runners-up are other proportions."""
    found = find_shapes(known_families()["llama"], LARGE, scores(LARGE, spread=0.6), params)
    assert len(found) > 2
    for one, other in itertools.combinations([each.shape for each in found], 2):
        assert abs(one.layers - other.layers) > 2.8 or abs(one.residual - other.residual) > 307
    for each in found:
        assert abs(each.parameters / params - 1) <= TOLERANCE
        assert each.shape.residual % 64 == each.shape.ffn % 128 == each.shape.residual % each.shape.heads == 0


def test_what_matters_alike_gives_way_before_what_matters_unevenly() -> None:
    config = tiny_config("qwen2", hidden=128, ffn=128)
    family, even = known_families()["qwen2"], scores(config, spread=0.0)
    steep = torch.logspace(0, -6, 128)
    params = 0.75 * Counter(family, config)(Counter(family, config).source)
    narrow = find_shapes(family, config, replace(even, residual=steep), params)[0].shape
    thin = find_shapes(family, config, replace(even, neurons=steep.expand(4, -1)), params)[0].shape
    assert narrow.residual < 128
    assert narrow.ffn > thin.ffn
    assert narrow.residual < thin.residual


def test_the_whole_model_and_what_cannot_be() -> None:
    config = tiny_config("qwen2")
    family, importance = known_families()["qwen2"], scores(config)
    count = Counter(family, config)
    most = count(count.source)
    assert [each.shape for each in find_shapes(family, config, importance, most)] == [count.source]
    with pytest.raises(ConfigError, match="subclone only makes smaller"):
        find_shapes(family, config, importance, most + 1)
    with pytest.raises(ConfigError, match="the smallest shape has"):
        find_shapes(family, config, importance, 100)
    smallest = count(Shape(layers=2, residual=8, ffn=8, heads=1, kv_heads=1, head_dim=count.source.head_dim))
    nearest = find_shapes(family, config, importance, 0.8 * smallest)
    assert len(nearest) == 1
    assert "the nearest there is" in nearest[0].reason


def test_granules() -> None:
    sizes = (14336, 4096, 3072, 1024, 512, 256, 96, 16, 12)
    assert [granule(size) for size in sizes] == [128, 128, 64, 16, 16, 8, 8, 8, 1]
