"""The model that fine-tuning starts from: its routers are of the kind asked for, and as carve measured them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from transformers import AutoModelForCausalLM

from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.modeling import attach, load
from dynaconv.dynamic.policy import Full
from dynaconv.dynamic.recorder import Recorder
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.train.model import trainable_model
from dynaconv.train.router_kinds import router_kind, router_layout

Maker = Callable[..., Path]


def carved(parent: Path, folder: Path, kind: str, bound: float = 2.0) -> Path:
    """The dense checkpoint with closed-form routers of any opinion, as carving leaves one."""
    routers = RouterLayout(kind, linear=True, rank=0, bound=bound)
    layout = replace(dynamic_model(parent, "none").layout, router=routers, dial=None)
    made = attach(AutoModelForCausalLM.from_pretrained(parent), layout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ffn in made.ffns():
            for parameter in ffn.router.parameters():
                parameter.normal_(0.0, 0.5, generator=generator)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bound", [2.0, 3.0, 7.5])
@pytest.mark.parametrize("kind", ["linear", "curve"])
def test_training_starts_from_the_scores_that_carve_measured(
    tiny_checkpoint: Maker, tmp_path: Path, kind: str, bound: float
) -> None:
    folder = carved(tiny_checkpoint(), tmp_path / "carved", kind, bound)
    models = (load(folder).eval(), trainable_model(folder, FinetuneConfig(router=kind)).eval())
    recorders = (Recorder(), Recorder())
    for model, recorder in zip(models, recorders, strict=True):
        with torch.no_grad(), model.call.using(Full(scored=True), recorder):
            model(token_ids())
    for index, (scores,) in recorders[0].scores.items():
        assert torch.equal(recorders[1].scores[index][0], scores)
        assert float(scores.abs().max()) > 0.5 * bound or kind == "curve", "where the bound shows"
    given = trainable_model(folder, FinetuneConfig(router=kind, bound=1.25))
    assert given.layout.router.bound == 1.25, "a recipe may ask for another one"


@pytest.mark.parametrize(("experts", "kind"), [("nested", "width"), ("routed", "linear")])
def test_auto_takes_the_kind_that_fits_the_experts(experts: str, kind: str) -> None:
    assert router_kind(FinetuneConfig(), experts) is KINDS[kind]


@pytest.mark.parametrize("kind", ["width", "class"])
def test_routers_that_start_silent_have_the_bound_of_their_kind(kind: str) -> None:
    made = router_layout(FinetuneConfig(router=kind), 100, RouterLayout("curve", linear=True, bound=9.0))
    assert (made.kind, made.bound) == (kind, KINDS[kind].default_bound)
    assert router_layout(FinetuneConfig(router="uniform"), 100, RouterLayout("curve", linear=True)) == RouterLayout()


@pytest.mark.parametrize("kind", ["width", "linear", "curve", "class"])
def test_the_rank_is_automatic_or_given_and_0_is_a_linear_router(
    tiny_checkpoint: Maker, tmp_path: Path, kind: str
) -> None:
    folder = carved(tiny_checkpoint(), tmp_path / "carved", "linear" if kind == "linear" else "curve")
    hidden = {}
    for rank in (None, 24, 0):
        routers = [ffn.router for ffn in trainable_model(folder, FinetuneConfig(router=kind, router_rank=rank)).ffns()]
        hidden[rank] = {0 if router.hidden is None else router.hidden.out_features for router in routers}
        for router in routers:
            assert router(torch.zeros(2, 3, 64)).requires_grad
            assert (router.linear is not None) == (rank == 0 or kind != "width")
    assert hidden == {None: {64}, 24: {24}, 0: {0}}
