"""Objectives: when each weighs what, which passes follow from them, who gets gradients, and how one is added."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model, token_ids
from torch import Tensor
from torch.nn import functional

from dynaconv.config import FinetuneConfig, LossConfig, LossesConfig, RunConfig
from dynaconv.data.windows import Batch, Windows, training_batch
from dynaconv.dynamic.policy import Uniform
from dynaconv.ranks import Ranks
from dynaconv.train.engine import TorchEngine
from dynaconv.train.estimate import pass_count
from dynaconv.train.micro_batch import MicroBatch
from dynaconv.train.objectives.base import Objective, Outcome, cross_entropy, kl_divergence, log_probabilities
from dynaconv.train.objectives.registry import objectives, weight_at, weighted
from dynaconv.train.objectives.validity import problems_of_losses
from dynaconv.train.stage import FinetuneStage
from dynaconv.train.step import Trainer
from dynaconv.train.step_plan import StepPlan

Maker = Callable[..., Path]
CONFIG = FinetuneConfig(**SELF_TAUGHT, batch_size=4, uniform_share=0.0, statistics_every=0)
WINDOWS = Windows(torch.arange(1, 60).repeat(30).int(), 16)


def only(**weights: float) -> LossesConfig:
    return LossesConfig(**{name: LossConfig(weights.get(name, 0.0)) for name in LossesConfig.__dataclass_fields__})


def trainer(folder: Path, config: FinetuneConfig, parent: Any = None) -> Trainer:
    kind = {"uniform": "none", "auto": "width"}.get(config.router, config.router)
    engine = TorchEngine(dynamic_model(folder, kind), config, Ranks.single("cpu"))
    return Trainer(engine, config, WINDOWS, steps=10, seed=3, parent=parent)


def whole(batch: Batch) -> MicroBatch:
    return MicroBatch(batch, {"scored": 1.0, "all": 1.0}, last=True)


def test_a_loss_is_off_then_rises_then_stays() -> None:
    loss = LossConfig(weight=2.0, after=0.2, ramp=0.4)
    found = [weight_at(loss, step, 10) for step in range(10)]
    assert found == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert [weight_at(LossConfig(0.5), step, 10) for step in range(10)] == [0.5] * 10
    assert [weight_at(LossConfig(1.0, after=0.5), step, 10) for step in range(10)] == [0.0] * 5 + [1.0] * 5
    weights = {name: getattr(LossesConfig(), name).weight for name in objectives(FinetuneConfig())}
    assert weights == {
        "full": 0.4,
        "dial": 0.0,
        "distill": 0.8,
        "distill_full": 0.8,
        "router": 1.0,
        "consistency": 0.0,
    }
    assert list(weighted(FinetuneConfig())) == ["full", "distill", "distill_full"], (
        "routers have no labels to learn from"
    )
    assert list(weighted(FinetuneConfig(router="curve"))) == ["full", "distill", "distill_full", "router"]


def test_every_loss_is_logged_by_a_name_of_its_own() -> None:
    known = objectives(FinetuneConfig(router="curve"))
    assert len({objective.metric for objective in known.values()}) == len(known) == 6
    assert all(objective.needs and objective.student in objective.needs for objective in known.values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2, 2, 0)),
        ({"router": "linear"}, (2, 2, 0)),
        ({"router": "class"}, (2, 2, 0)),
        ({"router": "class", "losses": only(full=0.5, router=1.0)}, (2, 1, 0)),
        ({"router": "class", "losses": only(router=1.0), "trainable": "routers"}, (2, 0, 0)),
        ({"router": "uniform"}, (2, 2, 0)),
        ({"router": "uniform", "losses": only(full=1.0)}, (1, 1, 0)),
        ({"teacher": "parent"}, (2, 2, 1)),
        ({"losses": only(full=0.5, distill=0.5, consistency=0.5)}, (3, 2, 0)),
        ({"losses": only(full=0.5, distill=0.5, distill_full=0.5)}, (2, 2, 1)),
        ({"losses": only(dial=1.0)}, (2, 1, 0)),
        ({"router": "uniform", "losses": only(dial=0.5, distill=0.5), "teacher": "parent"}, (1, 1, 1)),
        ({"trainable": "routers"}, (2, 1, 0)),
        ({"full_share": 1.0}, (1, 1, 0)),
    ],
)
def test_passes_are_counted_as_they_are_run(
    tiny_checkpoint: Maker, changes: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    folder, config = tiny_checkpoint(), replace(CONFIG, **changes)
    parent = dynamic_model(folder, "none").requires_grad_(False)
    made, ran = trainer(folder, config, parent), {"forward": 0, "backward": 0, "parent": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda *args: ran.update({name: ran[name] + 1})

    made.engine.network.register_forward_hook(count("forward"))
    made.engine.network.lm_head.register_full_backward_hook(count("backward"))  # not the centering of scores
    parent.register_forward_hook(count("parent"))
    made.step(1)
    counted = pass_count(config)
    assert (ran["forward"], ran["backward"], ran["parent"]) == expected
    assert (counted.forward, counted.backward, counted.parent) == expected


def test_every_loss_has_its_curve(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    parent = dynamic_model(folder, "none").requires_grad_(False)
    losses = only(full=0.3, dial=0.2, distill=0.4, distill_full=0.1, router=1.0, consistency=0.3)
    config = replace(CONFIG, router="curve", teacher="parent", losses=losses)
    found = trainer(folder, config, parent).step(0)
    names = {"loss_full", "loss_dial", "kl_dial", "kl_full", "loss_router", "kl_consistency"}
    assert names <= set(found)
    assert found["kl_full"] == pytest.approx(0.0, abs=1e-5), "nothing is trained yet"
    assert found["kl_dial"] > 1e-3 and found["kl_consistency"] > 1e-4


def test_consistency_pulls_the_lower_dial_towards_the_higher(tiny_checkpoint: Maker) -> None:
    """The gradient is that of KL(higher || lower) with the higher held still."""
    folder, config = tiny_checkpoint(ffn=128), replace(CONFIG, router="uniform", losses=only(consistency=1.0))
    made, twin = trainer(folder, config), dynamic_model(folder, "none")
    plan = StepPlan.of(config, 3, 0, 10)
    plan = replace(plan, drawn=replace(plan.drawn, budget=0.25, higher=0.75))
    batch = training_batch(WINDOWS, 0, 4, 3)
    found = made.accumulate(whole(batch), plan)
    outputs = []
    for width in (1, 3):
        with twin.call.using(Uniform(width)):
            outputs.append(log_probabilities(twin(batch.input_ids).logits, batch.predicted))
    expected = (outputs[1].detach().exp() * (outputs[1].detach() - outputs[0])).sum(-1).mean()
    expected.backward()
    assert found["kl_consistency"] == pytest.approx(expected.item(), rel=1e-4)
    ours = dict(made.engine.network.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[name].grad, parameter.grad, atol=1e-5), name


@pytest.mark.parametrize("trainable", ["all", "ffn", "routers"])
@pytest.mark.parametrize("router", ["width", "linear", "curve", "class"])
def test_routers_get_gradient_and_the_parent_none(tiny_checkpoint: Maker, trainable: str, router: str) -> None:
    folder = tiny_checkpoint()
    parent = dynamic_model(folder, "none").requires_grad_(False)
    config = replace(CONFIG, router=router, trainable=trainable, teacher="parent")
    made, seen = trainer(folder, config, parent), []
    made.engine.step = lambda factor: (
        seen.append(  # type: ignore[method-assign]
            [p.grad.abs().sum().item() for ffn in made.engine.network.ffns() for p in ffn.router.parameters()]
        )
        or {"gradient_norm": 0.0}
    )
    made.step(0)
    assert all(value > 0 for value in seen[0])
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_a_full_step_trains_the_full_dial_only(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    made, dense = trainer(folder, replace(CONFIG, full_share=1.0)), trainer(folder, CONFIG)
    found = made.step(0)
    assert found["share_asked"] == found["share_spent"] == 1.0 and "kl_dial" not in found
    assert made.controller.error == 0.0, "no budget was asked for, so none was missed"
    dense.step(0)
    assert dense.controller.error != 0.0


def test_a_batch_without_scored_tokens_is_no_loss() -> None:
    logits = torch.randn(2, 6, 9, requires_grad=True)
    found = log_probabilities(logits, torch.zeros(2, 5, dtype=torch.bool))
    total = cross_entropy(found, torch.zeros(0, dtype=torch.int64)) + kl_divergence(found, found)
    total.backward()
    assert total.item() == 0.0 and not logits.grad.any()


def test_what_is_not_scored_does_not_count(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    ids = torch.arange(1, 33).view(2, 16)
    scored = torch.ones(2, 16, dtype=torch.bool)
    scored[:, :8] = False
    config, found = replace(CONFIG, router="uniform"), []
    for batch in (Batch(ids, loss_mask=scored), Batch(ids)):
        made = trainer(folder, config)
        found.append(made.accumulate(whole(batch), StepPlan.of(config, 3, 0, 10)))
    model = dynamic_model(folder, "none")
    with torch.no_grad():
        each = functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
    assert found[0]["loss_full"] == pytest.approx(each[:, 7:].mean().item(), rel=1e-5)
    assert found[1]["loss_full"] == pytest.approx(each.mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("router", ["width", "linear", "curve", "class"])
def test_padding_counts_nowhere(tiny_checkpoint: Maker, router: str, family: str) -> None:
    """More padding changes neither threshold, share, losses nor gradients."""
    folder, config = tiny_checkpoint(family), replace(CONFIG, router=router, statistics_every=1)
    ids = torch.arange(1, 33).view(2, 16)
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, 10:] = False
    found: list[dict[str, float]] = []
    gradients: list[dict[str, Tensor]] = []
    for more in (0, 8):
        batch = Batch(functional.pad(ids, (0, more)), functional.pad(real, (0, more)))
        made = trainer(folder, config)
        found.append(made.accumulate(whole(batch), StepPlan.of(config, 3, 0, 10)))
        gradients.append({name: p.grad for name, p in made.engine.network.named_parameters() if p.grad is not None})
    assert "layer1/width_mean" in found[0] and set(found[0]) == set(found[1])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-3, atol=1e-6), name


class Entropy(Objective):
    """Entropy at the sampled dial above that at a second dial: what the file of a new loss would hold."""

    metric = "entropy"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"dial", "second"})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        entropies = [-(found.exp() * found).sum(-1).mean() for found in (outcome["dial"], outcome["second"].detach())]
        return entropies[0] - entropies[1]


@dataclass
class MoreLosses(LossesConfig):
    entropy: LossConfig = field(default_factory=LossConfig, metadata={"objective": f"{__name__}:Entropy"})  # the line


def test_a_new_objective_is_one_file_and_one_line(tiny_checkpoint: Maker) -> None:
    """What a step runs, what is estimated and what a recipe may say all follow."""
    losses = MoreLosses(*(LossConfig(0.0) for _ in range(6)), entropy=LossConfig(2.0))
    config, folder = replace(CONFIG, losses=losses), tiny_checkpoint()
    assert list(weighted(config)) == ["entropy"]
    plan = StepPlan.of(config, 3, 0, 10)
    assert plan.passes == {"full", "second", "dial"}, "the full dial for the threshold that the budget is solved at"
    counted = pass_count(config)
    assert (counted.forward, counted.backward, counted.parent) == (3, 1, 0)
    assert FinetuneStage().problems(RunConfig(finetune=config)) == []
    losses.entropy.weight = 0.0
    (wrong,) = FinetuneStage().problems(RunConfig(finetune=config))
    assert "dial, distill, consistency or entropy" in wrong
    losses.entropy.weight = 2.0
    made = trainer(folder, config)
    found = made.accumulate(whole(training_batch(WINDOWS, 0, 4, 3)), plan)
    assert found["entropy"] != 0.0
    gradients = [p.grad for ffn in made.engine.network.ffns() for p in ffn.router.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("router", ["auto", "uniform"])
def test_losses_that_leave_nothing_to_learn_from(router: str) -> None:
    config = replace(FinetuneConfig(), router=router)
    config.losses.distill.weight = 0.0
    wrong = list(problems_of_losses(config))
    assert len(wrong) == (router == "auto"), "dense training needs no dial; a router does"
    config.losses.full.weight = config.losses.distill_full.weight = 0.0
    (sentence,) = problems_of_losses(config)
    assert "nothing to learn from" in sentence


def test_a_step_needs_something_to_train() -> None:
    config = FinetuneConfig()
    losses = config.losses
    losses.full.after = losses.distill.after = losses.distill_full.after = 0.5
    (sentence,) = problems_of_losses(config)
    assert "from the first step on" in sentence
    losses.full.after = 0.0
    assert list(problems_of_losses(config)) == []
    losses.full.weight, losses.distill_full.weight, losses.distill.after = 0.0, 0.0, 0.0
    assert list(problems_of_losses(config)) == []
    config.full_share = 0.2
    (sentence,) = problems_of_losses(config)
    assert sentence.startswith("finetune.full_share is 0.2; at the full dial nothing is trained")
    losses.full.weight, losses.full.after = 0.4, 0.5
    assert list(problems_of_losses(config)) == [sentence], "an early step at the full dial would have no loss"
    losses.full.after = 0.0
    assert list(problems_of_losses(config)) == []


def test_routers_may_learn_from_labels_alone() -> None:
    config = FinetuneConfig(router="class", trainable="routers", losses=only(router=1.0))
    assert list(problems_of_losses(config)) == []
    config.losses.router.after = 0.1
    assert len(list(problems_of_losses(config))) == 1, "the first steps would have no gradient"
    config.losses.router.after, config.trainable = 0.0, "all"
    (sentence,) = problems_of_losses(config)
    assert "leave the weights nothing to learn from" in sentence


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trainable": "routers", "router": "uniform"}, "finetune.trainable"),
        ({"router": "class", "losses": only(full=0.5, distill=0.5)}, "finetune.losses.router.weight"),
    ],
)
def test_losses_and_routers_that_do_not_go_together(changes: dict[str, Any], named: str) -> None:
    (sentence,) = problems_of_losses(replace(FinetuneConfig(), **changes))
    assert sentence.startswith(f"{named} is ")
    config = RunConfig(experts="nested", finetune=replace(FinetuneConfig(), **changes))
    assert FinetuneStage().problems(config) == [sentence]


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
    assert torch.allclose(kl_divergence(got, taught), kl, atol=1e-5)
    assert float(kl_divergence(taught, taught)) == pytest.approx(0.0, abs=1e-5)
