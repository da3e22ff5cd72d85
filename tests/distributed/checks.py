"""What two ranks check together: started by torchrun, results written as JSON. See ``test_engines.py``.

One start of a process group costs seconds, so everything that needs one runs in here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import make_checkpoint
from dynamic_models import dynamic_model, neurons_model, token_ids
from torch import Tensor

from dynaconv.arch.stock import load_dense
from dynaconv.config import EngineConfig, FinetuneConfig, RunConfig
from dynaconv.data.windows import Batch, Windows
from dynaconv.profile.gated import exact_margin, prepare_means, solve_neurons
from dynaconv.ranks import Ranks, leave
from dynaconv.train.budget_controller import BudgetController
from dynaconv.train.engine import Engine, build_engine
from dynaconv.train.state import Position, load_state, save_state
from dynaconv.train.step import Trainer
from dynaconv.train.straight_through import ScoreGradients, StraightThrough
from dynaconv.train.trainable import choose

STEPS, FEW = 50, 5
ENGINES = {
    "torch": EngineConfig(),
    **{f"zero{stage}": EngineConfig("deepspeed", zero_stage=stage) for stage in range(4)},
    "zero2-offload": EngineConfig("deepspeed", zero_stage=2, offload_optimizer=True),
    "zero3-offload": EngineConfig("deepspeed", zero_stage=3, offload_optimizer=True, offload_parameters=True),
}
SIZES = {"hidden": 32, "ffn": 48, "layers": 2, "heads": 2, "kv_heads": 2}
OTHERS = (("opt", "width"), ("opt", "class"), ("llama", "curve"), ("phi3", "class"))

NEURONS = (("torch", "llama"), ("zero3", "llama"), ("zero3", "opt"))
MOVED = {"llama": ("gate_proj", "down_proj", "means"), "opt": ("fc1", "fc2", "means")}
FROZEN = ("routers", "ffn")
BF16 = ("torch", "zero2", "zero3")


@dataclass
class Bench:
    """Where checkpoints and states are, and who takes part."""

    folder: Path
    ranks: Ranks

    def checkpoint(self, family: str, **settings: Any) -> Path:
        folder = self.folder / "-".join([family, *settings])
        if self.ranks.main and not folder.exists():
            make_checkpoint(folder, family, **SIZES, **settings)
        self.ranks.barrier()
        return folder

    def trainer(
        self,
        folder: Path,
        engine: EngineConfig,
        ranks: Ranks,
        steps: int,
        router: str = "width",
        **more: Any,
    ) -> Trainer:
        settings = {
            "budgets": [0.2, 0.75],
            "warmup_steps": 2,
            "uniform_share": 0.3,
            "clip": 0.3,
            "weight_decay": 0.1,
            "router": router,
            **more,
        }
        tuning = FinetuneConfig(batch_size=8, accumulation=2, **settings)
        torch.manual_seed(ranks.rank)
        network = neurons_model(folder) if router == "sketch" else dynamic_model(folder, router)
        margin = exact_margin(network) if router == "sketch" else 0.0
        choose(network, tuning.trainable)
        made = build_engine(network, RunConfig(finetune=tuning, engine=engine), ranks)
        torch.manual_seed(ranks.rank)
        windows = Windows(1 + torch.arange(4000, dtype=torch.int32) ** 2 % 61, 16)
        # A seed at which no two tokens' scores are so close that the rounding of another number of ranks swaps them.
        return Trainer(
            made, tuning, windows, steps, seed=7, parent=load_dense(folder, ranks.device), exact_margin=margin
        )


def run(trainer: Trainer, start: int = 0, stop: int | None = None) -> list[dict[str, float]]:
    """Metrics of each step from ``start`` to ``stop``."""
    trainer.engine.model.train()
    return [trainer.step(step) for step in range(start, trainer.steps if stop is None else stop)]


def whole(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def furthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert sorted(some) == sorted(others)
    return max(float((some[name] - others[name]).abs().max()) for name in some)


def curves(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Loss curves of every engine over two ranks, beside one rank's of plain torch."""
    folder, alone = bench.checkpoint("llama"), Ranks.single("cpu")
    made = bench.trainer(folder, EngineConfig(), alone, STEPS)
    wanted, weights = run(made), whole(made.engine)
    moved = furthest(weights, whole(bench.trainer(folder, EngineConfig(), alone, STEPS).engine))
    yield "alone", {"losses": [step["loss_full"] for step in wanted], "moved": moved}
    for name, engine in ENGINES.items():
        made = bench.trainer(folder, engine, bench.ranks, STEPS if "offload" not in name else FEW)
        one = wanted
        if made.steps != STEPS:
            shorter = bench.trainer(folder, EngineConfig(), alone, made.steps)
            one, weights = run(shorter), whole(shorter.engine)
        two = run(made)
        gaps = {key: max(abs(a[key] - b[key]) for a, b in zip(one, two, strict=True) if key in a) for key in one[-1]}
        yield f"curve/{name}", gaps | {"weights": furthest(weights, whole(made.engine)), "steps": len(two)}
    fp32 = run(bench.trainer(folder, EngineConfig(), alone, FEW))
    bf16 = run(bench.trainer(folder, EngineConfig(), alone, FEW, precision="bf16"))
    for name in BF16:
        two = run(bench.trainer(folder, ENGINES[name], bench.ranks, FEW, precision="bf16"))
        gaps = [
            max(abs(a["loss_full"] - b["loss_full"]) for a, b in zip(one, two, strict=True)) for one in (bf16, fp32)
        ]
        yield f"bf16/{name}", {"one rank": gaps[0], "fp32": gaps[1]}
    for family, router in OTHERS:  # networks without a gate, with both as one, and the other routers
        folder = bench.checkpoint(family)
        one, two = (
            bench.trainer(folder, engine, ranks, FEW, router)
            for engine, ranks in ((EngineConfig(), alone), (ENGINES["zero3"], bench.ranks))
        )
        gap = max(abs(a["loss_full"] - b["loss_full"]) for a, b in zip(run(one), run(two), strict=True))
        yield f"family/{family}-{router}", {"loss_full": gap, "weights": furthest(whole(one.engine), whole(two.engine))}
    one, two = (
        bench.trainer(bench.checkpoint("llama"), engine, ranks, STEPS, "linear", uniform_share=0.1)
        for engine, ranks in ((EngineConfig(), alone), (ENGINES["zero3"], bench.ranks))
    )
    pairs = list(zip(run(one), run(two), strict=True))
    gaps = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("loss_full", "kl_dial", "share_spent")}
    yield "routed", gaps | {"weights": furthest(whole(one.engine), whole(two.engine))}
    for trainable in FROZEN:
        one, two = (
            bench.trainer(folder, engine, ranks, FEW, "class", trainable=trainable, uniform_share=0.0)
            for engine, ranks in ((EngineConfig(), alone), (ENGINES["zero3-offload"], bench.ranks))
        )
        gap = max(abs(a["loss_router"] - b["loss_router"]) for a, b in zip(run(one), run(two), strict=True))
        yield f"frozen/{trainable}", {"loss": gap, "weights": furthest(whole(one.engine), whole(two.engine))}


def neurons(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Single neurons in several bits: fine-tuned, then thresholds and means from half of the text on each rank."""
    alone = Ranks.single("cpu")
    for name, family in NEURONS:
        folder = bench.checkpoint(family)
        one, two = (
            bench.trainer(folder, engine, ranks, FEW, "sketch")
            for engine, ranks in ((EngineConfig(), alone), (ENGINES[name], bench.ranks))
        )
        pairs = list(zip(run(one), run(two), strict=True))
        gaps = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("loss_full", "kl_dial", "share_spent")}
        start = whole(bench.trainer(folder, EngineConfig(), alone, FEW, "sketch").engine)
        weights, moved = (
            whole(one.engine),
            {part: furthest_of(part, whole(one.engine), start) for part in MOVED[family]},
        )
        yield f"neurons/{name}-{family}", gaps | {"weights": furthest(weights, whole(two.engine)), "moved": moved}
    text = Batch(token_ids(8, 24))
    half = text.rows(4 * bench.ranks.rank, 4 * bench.ranks.rank + 4)
    tables = []
    for batch, ranks in ((text, alone), (half, bench.ranks)):
        model = neurons_model(bench.checkpoint("llama"), means=())
        prepare_means(model, [0.3, 0.6])
        with torch.no_grad():
            table = solve_neurons(model, [batch], [0.3, 0.6], measure_means=True, ranks=ranks)
        tables.append(
            torch.cat([torch.tensor(table.thresholds).flatten(), *(f.means.detach().flatten() for f in model.ffns())])
        )
    yield "neurons/solved", float((tables[0] - tables[1]).abs().max())


def furthest_of(part: str, some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """How far the tensors with ``part`` in their name lie apart."""
    return furthest(*({name: tensor for name, tensor in each.items() if part in name} for each in (some, others)))


def resumed(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Every engine stopped after half of its steps, and gone on with by another one."""
    folder = bench.checkpoint("llama", attention_dropout=0.1)
    for name, engine in ENGINES.items():
        straight = bench.trainer(folder, engine, bench.ranks, 4)
        wanted, weights = run(straight), whole(straight.engine)
        work = bench.folder / f"work-{name}"
        first = bench.trainer(folder, engine, bench.ranks, 4)
        got = run(first, stop=2)
        save_state(work, first.engine, Position(2, first.controller.error))
        second = bench.trainer(folder, engine, bench.ranks, 4)
        torch.manual_seed(77)
        position = load_state(work, second.engine)
        second.controller = BudgetController(position.budget_error)
        got += run(second, start=position.step)
        yield f"resume/{name}", {"losses": got == wanted, "weights": furthest(weights, whole(second.engine))}


def starved(bench: Bench) -> Iterator[tuple[str, Any]]:
    """A step in which no token of the second rank goes through any block."""
    folder, ids = bench.checkpoint("llama"), token_ids(2, 8)
    for name, engine in ENGINES.items():
        made = bench.trainer(folder, engine, bench.ranks, 1).engine
        policy, recorder = StraightThrough(-2.0 if bench.ranks.main else 10.0, 1.0), ScoreGradients()
        with made.network.call.using(policy, recorder):
            made.backward(made.model(input_ids=ids, labels=ids).loss, last=False)
        made.backward(recorder.centering(made.network.ffns(), bench.ranks.mean), last=True)
        yield f"starved/{name}", made.step(1.0)


def main() -> None:
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    bench, found = Bench(Path(sys.argv[1]), ranks), dict[str, Any]()
    for check in (curves, neurons, resumed, starved):
        found |= dict(check(bench))
    if ranks.main:
        (bench.folder / "found.json").write_text(json.dumps(found))
    ranks.close()
    leave(0)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
