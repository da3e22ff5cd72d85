"""Targets of a subclone: what follows from what was asked for, and one clear message for what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import SubcloneConfig
from dynaconv.convert.target import Shape, alignment_warnings, rounded, target_shape
from dynaconv.errors import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    from conftest import make_checkpoint

    made: dict[str, Checkpoint] = {}

    def make(family: str) -> Checkpoint:
        if family not in made:
            folder: Path = tmp_path_factory.mktemp("target") / family
            sizes = {"heads": 8, "kv_heads": 4, "hidden": 64, "ffn": 96, "layers": 4}
            made[family] = Checkpoint.open(make_checkpoint(folder, family, **sizes))
        return made[family]

    return make


@pytest.mark.parametrize(
    ("family", "wanted", "expected"),
    [
        ("llama", {"ratio": 0.5}, {"residual": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "layers": 4}),
        ("llama", {"ratio": 1.0}, {}),
        ("llama", {"ratio": 0.25}, {"residual": 16, "ffn": 24, "heads": 2, "kv_heads": 1}),
        ("llama", {"ratio": 0.125}, {"residual": 8, "ffn": 12, "heads": 1, "kv_heads": 1}),  # a group cannot be halved
        ("llama", {"ratio": 0.7}, {"residual": 42, "ffn": 64, "heads": 6, "kv_heads": 3}),  # 44.8 to 6 heads, 67.2 to 8
        ("qwen2", {"ratio": 0.7}, {"residual": 44, "ffn": 64, "heads": 6, "kv_heads": 3}),  # 44.8 to a multiple of 4
        ("llama", {"heads": 4}, {"heads": 4, "kv_heads": 2}),  # whole groups go
        ("llama", {"kv_heads": 1}, {"heads": 2, "kv_heads": 1}),
        ("llama", {"heads": 4, "kv_heads": 4}, {"heads": 4, "kv_heads": 4}),  # or half of each group
        ("llama", {"head_dim": 4, "layers": 2}, {"head_dim": 4, "layers": 2}),
        ("gpt2", {"ratio": 0.5}, {"residual": 32, "ffn": 48, "heads": 4, "kv_heads": 4, "head_dim": 8}),
        ("gpt2", {"ratio": 0.7}, {"residual": 48, "ffn": 64, "heads": 6, "kv_heads": 6, "head_dim": 8}),
        ("gpt2", {"residual": 40}, {"residual": 40, "heads": 5, "kv_heads": 5, "head_dim": 8}),
        ("gpt2", {"residual": 48, "heads": 8}, {"residual": 48, "head_dim": 6}),
        ("gpt2", {"residual": 32, "head_dim": 4}, {"residual": 32, "heads": 8, "head_dim": 4}),
    ],
)
def test_what_nobody_asked_for_stays_or_follows(family: str, wanted: dict, expected: dict, source) -> None:
    checkpoint = source(family)
    assert target_shape(checkpoint, SubcloneConfig(**wanted)) == replace(Shape.of(checkpoint), **expected)


@pytest.mark.parametrize(
    ("family", "wanted", "words"),
    [
        ("llama", {"residual": 128}, r"residual is 128, the source has 64"),
        ("llama", {"ffn": 97, "layers": 5}, r"(?s)layers is 5, the source has 4.*ffn is 97, the source has 96"),
        ("llama", {"heads": 16}, r"heads is 16, the source has 8"),
        ("llama", {"ffn": 0}, r"ffn is 0; it must be at least 1"),
        ("llama", {"layers": 1}, r"layers is 1; the first and the last are never removed"),
        ("llama", {"heads": 5}, r"5 query heads cannot share 4 kv heads evenly: heads=4 or heads=8"),
        ("llama", {"heads": 4, "kv_heads": 3}, r"4 query heads cannot share 3 kv heads evenly: heads=3 or heads=6"),
        ("llama", {"heads": 8, "kv_heads": 2}, r"4 a group, and the source has only 2: heads=4, or kv_heads=4"),
        ("llama", {"residual": 60}, r"not a multiple of its heads \(8\): residual=56 or residual=64"),
        ("gpt2", {"kv_heads": 2}, r"gpt2 has no grouped queries"),
        ("gpt2", {"residual": 60}, r"8 heads of 8 are not 60: residual=56 heads=7 or residual=64 heads=8\n"),
        (
            "gpt2",
            {"residual": 42, "heads": 4},
            r"8 are not 42: residual=40 heads=5 .*, or with residual 42 heads=6 \(of 7\)",
        ),
        ("gpt2", {"heads": 4}, r"4 of them would have 16 channels of 64, and the source's have 8: residual=32 heads=4"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(family: str, wanted: dict, words: str, source) -> None:
    with pytest.raises(ConfigError, match=words):
        target_shape(source(family), SubcloneConfig(**wanted))


@pytest.mark.parametrize(
    ("size", "expected"), [(100.0, 100), (0.2, 1), (6.7, 7), (44.8, 44), (1100.2, 1152), (700.1, 704), (63.9, 64)]
)
def test_what_is_not_whole_is_rounded_to_what_is_small_beside_it(size: float, expected: int) -> None:
    assert rounded(size) == expected


def test_sizes_that_lose_their_alignment_are_named() -> None:
    large = Shape(layers=4, residual=1024, ffn=2816, heads=16, kv_heads=4, head_dim=64)
    assert alignment_warnings(large, large) == []
    assert alignment_warnings(large, replace(large, residual=512, ffn=1408)) == []
    found = alignment_warnings(large, replace(large, residual=500, ffn=1000, head_dim=58))
    assert [each.split()[0] for each in found] == ["residual", "ffn", "heads"]
    assert "448 or 512" in found[0]
    odd = replace(large, residual=100)  # what never was aligned loses nothing
    assert alignment_warnings(odd, replace(odd, residual=50)) == []
