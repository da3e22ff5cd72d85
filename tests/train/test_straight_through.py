"""Straight-through training: gradients reach every block, and what they share is taken out of the scores'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from torch import Tensor

from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import Full
from dynaconv.dynamic.recorder import Record, Recorder
from dynaconv.train.straight_through import ScoreGradients, StraightThrough

Maker = Callable[..., Path]


def decided(ffn: DynamicFFN, x: Tensor, policy: StraightThrough) -> tuple[Tensor, Tensor]:
    """Weights of the blocks and the scores that they come from, which keep their gradient."""
    decision, recorder = policy.decide(ffn.site, ffn.router, x), ScoreGradients()
    assert decision.choice is not None
    recorder.record(Record(ffn.site, x, decision.choice, decision.scores, None, ffn.cost))
    return decision.choice.mask(ffn.site.blocks), recorder.trained_scores[0]


def test_gate_values_are_hard_and_gradients_reach_blocks_that_are_off(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    ffn, x = model.ffns()[0], torch.randn(2, 5, 64)
    on, _ = decided(ffn, x, StraightThrough(-2.0, 1.0))
    widths = ffn.router.choose(ffn.router(x), -2.0).width()
    assert torch.equal((on.detach() > 0.5).sum(-1), widths)
    assert torch.allclose(on.detach(), on.detach().round(), atol=1e-6)
    for block in range(4):
        ffn.router.zero_grad()
        gradient = torch.zeros_like(on)
        gradient[..., block] = 1.0
        on.backward(gradient, retain_graph=True)
        assert float(ffn.router.output.bias.grad.abs()) > 0, f"block {block} sends no gradient"


def test_scores_of_routed_blocks_get_gradients_whether_they_are_on_or_off(tiny_checkpoint: Maker) -> None:
    ffn = dynamic_model(tiny_checkpoint(), "linear").ffns()[0]
    signal, x = torch.randn(1, 6, 4), torch.randn(1, 6, 64)
    on, trained = decided(ffn, x, StraightThrough(-0.2, 0.7))
    (on * signal).sum().backward()
    score = trained.detach()
    assert torch.equal(on.detach() > 0.5, ffn.router.choose(score, -0.2).mask(4))
    assert 0 < int((on > 0.5).sum()) < on.numel()
    soft = torch.sigmoid((score + 0.2) / 0.7)
    torch.testing.assert_close(trained.grad, signal * soft * (1 - soft) / 0.7)


def test_centering_covers_blocks(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "linear"), token_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    ffns, recorder = model.ffns(), ScoreGradients(mask)
    with model.call.using(StraightThrough(0.0, 1.0), recorder):
        model(ids, attention_mask=mask).logits.square().mean().backward()
    common = torch.stack([recorder.trained_scores[f.site.index].grad[mask].mean() for f in ffns]).mean()
    before = [ffn.router.linear.bias.grad.clone() for ffn in ffns]
    recorder.centering(ffns).backward()
    for ffn, old in zip(ffns, before, strict=True):
        slopes = 1 - (recorder.scores[ffn.site.index][0][mask] / 3.0) ** 2
        torch.testing.assert_close(ffn.router.linear.bias.grad, old - common * slopes.sum(0), rtol=1e-4, atol=1e-9)


def test_straight_through_gradient_is_the_sigmoids(tiny_checkpoint: Maker) -> None:
    ffn = dynamic_model(tiny_checkpoint()).ffns()[0]
    signal, x = torch.randn(1, 6, 4), torch.randn(1, 6, 64)
    on, trained = decided(ffn, x, StraightThrough(-1.5, 0.7))
    (on * signal).sum().backward()
    score = trained.detach()
    soft = torch.sigmoid((score[..., None] + 1.5 - torch.arange(4) - 0.5) / 0.7)
    expected = (signal * soft * (1 - soft) / 0.7).sum(-1)
    assert torch.allclose(trained.grad, expected, atol=1e-6)


def test_centering_takes_the_mean_out_of_router_gradients(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint()), token_ids()
    ffns, recorder = model.ffns(), ScoreGradients()
    with model.call.using(StraightThrough(-2.0, 1.0), recorder):
        model(ids).logits.square().mean().backward()
    before = sum(float(ffn.router.output.bias.grad) for ffn in ffns)
    recorder.centering(ffns).backward()
    # a bias moves all scores of its layer alike up to the bound's slope: what is left of the common part is small
    slopes = [float((1 - (recorder.scores[f.site.index][0] / 3.0) ** 2).mean()) for f in ffns]
    tokens = ids.numel()
    mean = sum(float(s.grad.mean()) for s in recorder.trained_scores.values()) / len(ffns)
    after = sum(float(ffn.router.output.bias.grad) for ffn in ffns)
    assert after == pytest.approx(before - mean * tokens * sum(slopes), rel=1e-3, abs=1e-9)


def test_scored_pass_is_the_full_dial_and_leaves_scores(tiny_checkpoint: Maker) -> None:
    model, ids, recorder = dynamic_model(tiny_checkpoint()), token_ids(), Recorder()
    with torch.no_grad():
        expected = model(ids, dial=1.0).logits
        with model.call.using(Full(scored=True), recorder):
            assert torch.equal(model(ids).logits, expected)
    assert sorted(recorder.scores) == [0, 1]
    assert recorder.scores[0][0].shape == ids.shape


@pytest.mark.parametrize("kind", ["width", "linear"])
def test_frozen_trunk_keeps_the_full_dial(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    routers = [p for ffn in model.ffns() for p in ffn.router.parameters()]
    with torch.no_grad():
        before, low = model(ids, dial=1.0).logits, model(ids, dial=0.5).logits
    optimizer = torch.optim.SGD(routers, lr=5.0)
    with model.call.using(StraightThrough(-2.0 if kind == "width" else 0.0, 1.0)):
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(ids, dial=1.0).logits, before)
        assert not torch.equal(model(ids, dial=0.5).logits, low)
