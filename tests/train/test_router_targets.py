"""Labels of routers: those of the activations of the same pass, also where activations are computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from torch.nn import functional

from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.policy import at_one_threshold
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.profile.curves import agreements, relative_errors, width_by_cosine
from dynaconv.train.objectives.router_targets import TARGETS, LabelRecorder

Maker = Callable[..., Path]


def test_every_kind_with_an_objective_of_its_own_has_a_target() -> None:
    assert {kind.objective for kind in KINDS.values()} - {"dial", "weights", "none"} == set(TARGETS)


@pytest.mark.parametrize("kind", ["curve", "class"])
def test_labels_are_those_of_the_activations_and_the_trunk_gets_no_gradient(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    config, threshold = FinetuneConfig(router=kind, theta=0.8), 0.5
    recorder, seen = LabelRecorder(TARGETS[kind](config), model.ffns(), threshold=threshold), {}
    hook = model.ffns()[0].register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    with model.call.using(at_one_threshold(threshold, 2, detached=True), recorder):
        model(ids)
    hook.remove()
    recorder.loss().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".router." in name), name
    ffn = model.ffns()[0]
    with torch.no_grad():
        hidden, down = ffn.hidden(seen["x"]).flatten(0, 1), ffn.down_proj.weight
        score = ffn.router(seen["x"]).flatten(0, 1)
        if kind == "curve":
            expected = functional.mse_loss(score, relative_errors(hidden, down, ffn.site.partition.edges)[:, :-1].log())
        else:
            label = width_by_cosine(agreements(hidden, down, ffn.site.partition.edges).cosines, 0.8)
            expected = functional.cross_entropy(score, label - 1)
    losses = [found.loss.item() for found in recorder._found.values()]
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert recorder.loss().item() == pytest.approx(sum(losses) / 2)


@pytest.mark.parametrize("kind", ["curve", "class"])
def test_labels_count_once_where_activations_are_computed_again(tiny_checkpoint: Maker, kind: str) -> None:
    folder, ids = tiny_checkpoint(), token_ids()
    plain, saving = dynamic_model(folder, kind).train(), dynamic_model(folder, kind).train()
    saving.gradient_checkpointing_enable()
    found: list[Any] = []
    for model in (plain, saving):
        recorder = LabelRecorder(TARGETS[kind](FinetuneConfig(router=kind)), model.ffns(), threshold=0.5)
        with model.call.using(at_one_threshold(0.5, 2, detached=True), recorder):
            loss = model(ids, labels=ids, use_cache=False).loss + recorder.loss()
        loss.backward()
        counts = [len(values) for kept in (recorder.widths, recorder.shares) for values in kept.values()]
        gradients = [p.grad for ffn in model.ffns() for p in ffn.router.parameters()]
        found.append((recorder.loss().item(), recorder.accuracies(), counts, gradients))
    assert found[0][:3] == found[1][:3]
    assert found[0][2] == [1] * 4
    assert all(bool(g.any()) and torch.equal(g, other) for g, other in zip(found[0][3], found[1][3], strict=True))


@pytest.mark.parametrize("kind", ["curve", "class"])
def test_a_router_that_says_the_labels_is_always_right(tiny_checkpoint: Maker, kind: str) -> None:
    ffn = dynamic_model(tiny_checkpoint(), kind).ffns()[0]
    target, hidden = TARGETS[kind](FinetuneConfig(router=kind)), torch.randn(40, ffn.site.partition.neurons)
    labels = target.labels(hidden, ffn.down_proj.weight.detach(), ffn.site.partition)
    scores = labels if kind == "curve" else 9.0 * functional.one_hot(labels - 1, 4).float()
    assert bool(target.right(ffn.router, scores, labels, -0.5).all())
    assert not bool(target.right(ffn.router, scores.flip(-1), labels, -0.5).all())
    assert float(target.loss(scores, labels)) < 1e-2 < float(target.loss(scores.flip(-1), labels))
