"""What fine-tuning is said to hold: against what a pass really keeps, and as arithmetic over engines and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model, neurons_model, token_ids
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import EngineConfig, FinetuneConfig, LossConfig, LossesConfig, RunConfig
from dynaconv.dynamic.policy import ByThreshold, Full, Policy
from dynaconv.ranks import Ranks
from dynaconv.train import engine as engines
from dynaconv.train.deepspeed_config import BUCKET
from dynaconv.train.estimate import finetune_estimate, graph_of
from dynaconv.train.memory_cost import HEAP_BLOCK, WORD, Graph, Weights, held
from dynaconv.train.straight_through import StraightThrough
from dynaconv.train.trainable import choose

Maker = Callable[..., Path]
MODEL = Weights(all=8 * BUCKET, trained=8 * BUCKET, largest=BUCKET // 2, head=BUCKET // 2, tied=True)
ENGINES = {
    "torch": EngineConfig(),
    **{f"zero{stage}": EngineConfig("deepspeed", zero_stage=stage) for stage in range(4)},
    "zero1-offload": EngineConfig("deepspeed", zero_stage=1, offload_optimizer=True),
    "zero2-offload": EngineConfig("deepspeed", zero_stage=2, offload_optimizer=True),
    "zero3-optimizer": EngineConfig("deepspeed", zero_stage=3, offload_optimizer=True),
    "zero3-offload": EngineConfig("deepspeed", zero_stage=3, offload_optimizer=True, offload_parameters=True),
}
SHARED = [name for name in ENGINES if name not in ("torch", "zero0")]
DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))


def worst(engine: EngineConfig, ranks: int, model: Weights = MODEL) -> int:
    found = held(replace(engine, nproc=ranks), model)
    return max(found.opening, found.always + found.backward, found.always + found.step)


@pytest.mark.parametrize("engine", SHARED)
def test_more_ranks_hold_less_each(engine: str) -> None:
    each = [worst(ENGINES[engine], ranks) for ranks in (2, 4, 8, 64)]
    assert each == sorted(each, reverse=True)
    assert each[-1] < each[0]
    between = [held(replace(ENGINES[engine], nproc=ranks), MODEL).always for ranks in (1, 2, 4, 8, 64)]
    assert between == sorted(between, reverse=True)


def test_ranks_of_plain_torch_hold_everything() -> None:
    assert held(ENGINES["torch"], MODEL).always == 3 * MODEL.all, "and gradients come and go"
    assert worst(ENGINES["torch"], 8) - worst(ENGINES["torch"], 2) == 0
    assert 0 <= worst(ENGINES["torch"], 2) - worst(ENGINES["torch"], 1) < BUCKET, "averaged in chunks"


def test_each_stage_shares_more_between_steps() -> None:
    always = [held(replace(ENGINES[f"zero{stage}"], nproc=8), MODEL).always for stage in (1, 2, 3)]
    assert always[0] == always[1] > always[2]
    assert worst(ENGINES["zero2"], 8) < worst(ENGINES["zero1"], 8) < worst(ENGINES["zero0"], 8)
    assert always[2] == 5 * MODEL.all // 8


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_offloaded_stays_on_the_machine(stage: int) -> None:
    name = "zero2-offload" if stage == 2 else "zero3-optimizer"
    for ranks in (1, 2, 8):
        here, away = (held(replace(ENGINES[n], nproc=ranks), MODEL) for n in (f"zero{stage}", name))
        assert away.always > here.always
        assert away.step < here.step, "its flat gradient is there all the time"


def test_buckets_do_not_grow_with_the_model() -> None:
    larger = replace(MODEL, all=2 * MODEL.all, trained=2 * MODEL.trained)
    engine = replace(ENGINES["zero2"], nproc=64)
    grown = held(engine, larger).backward - held(engine, MODEL).backward
    assert grown == 2 * MODEL.trained // 64, "only what each rank adds up"


def test_a_frozen_trunk_is_held_once() -> None:
    frozen = replace(MODEL, trained=MODEL.all // 4, head=0)
    for name, engine in ENGINES.items():
        saved = held(engine, MODEL).always - held(engine, frozen).always
        assert saved >= 2 * (MODEL.trained - frozen.trained), name


class Halving(Ranks):
    """Two ranks of which the other one has no gradient."""

    def mean(self, values: Tensor, weight: float = 1.0) -> Tensor:
        """Half, of one chunk."""
        assert values.numel() <= 100
        return values / 2


def test_gradients_are_averaged_in_chunks(tiny_checkpoint: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CHUNK", 100)
    folder, ids, found = tiny_checkpoint(), token_ids(), []
    for ranks in (Ranks.single("cpu"), Halving(0, 2, torch.device("cpu"))):
        network = dynamic_model(folder)
        made = engines.TorchEngine(network, FinetuneConfig(), ranks)
        made.backward(network(input_ids=ids, labels=ids).loss, last=True)
        found.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert len(found[0]) > 10
    for name, whole in found[0].items():
        assert torch.equal(whole / 2, found[1][name]), name


def estimate(folder: Path, **changes: Any) -> int:
    engine = changes.pop("engine", EngineConfig())
    config = RunConfig(engine=engine)
    config.finetune = replace(config.finetune, **changes)
    return finetune_estimate(config, Checkpoint.open(folder), Checkpoint.open(folder)).peak_bytes


def test_a_parent_counts_in_the_dtype_it_is_stored_in(tiny_checkpoint: Maker) -> None:
    single, half = tiny_checkpoint(), tiny_checkpoint(dtype=torch.bfloat16)
    taught = SELF_TAUGHT | {"teacher": "parent"}
    wide, narrow = (estimate(folder, **taught) - estimate(folder, **SELF_TAUGHT) for folder in (single, half))
    assert wide - narrow == 2 * Checkpoint.open(single).parameters
    assert narrow > 2 * Checkpoint.open(half).parameters, "its log-probabilities as well"


def test_deepspeed_needs_libraries_of_its_own(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    assert estimate(folder, engine=ENGINES["zero0"]) > estimate(folder) + 10**7


def test_large_blocks_are_given_back() -> None:
    small = Graph(tokens=64, width=64, neurons=64, vocabulary=64, by_width=4, by_neurons=4, by_vocabulary=5)
    large = replace(small, tokens=2 * HEAP_BLOCK // WORD // 64)
    model = replace(MODEL, head=0)
    assert small.bytes_left() == small.bytes_at(model) > 13 * WORD * 64 * 64
    assert large.bytes_left() == 0
    assert large.bytes_at(model) == 13 * 2 * HEAP_BLOCK


@pytest.mark.parametrize(
    ("trainable", "dense"), [("all", False), ("ffn", False), ("routers", False), ("all", True), ("ffn", True)]
)
def test_layers_keep_as_many_blocks_as_counted(tiny_checkpoint: Maker, trainable: str, *, dense: bool) -> None:
    """Storages that the graph of one more layer keeps, without weights, against the count of one more layer."""
    folders = [tiny_checkpoint(hidden=256, ffn=640, heads=4, kv_heads=1, layers=layers) for layers in (2, 3)]
    config = RunConfig(experts="nested")
    changes = {"router": "uniform", "losses": DENSE} if dense else {}
    config.finetune = replace(config.finetune, trainable=trainable, batch_size=4, **changes)
    config.data.sequence_length = 64
    policy = Full() if dense else StraightThrough(-2.0, 1.0)
    models = [dynamic_model(folder, "none" if dense else "width") for folder in folders]
    fewer, more = (kept_bytes(model, trainable, policy) for model in models)
    low, high = (graph_of(config, Checkpoint.open(folder)) for folder in folders)
    blocks = (high.by_width - low.by_width) * 256 + (high.by_neurons - low.by_neurons) * 640
    assert more - fewer == pytest.approx(WORD * 4 * 64 * blocks, rel=0.12)


def test_layers_of_single_neurons_keep_as_many_blocks_as_counted(tiny_checkpoint: Maker) -> None:
    """The same with low-bit values, whose weights in the graph are counted with the few-bit copies."""
    folders = [tiny_checkpoint(hidden=256, ffn=640, heads=4, kv_heads=1, layers=layers) for layers in (2, 3)]
    config = RunConfig()
    config.finetune = replace(config.finetune, batch_size=4)
    config.data.sequence_length = 64
    policies = [ByThreshold(torch.full((layers,), -1.0), True, torch.full((layers,), 1.0)) for layers in (2, 3)]
    models = [neurons_model(folder) for folder in folders]
    fewer, more = (kept_bytes(model, "all", policy) for model, policy in zip(models, policies, strict=True))
    low, high = (graph_of(config, Checkpoint.open(folder)) for folder in folders)
    blocks = (high.by_width - low.by_width) * 256 + (high.by_neurons - low.by_neurons) * 640
    rounded = 3 * 256 * 640
    assert more - fewer == pytest.approx(WORD * (4 * 64 * blocks + rounded), rel=0.12)


def kept_bytes(model: Any, trainable: str, policy: Policy) -> int:
    """Bytes that the graph of one pass of 4 x 64 tokens keeps beside parameters."""
    model.train()
    choose(model, trainable)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with model.call.using(policy), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        model(input_ids=token_ids(4, 64), use_cache=False)
    return sum(found.values())
