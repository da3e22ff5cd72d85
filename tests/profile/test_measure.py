"""What is measured of a layer equals what the stock model shows to hooks, and padding never counts."""

import math
from itertools import pairwise

import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from dynaconv.arch.blocks import nested_partition, routed_partition
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.profile.accumulators import LOWEST
from dynaconv.profile.clusters import expert_order
from dynaconv.profile.curves import log_errors, log_norms, relative_errors
from dynaconv.profile.measure import Sample, capture_ffn, measure_layer, ranking
from dynaconv.profile.streaming import LayerStream

CPU = torch.device("cpu")
NESTED, ROUTED = nested_partition(96, 4), routed_partition(96, 24)


def measured(
    folder, sample: Sample, order: str = "importance", weights=None, experts: str = "nested", dtype=None
) -> list[dict[str, torch.Tensor]]:
    stream = LayerStream(Checkpoint.open(folder), CPU, dtype=dtype)
    hidden = stream.embed(sample.batches)
    return [
        measure_layer(
            stream,
            i,
            hidden,
            sample,
            order=order,
            partition=ROUTED if experts == "routed" else NESTED,
            experts=experts,
            weights=None if weights is None else weights[i],
        )
        for i in range(stream.checkpoint.layers)
    ]


def by_hooks(folder, text: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """FFN inputs and activations of real tokens of the stock model, layer by layer."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.family.ffn
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(checkpoint.layers)]
    for batch in text:
        real = torch.ones_like(batch.input_ids).bool() if batch.attention_mask is None else batch.attention_mask
        real = real.flatten()
        for i, parts in enumerate(seen):
            with capture_ffn(stock.get_submodule(spec.path.format(layer=i)), spec) as seen_ffn, torch.no_grad():
                stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            parts.append(tuple(seen_ffn.inputs[name].flatten(0, -2)[real] for name in ("x", "hidden")))
    return [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in seen]


def down_weights(folder) -> list[torch.Tensor]:
    """The down projection (D, F) of every layer, as the layer computes: outputs of unit vectors."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(folder)
    spec, neurons = checkpoint.family.ffn, checkpoint.sizes["ffn"]
    downs = [stock.get_submodule(f"{spec.path.format(layer=i)}.{spec.down}") for i in range(checkpoint.layers)]
    with torch.no_grad():
        return [(down(torch.eye(neurons)) - down(torch.zeros(1, neurons))).T for down in downs]


def documents() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randint(0, 257, (length,)) for length in (24, 9, 17, 2, 24, 13)]


def padded(rows: list[torch.Tensor], length: int = 24) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, document in zip(ids, rows, strict=True):
        row[: len(document)] = document
    return Batch(ids, torch.arange(length) < torch.tensor([len(d) for d in rows])[:, None])


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_what_hooks_on_the_stock_model_see(family: str, tiny_checkpoint) -> None:
    folder = tiny_checkpoint(family)
    text = [padded(documents()[:4]), padded(documents()[4:])]
    sample = Sample.of(text, 1.0)
    predicts = torch.cat([mask[batch.attention_mask] for mask, batch in zip(sample.curve_masks, text, strict=True)])
    for found, (x, h), down in zip(measured(folder, sample), by_hooks(folder, text), down_weights(folder), strict=True):
        torch.testing.assert_close(found["activation"], h.abs().mean(0))
        torch.testing.assert_close(found["importance"], h.abs().mean(0) * down.norm(dim=0), rtol=1e-5, atol=1e-6)
        assert torch.equal(found["order"], found["importance"].argsort(descending=True, stable=True))
        x, h = x[predicts], h[predicts]
        errors = relative_errors(h, down, NESTED.edges, found["order"])
        features = torch.cat([x, torch.ones(len(x), 1)], 1)
        torch.testing.assert_close(found["curve_mean"], errors.mean(0), rtol=1e-5, atol=1e-6)
        close = {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(found["feature_gram"], features.T @ features, **close)
        torch.testing.assert_close(found["feature_target"], features.T @ log_errors(errors), **close)
        ranks = [math.ceil(share * len(errors)) - 1 for share in (0.1, 0.5, 0.9)]
        quantiles = errors.sort(0).values[ranks]
        quantiles[:, 1:-1].clamp_(min=LOWEST)  # smaller ones, such as the 0 of a dead ReLU, are counted there
        torch.testing.assert_close(found["curve_quantiles"], quantiles, rtol=0.007, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_experts_equal_what_hooks_see(family: str, tiny_checkpoint) -> None:
    folder, edges = tiny_checkpoint(family), ROUTED.edges
    text = [padded(documents()[:4]), padded(documents()[4:])]
    sample = Sample.of(text, 1.0)
    predicts = torch.cat([mask[batch.attention_mask] for mask, batch in zip(sample.curve_masks, text, strict=True)])
    by_layer = zip(
        measured(folder, sample, experts="routed"), by_hooks(folder, text), down_weights(folder), strict=True
    )
    for found, (x, h), down in by_layer:
        sizes = down.norm(dim=0)
        features = (h.abs() * sizes).t()  # there are fewer tokens than are sampled
        assert torch.equal(found["order"], expert_order(features, h.abs().mean(0) * sizes, ROUTED))
        x, h, down = x[predicts], h[predicts][:, found["order"]], down[:, found["order"]]
        added = torch.stack([h[:, a:b] @ down[:, a:b].T for a, b in pairwise(edges)], 1)
        targets = log_norms(added.norm(dim=-1))
        features = torch.cat([x, torch.ones(len(x), 1)], 1)
        torch.testing.assert_close(found["feature_target"], features.T @ targets, rtol=1e-3, atol=1e-2)
        falling = added.norm(dim=-1).argsort(dim=1, descending=True)
        best = added.gather(1, falling[..., None].expand_as(added))[:, :2].sum(1)
        lost = (best - added.sum(1)).norm(dim=-1) / added.sum(1).norm(dim=-1)
        torch.testing.assert_close(found["curve_mean"][2], lost.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", ["nested", "routed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_counts(family: str, experts: str, tiny_checkpoint) -> None:
    folder = tiny_checkpoint(family)
    together = Sample.of([padded(documents(), 40)], 1.0)
    apart = Sample.of([Batch(document[None]) for document in documents()], 1.0)
    assert (together.tokens, together.curve_tokens) == (apart.tokens, apart.curve_tokens)
    assert together.tokens == sum(len(document) for document in documents())
    both = (measured(folder, sample, experts=experts) for sample in (together, apart))
    for one, other in zip(*both, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", ["nested", "routed", "neurons"])
def test_statistics_do_not_depend_on_how_many_tokens_pass_at_once(experts: str, tiny_checkpoint) -> None:
    folder, whole = tiny_checkpoint(), Sample.of([padded(documents()), padded(documents()[:3])], 0.7)
    pieces = whole.in_pieces(48)
    assert [len(batch.input_ids) for batch in pieces.batches] == [2, 2, 2, 2, 1]
    assert [len(batch.input_ids) for batch in whole.in_pieces(1).batches] == [1] * 9
    for one, other in zip(*(measured(folder, sample, experts=experts) for sample in (whole, pieces)), strict=True):
        for name in one.keys() - {"level", "up_mean"}:  # those count one token in some, of each piece
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", ["nested", "neurons"])
def test_statistics_in_bf16_are_nearly_those_in_float32(experts: str, tiny_checkpoint) -> None:
    folder, sample = tiny_checkpoint(dtype=torch.bfloat16), Sample.of([padded(documents())], 1.0)
    both = (measured(folder, sample, experts=experts, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(*both, strict=True):
        for name in one.keys() - {"order", "curve_quantiles"}:
            assert other[name].dtype == torch.float32
            assert float((other[name] - one[name]).abs().max() / one[name].abs().max()) < 0.02, name


def test_curves_are_measured_on_the_first_share_of_the_windows() -> None:
    text = [Batch(torch.zeros(4, 6, dtype=torch.int64)) for _ in range(3)]
    masks = Sample.of(text, 0.5).curve_masks
    assert [mask.any(dim=1).tolist() for mask in masks] == [[True] * 4, [True, True, False, False], [False] * 4]
    assert all(not bool(mask[:, -1].any()) for mask in masks)
    assert Sample.of(text, 0.5).curve_tokens == 6 * 5
    assert Sample.of(text, 1e-9).curve_tokens == 5


def test_ranking_is_stable_and_can_be_none() -> None:
    importance = torch.tensor([1.0, 3.0, 1.0, 5.0, 3.0])
    assert ranking(importance, "importance").tolist() == [3, 1, 4, 0, 2]
    assert ranking(importance, "none").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="importance, none"):
        ranking(importance, "alphabetical")


def test_weights_shift_the_regression_target_only(tiny_checkpoint) -> None:
    folder, sample = tiny_checkpoint(), Sample.of([padded(documents())], 1.0)
    weights = torch.rand(2, sample.curve_tokens) + 0.5
    plain, weighted = measured(folder, sample), measured(folder, sample, weights=weights)
    for layer, (one, other) in enumerate(zip(plain, weighted, strict=True)):
        shift = other["feature_target"] - one["feature_target"]
        bias = weights[layer].log().sum().expand(NESTED.blocks)  # the row of the constant feature
        torch.testing.assert_close(shift[-1], bias, rtol=1e-4, atol=1e-3)
        for name in one.keys() - {"feature_target"}:
            assert torch.equal(one[name], other[name])


def test_ordering_pays_on_a_real_model(shared) -> None:
    """At half width a trained model loses less with its neurons in order of importance."""
    from dynaconv.data.tokenizer import load_tokenizer

    folder = shared / "models" / "base-code-4m"
    if not folder.is_dir():
        pytest.skip("no ../shared/models/base-code-4m")
    text = (shared / "data" / "python-valid.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(load_tokenizer(folder)(text, verbose=False)["input_ids"])[: 16 * 256]
    sample, partition = Sample.of([Batch(ids.view(16, 256))], 0.5), nested_partition(1024, 8)
    half = {}
    for order in ("importance", "none"):
        stream = LayerStream(Checkpoint.open(folder), CPU)
        hidden = stream.embed(sample.batches)
        curves = [
            measure_layer(stream, i, hidden, sample, order=order, partition=partition)["curve_mean"]
            for i in range(stream.checkpoint.layers)
        ]
        half[order] = float(torch.stack(curves)[:, 4].mean())
    assert half["importance"] < 0.9 * half["none"], half
