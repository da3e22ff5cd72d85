"""The index sets and the noise of a hyperclone, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.surgery import selection
from dynaconv.artifacts.tensors import CheckpointReader
from dynaconv.config import HypercloneConfig
from dynaconv.convert import rotary
from dynaconv.convert.growth import head_copies, shares_evenly, spread
from dynaconv.convert.hyperclone import plan_hyperclone
from dynaconv.convert.noise import Copies, Pairs, add_noise, separate
from dynaconv.convert.resize import write_resized
from dynaconv.errors import ConfigError

positions = st.lists(st.integers(0, 9), min_size=1, max_size=40).map(torch.tensor)


@given(kv=st.integers(1, 3), group=st.integers(1, 4), grow=st.integers(1, 4), grow_kv=st.integers(1, 4))
def test_new_heads_read_copies_of_what_they_read(kv: int, group: int, grow: int, grow_kv: int) -> None:
    assume(shares_evenly(group, grow, grow_kv))
    heads = kv * group
    queries, keys = head_copies(heads, kv, grow, grow_kv)
    assert queries.bincount().tolist() == [grow] * heads
    assert keys.bincount().tolist() == [grow_kv] * kv
    new_group = len(queries) // len(keys)
    assert [int(keys[new // new_group]) for new in range(len(queries))] == [int(old) // group for old in queries]


@given(kv=st.integers(1, 3), group=st.integers(1, 6), grow=st.integers(1, 6), grow_kv=st.integers(1, 9))
def test_heads_are_shared_evenly_exactly_when_new_groups_are_whole(
    kv: int, group: int, grow: int, grow_kv: int
) -> None:
    assert shares_evenly(group, grow, grow_kv) == ((group * grow) % grow_kv == 0)


def test_heads_are_copied_in_blocks_and_repeated_within_groups() -> None:
    assert [each.tolist() for each in head_copies(4, 2, 2, 2)] == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1]]
    assert [each.tolist() for each in head_copies(4, 2, 2, 1)] == [[0, 1, 0, 1, 2, 3, 2, 3], [0, 1]]
    assert [each.tolist() for each in head_copies(4, 2, 1, 2)] == [[0, 1, 2, 3], [0, 0, 1, 1]]


@given(old=st.integers(1, 50), more=st.integers(0, 120))
def test_copies_lie_side_by_side_and_are_as_even_as_can_be(old: int, more: int) -> None:
    index = spread(old, old + more)
    counts = index.bincount(minlength=old)
    assert bool((index.diff() >= 0).all())
    assert int(counts.min()) >= 1 and int(counts.max() - counts.min()) <= 1


@given(old=positions)
def test_copies_know_their_rank_and_pairs_are_copies(old: Tensor) -> None:
    copies, pairs = Copies.of(old), Pairs.of(old)
    for place, position in enumerate(old.tolist()):
        assert int(copies.rank[place]) == old[:place].tolist().count(position)
        assert int(copies.count[place]) == old.tolist().count(position)
    everywhere, paired = torch.arange(len(old)), []
    for first, second, _ in pairs.runs:
        assert torch.equal(old[everywhere[first]], old[everywhere[second]])
        paired += everywhere[first].tolist() + everywhere[second].tolist()
    assert len(paired) == len(set(paired)) == 2 * pairs.total
    assert pairs.total == sum(count // 2 for count in old.bincount().tolist())


def folded(weight: Tensor, old: Tensor) -> Tensor:
    """Sum (M, n) float64 of the columns that are copies of each old one."""
    return torch.zeros(len(weight), int(old.max()) + 1, dtype=torch.float64).index_add_(1, old, weight.double())


def noisy(
    weight: Tensor, old: Tensor, *, seed: int = 0, name: str = "x", start: int = 0, snr_db: float = 10.0
) -> Tensor:
    made = weight.clone()
    add_noise(made, weight, Pairs.of(old), snr_db=snr_db, seed=seed, name=name, start=start)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [2, 3, 4])
def test_noise_adds_up_to_zero_and_is_as_strong_as_asked(dtype: torch.dtype, copies: int) -> None:
    old = torch.arange(50).repeat(copies)
    weight = (torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).to(dtype) / 4).repeat(1, copies)
    made = noisy(weight, old, snr_db=6.0)
    rounding = float(weight.abs().max()) * torch.finfo(dtype).eps * 4
    assert (folded(made, old) - folded(weight, old)).abs().max() <= rounding
    added = (made.double() - weight.double())[:, : 50 * (copies // 2 * 2)]
    ratio = weight.double().square().mean() / added.square().mean()
    assert abs(10 * torch.log10(ratio) - 6.0) < 0.2
    alike = [torch.equal(made[:, 50 * i : 50 * i + 50], weight[:, :50]) for i in range(copies)]
    assert alike == [False] * (copies // 2 * 2) + [True] * (copies % 2)  # an odd last copy has no partner
    rows = torch.corrcoef(added[:, :50])
    assert (rows - torch.eye(300)).abs().max() < 0.8  # each row has noise of its own


def test_noise_does_not_depend_on_how_rows_are_cut_or_on_threads() -> None:
    old = torch.arange(3000).repeat_interleave(2)
    weight = torch.randn(200, 6000, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = noisy(weight, old)
    for cuts in ([0, 1, 87, 88, 200], [0, 100, 200]):
        pieces = [noisy(weight[a:b], old, start=a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)
    added = (whole.float() - weight.float())[:, ::2]
    assert (torch.corrcoef(added) - torch.eye(200)).abs().max() < 0.2  # noise of another block is not the same again
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(noisy(weight, old), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(noisy(weight, old, seed=1), whole)
    assert not torch.equal(noisy(weight, old, name="y"), whole)


def test_a_row_of_zeros_stays() -> None:
    weight = torch.zeros(2, 8)
    assert torch.equal(noisy(weight, torch.arange(4).repeat(2)), weight)


@given(old=positions, ranks=st.lists(st.integers(0, 3), min_size=1, max_size=6).map(torch.tensor))
def test_separated_copies_read_each_input_once(old: Tensor, ranks: Tensor) -> None:
    weight = torch.ones(len(ranks), len(old))
    separate(weight, ranks, Copies.of(old))
    there = old.bincount(minlength=int(old.max()) + 1).clamp_max(1).double()
    assert torch.equal(folded(weight, old), there.expand(len(ranks), -1))
    copies = Copies.of(old)
    for row, rank in enumerate(ranks.tolist()):
        for column in weight[row].nonzero().flatten().tolist():
            assert int(copies.rank[column]) == rank % int(copies.count[column])


def rotation(frequencies: list[float], kind: str = "default", scaling: float = 1.0) -> rotary.Rotation:
    return rotary.Rotation(kind, torch.tensor(frequencies), scaling)


def test_pairs_of_a_longer_head_are_found_by_frequency() -> None:
    old, new = rotation([1.0, 0.1]), rotation([1.0, 0.3, 0.1, 0.03])
    found = rotary.grown(old, new, 6, 2, fixed_scale=False)  # channels 4 and 5 are not turned
    assert found.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 4, 5]
    turned, passed = 2**0.5, 2**-0.5
    assert torch.allclose(found.query, torch.tensor([turned, 0.0] * 4 + [passed] * 4))
    fixed = rotary.grown(old, new, 6, 2, fixed_scale=True)
    assert torch.allclose(fixed.query, torch.tensor([1.0, 0.0] * 4 + [0.5] * 4))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (rotation([1.0, 0.1]), rotation([1.0, 0.3, 0.11, 0.03]), "no pair of channels"),
        (rotation([1.0]), rotation([1.0, 0.1, 0.01]), "which is not 2 times 1"),
        (rotation([1.0]), rotation([1.0, 0.1], scaling=1.1), "scale them differently"),
        (rotation([1.0], "dynamic"), rotation([1.0, 0.1], "dynamic"), "change with the length of the text"),
    ],
)
def test_heads_do_not_grow_where_frequencies_would_change(old: Any, new: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rotary.grown(old, new, 4, 2, fixed_scale=False)


def plan(folder: Path, **wanted: Any) -> Any:
    return plan_hyperclone(Checkpoint.open(folder), HypercloneConfig(**wanted), 0)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"residual": 1.5}, ["residual is 1.5", "norms keep their statistics", "residual=1 (64 stays)", "residual=2"]),
        ({"factor": 2.5}, ["factor is 2.5", "factor=2", "factor=3"]),
        ({"heads": 1.5}, ["heads is 1.5", "heads=1", "heads=2"]),
        ({"head_dim": 1.5}, ["head_dim is 1.5", "head_dim=1", "head_dim=2"]),
        ({"residual": 0}, ["residual is 0", "subclone"]),
        ({"ffn": 0.5}, ["ffn is 0.5", "subclone"]),
        ({"layers": 1}, ["layers is 1", "the source has 2", "subclone"]),
        ({"kv_heads": "3"}, ["kv_heads is 3", "6 key and value heads cannot share 4 query heads", "kv_heads=1 or 2"]),
        ({"kv_heads": "many"}, ["'many'", "auto, scale, same"]),
        ({"heads": 3}, ["64", "12", "residual=1 heads=4 or residual=1 heads=2 or residual=3 heads=3"]),
        ({}, ["nothing would grow"]),
        ({"residual": 1.5, "ffn": 0.5, "heads": 0}, ["3 mistakes", "residual is 1.5", "heads is 0", "ffn is 0.5"]),
    ],
    ids=str,
)
def test_refusals_say_why_and_what_else(
    tiny_checkpoint: Callable[..., Path], wanted: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(tiny_checkpoint("llama"), **wanted)
    assert all(each in str(refused.value) for each in said), refused.value


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"residual": 2}, ["heads make up the residual stream", "residual=2 heads=2", "residual=2 heads=1 head_dim=2"]),
        ({"factor": 2, "head_dim": 2}, ["not 2 x 2 beside 2"]),
        ({"factor": 2, "kv_heads": "same"}, ["no grouped queries"]),
        ({"layers": 3}, ["scale_attn_by_inverse_layer_idx", "layers must stay 2"]),
    ],
    ids=str,
)
def test_refusals_of_families_without_freedom(
    tiny_checkpoint: Callable[..., Path], wanted: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(tiny_checkpoint("gpt2", scale_attn_by_inverse_layer_idx=True), **wanted)
    assert all(each in str(refused.value) for each in said), refused.value


def test_a_single_key_and_value_head_stays_single(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", kv_heads=1)
    assert plan(folder, factor=2).config["num_key_value_heads"] == 1
    assert plan(folder, factor=2, kv_heads="scale").config["num_key_value_heads"] == 2


def test_an_ffn_grows_to_a_factor_or_to_a_size(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", ffn=96)
    assert plan(folder, ffn=1.5).config["intermediate_size"] == 144
    assert plan(folder, ffn=100).config["intermediate_size"] == 100
    assert plan(tiny_checkpoint("llama", ffn=2), factor=2).config["intermediate_size"] == 4


def test_inserted_layers_are_spread_and_keep_their_kind(tiny_checkpoint: Callable[..., Path]) -> None:
    resize = plan(tiny_checkpoint("gemma3_text", layers=4), layers=7)
    old, new = [0, 0, 1, 1, 2, 2, 3], resize.config["layer_types"]
    assert list(resize.layers) == old and resize.summary["inserted_layers"] == [1, 3, 5]
    kinds = Checkpoint.open(tiny_checkpoint("gemma3_text", layers=4)).config["layer_types"]
    assert len(set(kinds)) == 2 and new == [kinds[layer] for layer in old]


def test_warnings_name_what_is_slow_or_rounds(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", ffn=128, dtype=torch.bfloat16)
    assert plan(folder, factor=2).warnings == ()
    (alignment,) = plan(folder, ffn=1.5).warnings
    assert "192" in alignment and "128 and 256" in alignment
    (rounding,) = plan(folder, factor=3).warnings
    assert "dividing by 3 rounds in bfloat16" in rounding
    (long,) = plan(tiny_checkpoint("llama", head_dim=256), head_dim=2).warnings
    assert "512" in long


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("llama", dtype=torch.bfloat16))
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        resize = plan_hyperclone(checkpoint, HypercloneConfig(factor=2), seed)
        write_resized(checkpoint, resize, tmp_path / name, shard_bytes=10**9)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_only_attention_and_ffns_are_disturbed(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("llama"))
    readers = {}
    for variant in ("noisy", "symmetric"):
        (tmp_path / variant).mkdir()
        resize = plan_hyperclone(checkpoint, HypercloneConfig(factor=2, variant=variant), 0)
        write_resized(checkpoint, resize, tmp_path / variant, shard_bytes=10**9)
        readers[variant] = CheckpointReader(tmp_path / variant)
    for name, slot in checkpoint.slots.items():
        same = torch.equal(readers["noisy"].read(name), readers["symmetric"].read(name))
        assert same == (slot.spec.part not in ("attention", "ffn") or slot.spec.contracts is None), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_diagonal_copies_read_their_own(tmp_path: Path, tiny_checkpoint: Callable[..., Path], family: str) -> None:
    """With two copies of everything, each row of a projection has weights for one copy of its inputs: its own."""
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    resize = plan_hyperclone(checkpoint, HypercloneConfig(factor=2, variant="diagonal"), 0)
    write_resized(checkpoint, resize, tmp_path, shard_bytes=10**9)
    reader = CheckpointReader(tmp_path)
    for name, slot in checkpoint.slots.items():
        if slot.spec.contracts is None or slot.spec.part == "head":
            continue
        where = [Copies.of(each) for each in selection(slot, checkpoint.sizes, resize.takes) if each is not None]
        own = where[0].rank[:, None] == where[1].rank
        assert torch.equal(reader.read(name) != 0, own), name
