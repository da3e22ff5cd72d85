"""What routers learn from: gradients reach every block, the budget is met, labels are the measured ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynaconv.dynamic.context import recording, using
from dynaconv.train.losses import cross_entropy, divergence, log_probabilities
from dynaconv.train.routing import Gated, Labelled, Scored, spent_share
from dynamic_models import dynamic_model, token_ids
from torch.nn import functional

from dynaconv.profile.curves import agreements, relative_errors, width_by_cosine

Maker = Callable[..., Path]


def test_gate_values_are_hard_and_gradients_reach_blocks_that_are_off(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    ffn, policy = model.ffns()[0], Gated(level=2.0, temperature=1.0)
    x = torch.randn(2, 5, 64)
    on = policy.decide(ffn, x)
    widths = ffn.router.widths(ffn.router(x), 2.0)
    assert torch.equal((on.detach() > 0.5).sum(-1), widths)
    assert torch.allclose(on.detach(), on.detach().round(), atol=1e-6)
    for block in range(4):
        ffn.router.zero_grad()
        gradient = torch.zeros_like(on)
        gradient[..., block] = 1.0
        on.backward(gradient, retain_graph=True)
        assert float(ffn.router.output.bias.grad.abs()) > 0, f"block {block} sends no gradient"


def test_scores_of_routed_blocks_get_gradients_whether_they_are_on_or_off(tiny_checkpoint: Maker) -> None:
    ffn = dynamic_model(tiny_checkpoint(), "blocks").ffns()[0]
    policy, signal, x = Gated(level=0.2, temperature=0.7), torch.randn(1, 6, 4), torch.randn(1, 6, 64)
    on = policy.decide(ffn, x)
    (on * signal).sum().backward()
    score = policy.scores[0].detach()
    assert torch.equal(on.detach() > 0.5, ffn.router.choose(score, 0.2))
    assert 0 < int((on > 0.5).sum()) < on.numel()
    soft = torch.sigmoid((score + 0.2) / 0.7)
    torch.testing.assert_close(policy.scores[0].grad, signal * soft * (1 - soft) / 0.7)


def test_centring_covers_blocks(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "blocks"), token_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    ffns, policy = model.ffns(), Gated(0.0, 1.0, mask)
    with using(policy):
        model(ids, attention_mask=mask).logits.square().mean().backward()
    common = torch.stack([policy.scores[f.layer].grad[mask].mean() for f in ffns]).mean()
    before = [ffn.router.linear.bias.grad.clone() for ffn in ffns]
    policy.centre(ffns).backward()
    for ffn, old in zip(ffns, before, strict=True):
        slopes = 1 - (policy.scores[ffn.layer].detach()[mask] / 3.0) ** 2
        torch.testing.assert_close(ffn.router.linear.bias.grad, old - common * slopes.sum(0), rtol=1e-4, atol=1e-9)


def test_straight_through_gradient_is_the_sigmoids(tiny_checkpoint: Maker) -> None:
    ffn = dynamic_model(tiny_checkpoint()).ffns()[0]
    policy, signal = Gated(level=1.5, temperature=0.7), torch.randn(1, 6, 4)
    x = torch.randn(1, 6, 64)
    (policy.decide(ffn, x) * signal).sum().backward()
    score = policy.scores[0].detach()
    soft = torch.sigmoid((score[..., None] + 1.5 - torch.arange(4) - 0.5) / 0.7)
    expected = (signal * soft * (1 - soft) / 0.7).sum(-1)
    assert torch.allclose(policy.scores[0].grad, expected, atol=1e-6)


def test_centring_takes_the_mean_out_of_router_gradients(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint()), token_ids()
    ffns, policy = model.ffns(), Gated(2.0, 1.0)
    with using(policy):
        model(ids).logits.square().mean().backward()
    before = sum(float(ffn.router.output.bias.grad) for ffn in ffns)
    policy.centre(ffns).backward()
    # a bias moves all scores of its layer alike up to the bound's slope: what is left of the common part is small
    slopes = [float((1 - (policy.scores[f.layer].detach() / 3.0) ** 2).mean()) for f in ffns]
    tokens = ids.numel()
    mean = sum(float(s.grad.mean()) for s in policy.scores.values()) / len(ffns)
    after = sum(float(ffn.router.output.bias.grad) for ffn in ffns)
    assert after == pytest.approx(before - mean * tokens * sum(slopes), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", ["curve", "class"])
def test_labels_are_those_of_the_activations_and_the_trunk_gets_no_gradient(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    policy = Labelled(level=0.5, theta=0.8)
    seen = {}
    hook = model.ffns()[0].register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    with using(policy):
        model(ids)
    hook.remove()
    policy.loss().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".router." in name), name
    ffn = model.ffns()[0]
    with torch.no_grad():
        hidden, down = ffn.hidden(seen["x"]).flatten(0, 1), ffn.down_proj.weight
        score = ffn.router(seen["x"]).flatten(0, 1)
        if kind == "curve":
            expected = functional.mse_loss(score, relative_errors(hidden, down, ffn.edges)[:, :-1].log())
        else:
            label = width_by_cosine(agreements(hidden, down, ffn.edges).cosines, 0.8)
            expected = functional.cross_entropy(score, label - 1)
    assert policy.losses[0].item() == pytest.approx(float(expected), rel=1e-4)


def test_scored_pass_is_the_full_dial_and_leaves_scores(tiny_checkpoint: Maker) -> None:
    model, ids, policy = dynamic_model(tiny_checkpoint()), token_ids(), Scored()
    with torch.no_grad():
        expected = model(ids, dial=1.0).logits
        with using(policy):
            assert torch.equal(model(ids).logits, expected)
    assert sorted(policy.scores) == [0, 1]
    assert policy.scores[0].shape == ids.shape


@pytest.mark.parametrize("kind", ["gate", "blocks"])
def test_frozen_trunk_keeps_the_full_dial(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    routers = [p for ffn in model.ffns() for p in ffn.router.parameters()]
    with torch.no_grad():
        before, low = model(ids, dial=1.0).logits, model(ids, dial=0.5).logits
    optimizer = torch.optim.SGD(routers, lr=5.0)
    with using(Gated(2.0 if kind == "gate" else 0.0, 1.0)):
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(ids, dial=1.0).logits, before)
        assert not torch.equal(model(ids, dial=0.5).logits, low)


def test_spent_share_counts_neurons_not_blocks(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint(ffn=67))
    with torch.no_grad(), recording() as trace:
        model(token_ids(), dial=0.5)
    widths = {layer: found[0] for layer, found in trace.widths.items()}
    edges = model.layout.edges
    expected = sum(edges[int(w)] for found in widths.values() for w in found.flatten()) / edges[-1] / (2 * 24)
    assert spent_share(widths, edges) == pytest.approx(expected)


def test_losses_count_real_tokens_only() -> None:
    ids, logits = token_ids(2, 6), torch.randn(2, 6, 257)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    teacher = torch.randn(2, 6, 257)
    expected = torch.cat([logits[0, :5], logits[1, :2]])
    wanted = torch.cat([ids[0, 1:], ids[1, 1:3]])
    got, taught = log_probabilities(logits, mask), log_probabilities(teacher, mask)
    assert torch.allclose(cross_entropy(got, ids[:, 1:][mask]), functional.cross_entropy(expected, wanted))
    full = torch.cat([teacher[0, :5], teacher[1, :2]])
    kl = (full.softmax(-1) * (full.log_softmax(-1) - expected.log_softmax(-1))).sum(-1).mean()
    assert torch.allclose(divergence(got, taught), kl, atol=1e-5)
    assert float(divergence(taught, taught)) == pytest.approx(0.0, abs=1e-5)
