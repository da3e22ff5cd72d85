"""What a subclone keeps and how it scales it, number by number."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint
from subclones import measured_importance, random_importance, subcloned

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.tensors import read_tensors, write_tensors
from dynaconv.config import SubcloneConfig
from dynaconv.convert.channels import nearest_pairs, query_key_channels
from dynaconv.convert.head_difference import head_pairs
from dynaconv.convert.importance import SUMMARY_FILE, TENSOR_FILE, Importance
from dynaconv.convert.refit import solve_refit
from dynaconv.convert.selection import choose, heads_that_stay, kept_layers
from dynaconv.convert.subclone import plan_subclone
from dynaconv.convert.target import Shape
from dynaconv.errors import ArtifactError, ConfigError, StaleArtifactError


def test_layers_of_little_influence_go_the_middle_first_and_never_the_ends() -> None:
    assert kept_layers(torch.zeros(5), 5) == (0, 1, 2, 3, 4)
    assert kept_layers(torch.tensor([0.0, 5, 5, 5, 0]), 2) == (0, 4)
    assert kept_layers(torch.tensor([0.0, 1, 1, 1, 1, 1, 0]), 6) == (0, 1, 2, 4, 5, 6)
    assert kept_layers(torch.tensor([0.0, 1, 1, 1.0, 0.1, 1, 0]), 6) == (0, 1, 2, 3, 5, 6)


def test_whole_groups_go_then_heads_within_groups() -> None:
    scores = torch.tensor([1.0, 2, 3, 9, 0, 5])  # groups of two: 1.5, 6, 2.5
    source = Shape(1, 8, 8, heads=6, kv_heads=3, head_dim=4)
    groups, heads = heads_that_stay(scores, source, Shape(1, 8, 8, 4, 2, 4), ranked=True)
    assert (groups.tolist(), heads.tolist()) == ([1, 2], [3, 2, 5, 4])
    groups, heads = heads_that_stay(scores, source, Shape(1, 8, 8, 3, 3, 4), ranked=True)
    assert (groups.tolist(), heads.tolist()) == ([1, 2, 0], [3, 5, 1])
    groups, heads = heads_that_stay(scores, source, Shape(1, 8, 8, 2, 1, 4), ranked=False)
    assert (groups.tolist(), heads.tolist()) == ([0], [0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_nearest_pairs_are_the_best_there_are(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    old, new = torch.rand(6, generator=made), torch.rand(3, generator=made)

    def cost(chosen: tuple[int, ...]) -> float:
        return float((old[list(chosen)].log() - new.log()).abs().sum())

    best = min(itertools.permutations(range(6), 3), key=cost)
    found = nearest_pairs(old, new)
    assert cost(tuple(found.tolist())) == pytest.approx(cost(best), abs=1e-5)
    assert len(set(found.tolist())) == 3
    assert nearest_pairs(old, old).tolist() == list(range(6))


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3", "yarn"])
def test_a_head_of_half_the_length_keeps_pairs_of_its_frequencies(scaling: str, tmp_path: Path) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling == "llama3" else {}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", head_dim=16, rope_parameters=rope))
    shorter = checkpoint.family.resized(
        checkpoint.config, {**checkpoint.sizes, **dict.fromkeys(("q_dim", "k_dim", "v_dim"), 8)}, range(2)
    )
    found = query_key_channels(checkpoint, shorter, 8, None)
    assert set(found) == {0, 1}
    assert all(index.tolist() == [0, 2, 4, 6, 8, 10, 12, 14] for index in found.values())


def test_channels_that_are_not_turned_stay_by_what_they_say(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "gpt_neox", heads=2, hidden=32, ffn=16))
    importance = random_importance(checkpoint)
    assert importance.query_key is not None
    kept = choose(checkpoint, importance, Shape(2, 16, 16, 2, 2, 8), ranked=True)
    for layer, index in kept.query_key.items():
        assert index[:2].tolist() == [0, 2]  # one of two pairs: channels 0 and 2 of the 4 that are turned
        assert index[2:].tolist() == (4 + importance.query_key[layer][4:].argsort(descending=True)[:6]).tolist()
    assert choose(checkpoint, importance, Shape(2, 16, 16, 2, 2, 8), ranked=False).query_key[0].tolist() == [
        0,
        2,
        4,
        5,
        6,
        7,
        8,
        9,
    ]


@pytest.mark.parametrize(("family", "head_dim"), [("llama", 7), ("gpt_neox", 12)])
def test_channels_that_cannot_be_turned_in_pairs_are_refused(family: str, head_dim: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", family, heads=2, hidden=32, head_dim=16, kv_heads=1))
    wanted = SubcloneConfig(head_dim=head_dim)
    if family == "gpt_neox":
        wanted.residual, wanted.heads = 2 * head_dim, 2
    with pytest.raises(ConfigError, match=rf"head_dim is {head_dim}, but rotary embeddings turn channels in pairs"):
        plan_subclone(checkpoint, random_importance(checkpoint), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_scaled_by_their_fan_in_and_nothing_else(family: str, tied: bool, tmp_path: Path) -> None:
    """A tied head is scaled by the final norm; Gemma's embeddings take it along, for the model scales them by D."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", family, tied=tied, heads=4, kv_heads=2, head_dim=16))
    importance = random_importance(checkpoint)
    wanted = SubcloneConfig(residual=16, ffn=24, heads=2, kv_heads=1, head_dim=8)
    resize = subcloned(checkpoint, importance, wanted, tmp_path / "scaled")
    wanted.rescale = False
    subcloned(checkpoint, importance, wanted, tmp_path / "plain")
    scaled, plain = Checkpoint.open(tmp_path / "scaled"), Checkpoint.open(tmp_path / "plain")
    assert resize.summary["rescale"]
    scores = 2.0 if family == "gemma2" else math.sqrt(2)  # twice fewer channels; its scale does not follow
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": 2.0 if family == "gemma2" else 1.0,
        "model.norm.weight": 2.0 if tied and family == "llama" else 1.0,
        "lm_head.weight": 2.0,
        f"{layer}input_layernorm.weight": 1.0,
        f"{layer}self_attn.q_proj.weight": 2.0 * scores,
        f"{layer}self_attn.k_proj.weight": 2.0,
        f"{layer}self_attn.v_proj.weight": 2.0,
        f"{layer}self_attn.o_proj.weight": 2.0,  # half the heads of half the channels
        f"{layer}mlp.gate_proj.weight": 2.0,
        f"{layer}mlp.down_proj.weight": 2.0,
    }
    for name, factor in expected.items():
        if name in scaled.slots:
            offset = scaled.slots[name].spec.offset
            torch.testing.assert_close(scaled.reader.read(name) + offset, factor * (plain.reader.read(name) + offset))
    name, kept = f"{layer}mlp.down_proj.weight", choose(checkpoint, importance, Shape.of(scaled), ranked=True)
    rows = checkpoint.reader.read(name)[kept.residual][:, kept.ffn[1]]
    assert torch.equal(plain.reader.read(name), rows)
    assert torch.equal(kept.residual, importance.residual.argsort(descending=True)[:16])


def test_head_pairs_meet_at_the_cut() -> None:
    source, scores = Shape(1, 8, 8, heads=5, kv_heads=5, head_dim=4), torch.tensor([0.0, 4, 3, 1, 2])

    def pairs(kept: int) -> list[tuple[int, int]]:
        return head_pairs(scores, source, Shape(1, 8, 8, kept, kept, 4), ranked=True)

    assert pairs(3) == [(2, 0), (4, 3)]  # ranks 1, 2, 4, 3, 0: the third meets the fourth, the second the fifth
    assert pairs(2) == [(1, 3), (2, 4)]
    assert pairs(5) == []
    grouped = Shape(1, 8, 8, heads=4, kv_heads=2, head_dim=4)
    scores = torch.tensor([1.0, 2, 9, 8])
    assert head_pairs(scores, grouped, Shape(1, 8, 8, 2, 2, 4), ranked=True) == [(2, 3), (1, 0)]
    assert head_pairs(scores, grouped, Shape(1, 8, 8, 2, 1, 4), ranked=True) == []


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("llama", 1), ("phi3", 2), ("phi3", 1)])
def test_head_difference_adds_what_tells_a_kept_head_from_a_pruned_one(family: str, kv_heads: int, tmp_path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", family, heads=2, kv_heads=kv_heads, head_dim=8))
    importance = random_importance(checkpoint)
    wanted = SubcloneConfig(heads=1, kv_heads=1, rescale=False)
    subcloned(checkpoint, importance, wanted, tmp_path / "plain")
    wanted.head_difference = True
    resize = subcloned(checkpoint, importance, wanted, tmp_path / "different")
    assert not resize.warnings
    result, plain = Checkpoint.open(tmp_path / "different"), Checkpoint.open(tmp_path / "plain")
    kept, pruned = importance.heads[0].argsort(descending=True).tolist()
    changed = "qkv" if kv_heads == 2 else "q"
    at = "model.layers.0.self_attn."
    for place, letter in enumerate("qkv"):
        if family == "llama":
            old, new, same = (c.reader.read(f"{at}{letter}_proj.weight") for c in (checkpoint, result, plain))
        else:
            rows = (2 * 8, kv_heads * 8, kv_heads * 8)
            old = checkpoint.reader.read(f"{at}qkv_proj.weight").split(rows)[place]
            new, same = (c.reader.read(f"{at}qkv_proj.weight").split(8)[place] for c in (result, plain))
        if letter in changed:
            heads = old.view(-1, 8, old.shape[1])[:, :, importance.residual.argsort(descending=True)]
            made = 2 * heads[kept] - heads[pruned]
            channels = importance.attention[0].sum(0).argsort(descending=True) if letter == "v" else slice(None)
            torch.testing.assert_close(new, made[channels])
        else:
            assert torch.equal(new, same)
    assert torch.equal(result.reader.read(f"{at}o_proj.weight"), plain.reader.read(f"{at}o_proj.weight"))
    wanted.heads, grouped = 2, Checkpoint.open(make_checkpoint(tmp_path / "g", family, heads=4, kv_heads=2, head_dim=8))
    assert "changes nothing" in plan_subclone(grouped, random_importance(grouped), wanted).warnings[-1]


@pytest.mark.parametrize("count", [1, 7, 1500])
def test_a_refit_is_the_ridge_regression_of_what_was_lost(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaconv.convert.refit.ROWS", 5)
    torch.manual_seed(0)
    x, matrix = torch.randn(count, 12) @ torch.randn(12, 12), torch.randn(3, 12)
    moments, inputs, ridge = x.T @ x / count, torch.tensor([7, 2, 11, 0]), 1e-2
    found = solve_refit(matrix, lambda start, stop: moments[start:stop], inputs, ridge)
    kept = moments[inputs][:, inputs].double()
    strength = ridge * kept.diagonal().mean()
    expected = matrix.double() @ moments[:, inputs].double() @ torch.linalg.inv(kept + strength * torch.eye(4))
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


def test_a_refit_of_inputs_that_are_always_0_leaves_the_matrix() -> None:
    matrix = torch.randn(3, 4)
    found = solve_refit(matrix, lambda start, stop: torch.zeros(stop - start, 4), torch.tensor([2, 0]), 1e-2)
    assert torch.equal(found, matrix[:, [2, 0]])


def test_a_refit_needs_second_moments(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m"))
    with pytest.raises(ArtifactError, match="second moments"):
        plan_subclone(checkpoint, random_importance(checkpoint), SubcloneConfig(ffn=48, refit=True))


def test_the_summary_says_what_was_kept_and_why(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", layers=3))
    importance = random_importance(checkpoint)
    summary = plan_subclone(checkpoint, importance, SubcloneConfig(residual=16, layers=2)).summary
    assert summary["removed_layers"] == [1]
    share = importance.residual.sort(descending=True).values[:16].sum() / importance.residual.sum()
    assert summary["kept_importance"]["residual"] == pytest.approx(float(share))
    assert summary["kept_importance"]["ffn"] == pytest.approx(1)
    assert summary["parent_loss"] == 1.0
    chosen = plan_subclone(checkpoint, importance, SubcloneConfig(params=0.7 * checkpoint.parameters)).summary
    assert chosen["target"] == chosen["candidates"][0]["shape"]
    assert chosen["candidates"][0]["reason"].startswith("loses least importance: keeps ")


def test_importance_of_another_checkpoint_or_damaged_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m"))
    found = measured_importance(checkpoint, tmp_path / "i")
    assert found.measured
    assert found.moments is None
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", ffn=80))
    with pytest.raises(StaleArtifactError, match=r"(?s)another checkpoint.*'ffn': 80.*'ffn': 96"):
        Importance.open(tmp_path / "i", other)
    tensors = read_tensors(tmp_path / "i" / TENSOR_FILE)
    tensors["layers.1.attention_importance"][3, 2] = math.nan
    write_tensors(tmp_path / "i" / TENSOR_FILE, tensors)
    with pytest.raises(ArtifactError, match="is damaged"):
        Importance.open(tmp_path / "i", checkpoint)
    (tmp_path / "i" / SUMMARY_FILE).unlink()
    with pytest.raises(ArtifactError):
        Importance.open(tmp_path / "i", checkpoint)
