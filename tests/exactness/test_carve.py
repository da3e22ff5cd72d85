"""A carved checkpoint is the parent: stock transformers loads it whole, its logits agree, and no neuron is lost.

Its nested widths are the parent without its least important neurons.

Every family, tied and untied, MHA, GQA and MQA, odd FFN sizes, biases, head_dim apart from hidden / heads.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import masked_neurons
from fake_statistics import fake_statistics
from tiny_families import FAMILIES
from torch import Tensor

import dynaconv
from dynaconv import Dial
from dynaconv.arch.registry import known_families
from dynaconv.artifacts.tensors import CheckpointReader, read_tensors
from dynaconv.config import CarveConfig, DataConfig, ProfileConfig, RunConfig
from dynaconv.convert.stage import CarveStage
from dynaconv.dynamic.layout import Layout
from dynaconv.pipeline.stage import Stage, StageContext
from dynaconv.profile.stage import ProfileStage
from dynaconv.progress import Progress

BLOCKS = 5


@dataclass(frozen=True)
class Shape:
    """One parent. ``extra`` goes to the transformers config."""

    family: str
    kv_heads: int = 2
    ffn: int = 96
    head_dim: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        heads = {4: "mha", 2: "gqa", 1: "mqa"}[self.kv_heads]
        return "-".join([self.family, heads, f"ffn{self.ffn}", f"dim{self.head_dim}", *self.extra])


SHAPES = [
    Shape("llama", 4, 96),
    Shape("llama", 2, 67, None, {"attention_bias": True, "mlp_bias": True}),
    Shape("llama", 1, 131, 24, {"mlp_bias": True}),
    Shape("mistral", 4, 97, 20),
    Shape("mistral", 2, 80, None, {"sliding_window": None}),
    Shape("mistral", 1, 5, 8),
    Shape("qwen2", 4, 641),
    Shape("qwen2", 2, 96),
    Shape("qwen2", 1, 33),
    Shape("qwen3", 4, 96, 12, {"attention_bias": True}),
    Shape("qwen3", 2, 99, 32),
    Shape("qwen3", 1, 17, 16),
    *(Shape(family, 2, 67) for family in FAMILIES),
    Shape("granite", 1, 96, None, {"mlp_bias": True}),
    Shape("opt", 4, 96, None, {"enable_bias": False}),
    Shape("starcoder2", 1, 96, None, {"use_bias": False}),
]


def carve(tmp_path: Path, dense: Path) -> Path:
    config = RunConfig(experts="nested", blocks=BLOCKS, carve=CarveConfig(shard_bytes=150_000))
    statistics = fake_statistics(tmp_path / "statistics", dense, config)
    return run(CarveStage(), config, {"dense": dense, "statistics": statistics}, tmp_path / "carved")


def run(stage: Stage, config: RunConfig, inputs: dict[str, Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    stage.run(StageContext(config, inputs, folder, folder, Progress(quiet=True), logging.getLogger("test")))
    return folder


def neurons(reader: CheckpointReader, family: str, layer: int) -> Tensor:
    """Each neuron as one row (F, ...): its rows of gate and up, its column of down, and its biases."""
    spec = known_families()[family].ffn
    path = spec.path.format(layer=layer)
    down = reader.read(f"{path}.{spec.down}.weight")
    transposed = family == "gpt2"
    rows = [down if transposed else down.T]
    for name in dict.fromkeys((spec.gate, spec.up)):
        for tensor in (f"{path}.{name}.weight", f"{path}.{name}.bias") if name else ():
            if tensor in reader.tensors:
                weight = reader.read(tensor)
                weight = weight.view(-1, weight.shape[-1]).T if transposed or weight.dim() == 1 else weight
                rows += weight.chunk(2 if spec.gate == spec.up else 1)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_carved_is_the_parent(tmp_path: Path, tiny_checkpoint: Callable[..., Path], shape: Shape, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    settings = {"kv_heads": shape.kv_heads, "ffn": shape.ffn, "head_dim": shape.head_dim, "tied": tied}
    dense = tiny_checkpoint(shape.family, **settings, **shape.extra)
    folder = carve(tmp_path, dense)

    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    parent = AutoModelForCausalLM.from_pretrained(dense)
    carved, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert type(carved) is type(parent)
    assert (carved.get_output_embeddings().weight is carved.get_input_embeddings().weight) is tied
    with torch.no_grad():
        expected, found = parent(tokens).logits, carved(tokens).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    before, after = CheckpointReader(dense), CheckpointReader(folder)
    orders = read_tensors(tmp_path / "statistics" / "statistics.safetensors")
    for layer in range(2):
        old, new = (neurons(reader, shape.family, layer) for reader in (before, after))
        order = orders[f"layers.{layer}.order"]
        assert torch.equal(new, old[order]) and not torch.equal(new, old)
        lost_none = sorted(map(tuple, new.tolist())) == sorted(map(tuple, old.tolist()))
        assert lost_none and len(set(map(tuple, new.tolist()))) == shape.ffn
    edges, dynamic = Layout.load(folder).partition.edges, dynaconv.load(folder).eval()
    for width in (0, 2, 4, BLOCKS):
        kept = torch.stack([orders[f"layers.{layer}.order"][: edges[width]] for layer in range(2)])
        with torch.no_grad(), masked_neurons(parent, shape.family, kept):
            expected, found = parent(tokens).logits, dynamic(tokens, dial=Dial.uniform(width)).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    cover = itertools.chain.from_iterable(range(start, stop) for start, stop in pairwise(edges))
    assert list(cover) == list(range(shape.ffn)) and len(edges) == BLOCKS + 1


def test_everything_but_the_ffns_keeps_its_bytes(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    dense = tiny_checkpoint("qwen3", dtype=torch.bfloat16)
    folder = carve(tmp_path, dense)
    before, after = CheckpointReader(dense), CheckpointReader(folder)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert before.tensors[name].dtype == after.tensors[name].dtype == torch.bfloat16
        if ".mlp." not in name:
            assert torch.equal(before.read(name), after.read(name)), name


def test_carving_twice_gives_the_same_bytes(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    dense = tiny_checkpoint("llama")
    first, second = carve(tmp_path / "first", dense), carve(tmp_path / "second", dense)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("width", "block_size"), [(144, None), (67, None), (100, None), (9, None), (144, 16), (67, 1), (100, 100)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_of_every_family_is_profiled_and_carved_at_any_grain(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    text_file: Path,
    family: str,
    width: int,
    block_size: int | None,
) -> None:
    """The blocks of recipe ``routed``, and the smallest and largest: a permutation of the parent, and a router each."""
    from transformers import AutoModelForCausalLM

    size = block_size or max(1, width // 64)
    config = RunConfig(
        experts="routed",
        block_size=block_size,
        data=DataConfig(train=[str(text_file)], sequence_length=32),
        profile=ProfileConfig(tokens=512, batch_size=4),
    )
    dense = tiny_checkpoint(family, ffn=width)
    plans = [stage.estimate(config, dense) for stage in (ProfileStage(), CarveStage())]
    cut = ", each for itself" if size == 1 else f" in {-(-width // size)} block"
    assert all(f"2 FFNs of {width} neurons{cut}" in plan.notes[0] for plan in plans)
    statistics = run(ProfileStage(), config, {"dense": dense}, tmp_path / "statistics")
    folder = run(CarveStage(), config, {"dense": dense, "statistics": statistics}, tmp_path / "carved")

    blocks = -(-width // size)
    edges = Layout.load(folder).partition.edges
    assert (len(edges) - 1, edges[-1]) == (blocks, width)
    assert {stop - start for start, stop in pairwise(edges[:-1])} <= {size}
    orders, routers = read_tensors(statistics / "statistics.safetensors"), read_tensors(folder / "dynaconv.safetensors")
    before, after = CheckpointReader(dense), CheckpointReader(folder)
    for layer in range(2):
        order = orders[f"layers.{layer}.order"]
        assert torch.equal(order.sort().values, torch.arange(width))
        assert torch.equal(neurons(after, family, layer), neurons(before, family, layer)[order])
        assert routers[f"layers.{layer}.router.linear.weight"].shape == (blocks, 64)
        assert all(
            bool(routers[f"layers.{layer}.router.linear.{name}"].isfinite().all()) for name in ("weight", "bias")
        )
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (AutoModelForCausalLM.from_pretrained(each)(tokens).logits for each in (dense, folder))
        dynamic = dynaconv.load(folder).eval()
        full = dynamic(tokens).logits
        low, again = (dynamic(tokens, dial=dynaconv.Dial.uniform(blocks // 2)).logits for _ in range(2))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(full, found)
    assert low.isfinite().all() and torch.equal(low, again) and not torch.equal(low, full)
