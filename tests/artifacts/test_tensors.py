"""What is written comes back, whatever the dtypes, the shards and the order; other readers agree."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynaconv.artifacts.tensors import CheckpointReader, CheckpointWriter, read_tensors, write_tensors
from dynaconv.artifacts.writer import DTYPES
from dynaconv.errors import CheckpointError

FREE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bits: every value a dtype can hold, NaN included. Booleans stay 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes; NaN counts as equal to itself."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def layout_of(tensors: dict[str, Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


specs = st.lists(
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 7), max_size=3).map(tuple)), min_size=1, max_size=8
)


@FREE
@given(specs=specs, shard_bytes=st.integers(1, 2000), seed=st.integers(0, 2**32))
def test_round_trip_any_order_any_shards(
    tmp_path_factory: pytest.TempPathFactory, specs: list, shard_bytes: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    tensors = {f"t.{i}": random_tensor(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(specs)}
    names = list(tensors)
    random.Random(seed).shuffle(names)
    with CheckpointWriter(folder, layout_of(tensors), shard_bytes=shard_bytes) as writer:
        for name in names:
            tensor = tensors[name]
            if tensor.dim() and tensor.shape[0] > 1 and seed % 2:  # in two halves, the last first
                half = tensor.shape[0] // 2
                writer.write_rows(name, half, tensor[half:])
                writer.write_rows(name, 0, tensor[:half])
            else:
                writer.write(name, tensor)
    reader = CheckpointReader(folder)
    assert set(reader.tensors) == set(tensors)
    assert reader.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert same_bits(reader.read(name), tensor)
        if tensor.dim():
            rows = tensor.shape[0]
            start = seed % (rows + 1)
            assert same_bits(reader.read_rows(name, start, rows), tensor[start:])
    for path in folder.glob("*.safetensors"):  # the reference implementation reads the same
        for name, tensor in load_file(path).items():
            assert same_bits(tensor, tensors[name])
        assert path.stat().st_size < shard_bytes + 10_000 or len(load_file(path)) == 1


@FREE
@given(specs=specs, seed=st.integers(0, 2**32))
def test_reads_what_the_reference_implementation_writes(
    tmp_path_factory: pytest.TempPathFactory, specs: list, seed: int
) -> None:
    path = tmp_path_factory.mktemp("foreign") / "model.safetensors"
    tensors = {f"t.{i}": random_tensor(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(specs)}
    save_file(tensors, path)
    for got in (read_tensors(path), {name: CheckpointReader(path.parent).read(name) for name in tensors}):
        assert set(got) == set(tensors)
        assert all(same_bits(got[name], tensor) for name, tensor in tensors.items())


def test_memory_layouts_do_not_matter(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.t(), "step": base[:, ::2], "expanded": base[:1].expand(3, 6), "grad": base.clone()}
    tensors["grad"].requires_grad_()
    with CheckpointWriter(tmp_path, layout_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_large_strided_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaconv.artifacts.writer.PIECE_BYTES", 100)
    tensor = torch.randn(33, 17).t()
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["x"], tensor)


def test_tied_tensors_are_each_written(tmp_path: Path) -> None:
    shared = torch.randn(5, 3)
    write_tensors(tmp_path / "tied.safetensors", {"embed": shared, "head": shared})
    got = read_tensors(tmp_path / "tied.safetensors")
    assert torch.equal(got["embed"], shared)
    assert torch.equal(got["head"], shared)
    assert got["embed"].data_ptr() != got["head"].data_ptr()


def test_reading_owns_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"x": torch.zeros(4)})
    got = CheckpointReader(tmp_path).read("x")
    write_tensors(path, {"x": torch.ones(4)})
    got += 2
    assert torch.equal(got, torch.full((4,), 2.0))
    assert torch.equal(read_tensors(path)["x"], torch.ones(4))


def test_transformers_accepts_the_folder(tiny_checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    parent = tiny_checkpoint("llama")
    reader = CheckpointReader(parent)
    copy = tmp_path / "copy"
    layout = [(info.name, info.dtype, info.shape) for info in reader.tensors.values()]
    with CheckpointWriter(copy, layout, shard_bytes=50_000) as writer:
        for name in reader.tensors:
            writer.write(name, reader.read(name))
    (copy / "config.json").write_text((parent / "config.json").read_text())
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[name], reader.read(name)) for name in reader.tensors)


def test_index_lists_every_tensor_and_its_size(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.randn(10) for i in range(5)}
    with CheckpointWriter(tmp_path, layout_of(tensors), shard_bytes=80, prefix="part") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "part.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert {name: (tmp_path / shard).is_file() for name, shard in index["weight_map"].items()} == dict.fromkeys(
        tensors, True
    )


def test_metadata_is_kept(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, metadata={"made": "here"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


NAN, INF = float("nan"), float("inf")
WIDE = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "bad"), [(torch.float8_e4m3fn, NAN), *((dtype, bad) for dtype in WIDE for bad in (NAN, INF, -INF))]
)
def test_values_that_are_not_finite_are_named(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(50, 4)
    values[37, 2] = bad
    write_tensors(tmp_path / "model.safetensors", {"good": torch.randn(3), "layer.w": values.to(dtype)})
    reader = CheckpointReader(tmp_path)
    reader.read_finite("good")
    reader.read_finite("layer.w", (0, 37))
    with pytest.raises(CheckpointError, match=r"layer\.w .*not finite") as caught:
        reader.read_finite("layer.w")
    assert "1 of 200" in str(caught.value)
