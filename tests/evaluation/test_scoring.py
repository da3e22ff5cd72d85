"""Scores equal what the stock model says, count real tokens only, and charge what is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.stock import load_dense
from dynaconv.config import DataConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import Static, Uniform
from dynaconv.errors import DataError
from dynaconv.evaluation.baselines import oracle_routers, recorded_widths, shuffled, static_widths
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.perplexity import evaluate_folder
from dynaconv.evaluation.scoring import most_likely, score

Maker = Callable[..., Path]
BATCHES = [Batch(token_ids(3, 10, seed=1)), Batch(token_ids(2, 10, seed=2))]


def test_loss_is_the_stock_models(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [float(stock(b.input_ids, labels=b.input_ids).loss) * (b.tokens - len(b.input_ids)) for b in BATCHES]
    got = score(dynamic_model(folder), BATCHES)
    assert got.loss == pytest.approx(sum(losses) / (50 - 5), rel=1e-5)
    assert got.tokens == 45 and got.active_share == 1.0 and got.widths == (4.0, 4.0)
    assert score(stock, BATCHES).loss == pytest.approx(got.loss, rel=1e-5)


def test_padding_counts_nowhere(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    policy = model.policy(0.5)
    ids = token_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    padded = score(model, [Batch(ids, mask)], policy)
    alone = score(model, [Batch(ids[:1]), Batch(ids[1:, :7])], policy)
    assert padded.loss == pytest.approx(alone.loss, rel=1e-4)
    assert padded.active_share == pytest.approx(alone.active_share)
    assert padded.tokens == alone.tokens == 17


def test_agreement_is_one_with_itself(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    model = dynamic_model(folder)
    wanted = most_likely(load_dense(folder, torch.device("cpu")), BATCHES)
    assert score(model, BATCHES, parent=wanted).agreement == 1.0
    low = score(model, BATCHES, Uniform(0), parent=wanted)
    assert low.agreement is not None and low.agreement < 1.0
    assert low.active_share == 0.0


def test_static_widths_keep_the_total() -> None:
    assert static_widths([1.2, 2.9, 0.4, 3.5], 4) == (1, 3, 0, 4)
    assert static_widths([4.0, 4.0], 4) == (4, 4)
    assert sum(static_widths([0.5, 0.5, 0.5, 0.5], 4)) == 2


def test_baselines_spend_what_they_should(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    policy = model.policy(0.5)
    routed = score(model, BATCHES, policy)
    random = score(model, BATCHES, shuffled(recorded_widths(model, BATCHES, policy), seed=0))
    assert random.active_share == pytest.approx(routed.active_share)
    assert random.widths == pytest.approx(routed.widths)
    assert random.loss != routed.loss
    assert score(model, BATCHES, Static((1, 3))).widths == (1.0, 3.0)


def test_oracle_knows_the_curve_and_leaves_no_trace(tiny_checkpoint: Maker) -> None:
    from dynaconv.profile.curves import relative_errors

    model = dynamic_model(tiny_checkpoint(), "curve")
    names = sorted(model.state_dict())
    routers = [ffn.router for ffn in model.ffns()]
    with oracle_routers(model):
        ffn = model.ffns()[0]
        x = torch.randn(1, 7, 64)
        with torch.no_grad():
            expected = relative_errors(ffn.hidden(x)[0], ffn.down_proj.weight, ffn.site.partition.edges)[:, :-1]
            assert torch.allclose(ffn.router(x)[0].exp(), expected, atol=1e-5)
    assert [ffn.router for ffn in model.ffns()] == routers
    assert sorted(model.state_dict()) == names


def test_oracle_knows_what_each_block_adds(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "linear"), token_ids()
    ffn, seen = model.ffns()[0], {}
    with torch.no_grad(), oracle_routers(model):
        ffn.router.register_forward_hook(lambda m, args, out: seen.update(x=args[0], scores=out))
        model(ids, dial=0.5)
        hidden = ffn.hidden(seen["x"])
        for block, (start, stop) in enumerate(pairwise(ffn.site.partition.edges)):
            added = hidden[..., start:stop] @ ffn.down_proj.weight[:, start:stop].T
            torch.testing.assert_close(seen["scores"][..., block], added.norm(dim=-1).log(), rtol=1e-4, atol=1e-4)


def test_cost_counts_what_the_model_has(tiny_checkpoint: Maker) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tied=True))
    cost = CostModel.of(checkpoint, context=8)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    matrices = sum(p.numel() for p in stock.parameters() if p.dim() == 2)  # tied: the embedding is the head
    attention = 4 * checkpoint.layers * checkpoint.sizes["q_head"] * checkpoint.sizes["v_dim"] * 8
    assert cost.flops_per_token(1.0) == 2 * matrices + attention
    ffn = 3 * 64 * 96 * 2
    assert cost.flops_per_token(1.0) - cost.flops_per_token(0.5) == ffn
    assert cost.bytes_per_token(1.0) - cost.bytes_per_token(0.5) == 4 * ffn / 2
    everything = sum(p.numel() for p in stock.parameters())
    cache = 2 * 2 * 2 * 16 * 8
    assert cost.bytes_per_token(1.0) == 4 * (everything + 64 + cache)


def test_folder_is_scored_with_its_record(tiny_checkpoint: Maker, tmp_path: Path, text_file: Path) -> None:
    model = dynamic_model(folder := tiny_checkpoint())
    model.save_pretrained(tmp_path / "saved")
    for path in folder.glob("tokenizer*"):
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    data = DataConfig(train=[str(text_file)], sequence_length=64)
    full = evaluate_folder(tmp_path / "saved", None, data, tokens=1000)
    dense = evaluate_folder(folder, None, data, tokens=1000)
    assert full["dial"] == "full" and full["loss"] == pytest.approx(dense["loss"], rel=1e-5)
    assert dense["tokens"] == 16 * 63 and dense["dial"] is None
    assert dense["data_digest"] and dense["sequence_length"] == 64
    with pytest.raises(DataError):
        evaluate_folder(folder, None, replace(data, sequence_length=4096))
