"""Edits speak of axes: they reach every tensor that spans one, move whole heads, and lose only what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.arch import surgery
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import Slot, TensorSpec
from dynaconv.arch.surgery import Take, apply, transform
from dynaconv.artifacts.tensors import CheckpointReader, read_tensors, write_tensors
from dynaconv.errors import CheckpointError

Make = Callable[..., Path]
SIZES = {"vocab": 7, "residual": 6, "ffn": 5, "q_head": 4, "kv_head": 2, "q_dim": 3, "k_dim": 3, "v_dim": 3}


def slot_of(*axes: str, layer: int | None = 0, contracts: int | None = None, offset: float = 0.0) -> Slot:
    spec = TensorSpec("x.{layer}", axes, "ffn", contracts=contracts, offset=offset)
    shape = tuple(dimension.size(SIZES) for dimension in spec.dimensions)
    return Slot("x.0", layer, spec, shape)


indices = {axis: st.lists(st.integers(0, size - 1), min_size=1, max_size=6) for axis, size in SIZES.items()}


@given(rows=indices["ffn"], columns=indices["residual"], seed=st.integers(0, 99))
def test_takes_along_two_dimensions_are_plain_indexing(rows: list[int], columns: list[int], seed: int) -> None:
    slot, tensor = slot_of("ffn", "residual"), torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    takes = [Take("ffn", torch.tensor(rows)), Take("residual", torch.tensor(columns))]
    assert torch.equal(apply(slot, SIZES, tensor, takes), tensor[rows][:, columns])


@given(heads=indices["q_head"], dims=indices["q_dim"])
def test_products_of_axes_move_whole_heads(heads: list[int], dims: list[int]) -> None:
    slot, tensor = slot_of("residual", "q_head*q_dim"), torch.randn(6, 12)
    takes = [Take("q_head", torch.tensor(heads)), Take("q_dim", torch.tensor(dims))]
    expected = tensor.view(6, 4, 3)[:, heads][:, :, dims].reshape(6, -1)
    assert torch.equal(apply(slot, SIZES, tensor, takes), expected)


@given(heads=indices["q_head"], dims=indices["q_dim"], values=indices["v_dim"])
def test_projections_interleaved_by_head_keep_their_parts(heads: list[int], dims: list[int], values: list[int]) -> None:
    slot, tensor = slot_of("q_head*(q_dim+k_dim+v_dim)", "residual"), torch.randn(36, 6)
    index = torch.tensor(dims)
    takes = [Take("q_head", torch.tensor(heads)), Take("q_dim", index), Take("v_dim", torch.tensor(values))]
    queries, keys, rest = tensor.view(4, 3, 3, 6)[heads].unbind(1)
    expected = torch.cat([queries[:, dims], keys, rest[:, values]], 1).reshape(-1, 6)
    assert torch.equal(apply(slot, SIZES, tensor, takes), expected)


@given(order=st.permutations(range(5)))
def test_both_halves_of_a_fused_projection_are_taken_from(order: list[int]) -> None:
    slot, tensor = slot_of("ffn+ffn", "residual"), torch.randn(10, 6)
    expected = torch.cat([tensor[:5][order], tensor[5:][order]])
    assert torch.equal(apply(slot, SIZES, tensor, [Take("ffn", torch.tensor(order))]), expected)


def test_factors_follow_what_an_axis_does_in_a_tensor() -> None:
    index, contracted = torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.25])
    take = Take("ffn", index, produced=3.0, contracted=contracted)
    tensor = torch.randn(6, 5)
    down = apply(slot_of("residual", "ffn", contracts=1), SIZES, tensor, [take])
    assert torch.equal(down, tensor[:, index] * contracted)
    up = apply(slot_of("ffn", "residual", contracts=1), SIZES, tensor.T, [take])
    assert torch.equal(up, tensor.T[index] * 3)
    transposed = apply(slot_of("ffn", "residual", contracts=0), SIZES, tensor.T, [take])
    assert torch.equal(transposed, tensor.T[index] * contracted[:, None])
    norm = apply(slot_of("ffn", offset=1.0), SIZES, tensor[0], [take])
    torch.testing.assert_close(1 + norm, 3 * (1 + tensor[0][index]))


def test_factors_of_takes_in_a_row_multiply() -> None:
    takes = [
        Take("ffn", torch.tensor([0, 1]), produced=torch.tensor([1.0, 2.0])),
        Take("ffn", torch.tensor([1, 1, 0]), 5.0),
    ]
    assert apply(slot_of("ffn"), SIZES, torch.arange(1.0, 6), takes).tolist() == [20, 20, 5]


@given(order=st.permutations(range(5)))
def test_a_permutation_and_its_inverse_are_nothing(order: list[int]) -> None:
    slot, tensor = slot_of("residual", "ffn"), torch.randn(6, 5)
    index = torch.tensor(order)
    there = apply(slot, SIZES, tensor, [Take("ffn", index)])
    assert torch.equal(apply(slot, SIZES, there, [Take("ffn", index.argsort())]), tensor)
    both = [Take("ffn", index), Take("ffn", index.argsort())]
    assert torch.equal(apply(slot, SIZES, tensor, both), tensor)


def test_axes_a_tensor_does_not_span_leave_it_alone() -> None:
    tensor = torch.randn(6)
    assert apply(slot_of("residual"), SIZES, tensor, [Take("ffn", torch.tensor([0]))]) is tensor


def test_positions_by_layer() -> None:
    take = Take("ffn", {0: torch.tensor([0, 1]), 1: torch.tensor([4, 3])})
    tensor = torch.arange(5.0)
    assert apply(slot_of("ffn", layer=1), SIZES, tensor, [take]).tolist() == [4, 3]
    with pytest.raises(KeyError, match="outside the layers"):
        apply(slot_of("ffn", layer=None), SIZES, tensor, [take])
    with pytest.raises(KeyError):
        apply(slot_of("ffn", layer=2), SIZES, tensor, [take])


def test_a_misspelt_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'ffn'"):
        Take("fnn", torch.tensor([0]))


@settings(max_examples=8, deadline=None)
@given(piece=st.sampled_from([1, 700, 4000, 10**6]), shard=st.sampled_from([1, 20_000, 10**9]))
def test_streaming_is_the_same_whatever_the_pieces_and_shards(
    tmp_path_factory: pytest.TempPathFactory, piece: int, shard: int
) -> None:
    from conftest import make_checkpoint

    folder = tmp_path_factory.mktemp("pieces")
    checkpoint = Checkpoint.open(make_checkpoint(folder / "in", "qwen2", ffn=33, tied=True))
    orders = {layer: torch.randperm(33, generator=torch.Generator().manual_seed(layer)) for layer in range(2)}
    takes = [Take("ffn", orders), Take("kv_head", torch.tensor([1, 0])), Take("residual", torch.arange(63, -1, -1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "PIECE_BYTES", piece)
        transform(checkpoint, takes, folder / "out", shard_bytes=shard)
    written = CheckpointReader(folder / "out")
    assert set(written.tensors) == set(checkpoint.slots)
    for name, slot in checkpoint.slots.items():
        expected = apply(slot, checkpoint.sizes, checkpoint.reader.read(name), takes)
        assert torch.equal(written.read(name), expected), name


def test_every_tensor_is_announced_once(tmp_path: Path, tiny_checkpoint: Make) -> None:
    checkpoint, seen = Checkpoint.open(tiny_checkpoint("mistral")), []
    transform(checkpoint, [], tmp_path / "out", shard_bytes=10**9, advance=lambda info: seen.append(info.name))
    assert sorted(seen) == sorted(checkpoint.reader.tensors)


def test_leftovers_and_copies_of_tied_tensors_are_left_out(tmp_path: Path, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(tied=True)
    tensors = read_tensors(folder / "model.safetensors")
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), torch.nan),
    }
    write_tensors(folder / "model.safetensors", {**tensors, **extra})
    transform(Checkpoint.open(folder), [], tmp_path / "out", shard_bytes=10**9)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_a_copy_of_a_tied_tensor_that_differs_is_refused(tmp_path: Path, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(tied=True)
    tensors = read_tensors(folder / "model.safetensors")
    other = tensors["model.embed_tokens.weight"].clone()
    other[200, 3] += 1
    write_tensors(folder / "model.safetensors", {**tensors, "lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight to model\.embed_tokens\.weight.*differ"):
        transform(Checkpoint.open(folder), [], tmp_path / "out", shard_bytes=10**9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, tiny_checkpoint: Make, name: str, value: float
) -> None:
    folder = tiny_checkpoint()
    tensors = read_tensors(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    write_tensors(folder / "model.safetensors", tensors)
    orders = Take("ffn", torch.randperm(96))
    with pytest.raises(CheckpointError, match=name):
        transform(Checkpoint.open(folder), [orders], tmp_path / "out", shard_bytes=10**9)
    assert list((tmp_path / "out").iterdir()) == []
