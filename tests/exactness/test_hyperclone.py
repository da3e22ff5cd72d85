"""A hyperclone computes what its source does: the logits stay, and stock transformers loads it whole.

Every family, drawn tiny shapes, tied and untied heads, every variant, every axis that can grow, alone and together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import make_checkpoint
from fake_statistics import fake_statistics
from hypothesis import given, settings
from tiny_families import FAMILIES
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.registry import known_families
from dynaconv.artifacts.tensors import CheckpointReader
from dynaconv.config import CarveConfig, HypercloneConfig, RunConfig
from dynaconv.convert.hyperclone import plan_hyperclone
from dynaconv.convert.resize import Resize, write_resized
from dynaconv.convert.stage import CarveStage
from dynaconv.errors import ConfigError
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress

VARIANTS = ("noisy", "symmetric", "diagonal")
TOKENS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A source and what becomes of it."""

    source: dict[str, Any]
    wanted: dict[str, Any]
    seed: int


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """What stock transformers computes from ``folder``, (2, 24, 257) float64."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    found: Tensor = model.eval()(TOKENS).logits.double()
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def hyperclone(source: Path, out: Path, *, seed: int = 0, **wanted: Any) -> Resize:
    checkpoint = Checkpoint.open(source)
    resize = plan_hyperclone(checkpoint, HypercloneConfig(**wanted), seed)
    out.mkdir()
    write_resized(checkpoint, resize, out, shard_bytes=200_000)
    return resize


@contextmanager
def folders(family: str, **source: Any) -> Iterator[tuple[Path, Path]]:
    """A tiny checkpoint of ``family``, and a folder beside it that is not there yet."""
    with TemporaryDirectory() as folder:
        yield make_checkpoint(Path(folder) / "source", family, **source), Path(folder) / "grown"


def heads_make_the_stream(family: str) -> bool:
    return known_families()[family].sizes["q_dim"].field is None


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    grouped, bound = "kv_head" in known_families()[family].sizes, heads_make_the_stream(family)
    heads, head_dim = draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([8, 16]))
    source: dict[str, Any] = {
        "heads": heads,
        "ffn": draw(st.integers(3, 40)),
        "layers": draw(st.integers(1, 2)),
        "tied": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "hidden": heads * head_dim,
    }
    if grouped:
        source["kv_heads"] = draw(st.sampled_from([kv for kv in (1, 2, 3, heads) if heads % kv == 0]))
    if not bound:
        source |= {
            "head_dim": head_dim,
            "hidden": draw(st.sampled_from([6, 12])) * heads,
        }  # stock configs want D % heads == 0
    grow_heads, grow_dim = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    wanted: dict[str, Any] = {
        "variant": draw(st.sampled_from(VARIANTS)),
        "heads": grow_heads,
        "head_dim": grow_dim,
        "residual": grow_heads * grow_dim if bound else draw(st.integers(1, 3)),
        "ffn": draw(st.floats(1, 3)),
        "layers": source["layers"] + draw(st.integers(1, 3)),
    }
    if grouped:
        wanted["kv_heads"] = draw(
            st.sampled_from(["auto", "scale", "same", str(grow_heads * heads // source["kv_heads"])])
        )
    return Case(source, wanted, seed=draw(st.integers(0, 99)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_logits(family: str) -> None:
    @settings(max_examples=10)
    @given(case=cases(family))
    def check(case: Case) -> None:
        with folders(family, **case.source) as (source, grown):
            resize = hyperclone(source, grown, seed=case.seed, **case.wanted)
            assert Checkpoint.open(grown).parameters == resize.summary["parameters"][1]
            assert difference(logits(grown), logits(source)) <= 1e-5

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_within_its_own_noise(family: str) -> None:
    """Powers of two divide exactly, so growing costs no more than running the source in bfloat16 does."""
    small: dict[str, Any] = {"hidden": 32, "ffn": 24, "layers": 1, "dtype": torch.bfloat16}
    for tied, factor, exact in ((False, 2, "symmetric"), (True, 4, "diagonal")):
        with folders(family, tied=tied, **small) as (source, grown):
            expected = logits(source)
            noise = difference(logits(source, torch.bfloat16), expected)
            for variant in ("noisy", exact):
                out = grown.with_name(variant)
                hyperclone(source, out, variant=variant, factor=factor)
                assert difference(logits(out, torch.bfloat16), expected) <= 2 * noise, (variant, factor)
            if not known_families()[family].embedding_scaled:  # the stored weights themselves are exact
                assert difference(logits(out), expected) <= 1e-5


ROTARY = {
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"factor": 4.0},
    "default": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("growth", [2, 3])
def test_longer_heads_keep_their_frequencies(kind: str, growth: int) -> None:
    family = "phi3" if kind == "default" else "llama"
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **ROTARY[kind]}
    with folders(family, rope_parameters=parameters) as (source, grown):
        hyperclone(source, grown, head_dim=growth)
        assert difference(logits(grown), logits(source)) <= 1e-5


def test_scaling_that_depends_on_the_length_of_a_head_is_refused_unless_exact() -> None:
    """YaRN's ramp ends at whole channels: the same for this head twice as long, another three times as long."""
    parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    with folders("llama", rope_parameters=parameters) as (source, grown):
        hyperclone(source, grown, head_dim=2)
        assert difference(logits(grown), logits(source)) <= 1e-5
        with pytest.raises(ConfigError, match="yarn"):
            hyperclone(source, grown, head_dim=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_carving_before_or_after_stays_exact(family: str) -> None:
    with folders(family, ffn=24, hidden=32, layers=1) as (source, grown):
        expected = logits(source)
        hyperclone(source, grown, factor=2)
        assert difference(logits(carve(grown)), expected) <= 1e-5
        again = grown.with_name("carved-and-grown")
        hyperclone(carve(source), again, factor=2)
        assert difference(logits(again), expected) <= 1e-5


def carve(dense: Path) -> Path:
    """``dense`` with its neurons in a random order and cut into blocks, as the stage does it."""
    statistics = fake_statistics(
        dense.with_name(f"{dense.name}-statistics"), dense, RunConfig(experts="nested", blocks=3)
    )
    folder, work = (dense.with_name(f"{dense.name}-{name}") for name in ("carved", "work"))
    folder.mkdir()
    work.mkdir()
    config, inputs = (
        RunConfig(experts="nested", blocks=3, carve=CarveConfig()),
        {"dense": dense, "statistics": statistics},
    )
    CarveStage().run(StageContext(config, inputs, folder, work, Progress(quiet=True), logging.getLogger("test")))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nested_order_of_neurons_stays_nested(variant: str) -> None:
    """The first 3n neurons of an FFN three times as wide compute what the first n did."""
    with folders("llama", ffn=10, layers=1) as (source, grown):
        hyperclone(source, grown, ffn=3, variant=variant)
        small, large = ffn(source), ffn(grown)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        for width in range(11):
            expected, found = output(small, x, width), output(large, x, 3 * width)
            assert torch.allclose(found, expected, atol=1e-5 * float(output(small, x, 10).abs().max()))


def ffn(folder: Path) -> list[Tensor]:
    reader = CheckpointReader(folder)
    return [reader.read(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up", "down")]


def output(weights: list[Tensor], x: Tensor, width: int) -> Tensor:
    gate, up, down = weights
    hidden: Tensor = torch.nn.functional.silu(x @ gate[:width].T) * (x @ up[:width].T)
    return hidden @ down[:, :width].T


def test_a_change_of_any_tensor_shows() -> None:
    """The comparison above sees each tensor of the result: another one in its place moves the logits."""
    for family in ("gemma3_text", "gpt2", "phi3"):
        with folders(family, tied=True) as (source, grown):
            hyperclone(source, grown, factor=2, variant="symmetric")
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(grown).eval()
            with torch.no_grad():
                expected = model(TOKENS).logits
                for name, parameter in model.named_parameters():
                    kept = parameter.clone()
                    parameter.copy_(torch.randn_like(parameter))
                    assert difference(model(TOKENS).logits, expected) > 1e-5, name
                    parameter.copy_(kept)
