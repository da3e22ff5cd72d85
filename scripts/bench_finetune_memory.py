"""Peak memory of fine-tuning, against what ``dynaconv plan`` says: shapes, what is trained, engines, processes.

    python scripts/bench_finetune_memory.py

Each case is the finetune stage on a random Llama and random text, in processes of its own: two steps with a state saved
in between, then the checkpoint written. What counts is the peak resident memory of the largest process, libraries
included. A case is written as soon as it is measured, and one that is in the file is not measured again; the plan is
made anew for all. CPU only; up to 4 GB a case.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dynaconv.artifacts.files import read_json, write_json
from dynaconv.cli.quiet import silence_libraries
from dynaconv.config import DataConfig, EngineConfig, FinetuneConfig, LossConfig, LossesConfig, RunConfig
from dynaconv.memory import peak_rss_bytes
from dynaconv.train.shape import Shape

STEPS, BLOCKS = 2, 8
DOCUMENTS, WORDS = 400, 400
TOLERANCE = 0.15


@dataclass(frozen=True)
class Size:
    """A model, and the batch it is trained with.

    Attributes:
        shape: The model.
        batch: Windows in a step.
        length: Tokens in a window.
    """

    shape: Shape
    batch: int
    length: int


SIZES = {
    "4M": Size(Shape(hidden=256, ffn=768, layers=4, heads=4, kv_heads=2, vocabulary=4096), 8, 256),
    "4M, long": Size(Shape(hidden=256, ffn=768, layers=4, heads=4, kv_heads=2, vocabulary=4096), 24, 512),
    "34M": Size(Shape(hidden=512, ffn=1536, layers=6, heads=8, kv_heads=4, vocabulary=32000), 4, 96),
    "34M untied": Size(Shape(hidden=384, ffn=1024, layers=6, heads=6, kv_heads=3, vocabulary=32000, tied=False), 4, 96),
    "100M": Size(Shape(hidden=1024, ffn=4096, layers=6, heads=16, kv_heads=8, vocabulary=4096), 2, 64),
}
DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))
ITSELF = LossesConfig(full=LossConfig(0.5), distill=LossConfig(0.5), distill_full=LossConfig(0.0))
VARIANTS: dict[str, dict[str, Any]] = {
    "gate": {},
    "dense": {"router": "uniform", "losses": DENSE},
    "uniform": {"router": "uniform", "uniform_share": 1.0},
    "class": {"router": "class"},
    "consistency": {"losses": LossesConfig(consistency=LossConfig(0.5))},
    "teaches itself": {"teacher": "self", "losses": ITSELF},
    "checkpointing": {"gradient_checkpointing": True},
    "routers": {"trainable": "routers"},
    "ffn": {"trainable": "ffn"},
    "lora": {"trainable": "lora"},
}
ENGINES = {
    "torch": EngineConfig(),
    **{f"zero{stage}": EngineConfig("deepspeed", zero_stage=stage) for stage in range(4)},
    "zero2, optimizer offloaded": EngineConfig("deepspeed", zero_stage=2, offload_optimizer=True),
    "zero3, optimizer offloaded": EngineConfig("deepspeed", zero_stage=3, offload_optimizer=True),
    "zero3, all offloaded": EngineConfig("deepspeed", zero_stage=3, offload_optimizer=True, offload_parameters=True),
}


@dataclass(frozen=True)
class Case:
    """One row of the result.

    Attributes:
        model: Of ``SIZES``.
        engine: Of ``ENGINES``.
        ranks: Processes.
        variant: Of ``VARIANTS``.
    """

    model: str
    engine: str = "torch"
    ranks: int = 1
    variant: str = "gate"

    def config(self, folder: Path) -> RunConfig:
        """The recipe: the default one with what the case changes, routed from the start."""
        size, engine = SIZES[self.model], replace(ENGINES[self.engine], nproc=self.ranks)
        shared: dict[str, Any] = {
            "batch_size": size.batch,
            "tokens": STEPS * size.batch * size.length,
            "uniform_share": 0.0,
            "budgets": [0.2, 0.75],
            "save_every": STEPS - 1,
            "wandb": "off",
        }
        data = DataConfig(train=[str(folder / "text.jsonl")], sequence_length=size.length)
        tuning = replace(FinetuneConfig(), **(shared | VARIANTS[self.variant]))
        return RunConfig(source=str(folder), experts="nested", blocks=BLOCKS, engine=engine, data=data, finetune=tuning)


def cases() -> list[Case]:
    """All rows: what is trained in one process, then engines and processes."""
    alone = [Case("4M", variant=variant) for variant in VARIANTS]
    alone += [Case("34M", variant=variant) for variant in VARIANTS]
    alone += [Case(model, variant=variant) for model in ("34M untied", "100M") for variant in ("gate", "dense")]
    shared = [Case("34M", engine, ranks) for engine in ENGINES for ranks in (1, 2) if (engine, ranks) != ("torch", 1)]
    smaller = [Case("4M", engine, 2) for engine in ("torch", "zero2", "zero3")]
    return [*alone, Case("4M, long", variant="dense"), *shared, *smaller]


def make(folder: Path, size: Size) -> None:
    """A random checkpoint with a tokenizer and a layout, so that it is the parent and the dynamic one; and text."""
    from dynaconv.arch.blocks import nested_partition
    from dynaconv.arch.checkpoint import Checkpoint
    from dynaconv.dynamic.layout import FFNLayout, Layout
    from dynaconv.train.shape import build, train_tokenizer

    folder.mkdir()
    drawn = random.Random(0)
    texts = (" ".join(f"{drawn.randrange(10**6):x}" for _ in range(WORDS)) for _ in range(DOCUMENTS))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(size.shape, 0).save_pretrained(folder)
    small = replace(size.shape, vocabulary=300)
    train_tokenizer(DataConfig(train=[str(folder / "text.jsonl")]), small).save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    ffn = FFNLayout(**asdict(checkpoint.family.ffn))
    Layout(nested_partition(size.shape.ffn, BLOCKS), checkpoint.layers, ffn).save(folder)


def train(case: Case, model: Path, made: Path) -> None:
    """What each process runs; rank 0 prints the largest peak."""
    import torch

    from dynaconv.pipeline.stage import StageContext
    from dynaconv.progress import Progress
    from dynaconv.ranks import Ranks
    from dynaconv.train.stage import FinetuneStage

    silence_libraries()
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    folder, work = made / "finetune", made / "work"
    for path in (folder, work):
        path.mkdir(parents=True, exist_ok=True)
    inputs = {"parent": model, "dynamic": model}
    with Progress(quiet=True) as progress:
        FinetuneStage().run(StageContext(case.config(model), inputs, folder, work, progress, ranks=ranks))
    peaks = torch.zeros(ranks.world, dtype=torch.float64)
    peaks[ranks.rank] = peak_rss_bytes()
    peaks = ranks.sum(peaks)
    if ranks.main:
        print(json.dumps({"peak_bytes": int(peaks.max())}), flush=True)
    ranks.close()


def measured(case: Case, model: Path) -> int:
    """Peak memory of the largest process of ``case``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    with tempfile.TemporaryDirectory(dir=model.parent) as made:
        child = [__file__, "--child", json.dumps([asdict(case), str(model), made])]
        command = [sys.executable, *(launcher if case.ranks > 1 else []), *child]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return int(json.loads(said.splitlines()[-1])["peak_bytes"])


def planned(case: Case, model: Path) -> int:
    """What ``dynaconv plan`` says of the stage."""
    from dynaconv.train.stage import FinetuneStage

    stage = FinetuneStage()
    return stage.library_bytes + stage.estimate(case.config(model), model).peak_bytes


def row(case: Case, planned_bytes: int, peak: int) -> dict[str, Any]:
    """A case as the result file has it."""
    size = SIZES[case.model]
    sizes = {"batch": [size.batch, size.length], **asdict(size.shape)}
    ratio = round(planned_bytes / peak, 3)
    measured = {"peak_bytes": peak, "planned_bytes": planned_bytes, "planned_over_peak": ratio}
    return {**asdict(case), "sizes": sizes, **measured, "within_tolerance": abs(ratio - 1) <= TOLERANCE}


def main(
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/finetune_memory.json"),
    folder: Annotated[Path | None, typer.Option(help="Where models and runs are made.")] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name begins so.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Measure cases once more that are in the file.")] = False,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures what the result file lacks, and plans all of it anew."""
    if child:
        case, model, made = json.loads(child)
        train(Case(**case), Path(model), Path(made))
        return
    import torch

    found = read_json(out)["rows"] if out.exists() else []
    known = {_name(_case(old)): old["peak_bytes"] for old in found if _case(old) in cases()}
    rows: dict[str, dict[str, Any]] = {}
    head: dict[str, Any] = {"command": "python scripts/bench_finetune_memory.py", "torch": torch.__version__}
    head |= {"device": "CPU, 1 thread", "tolerance": TOLERANCE}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for case in sorted(cases(), key=lambda case: _name(case) not in known):  # what is known stays in the file
            name, model = _name(case), Path(temporary) / case.model
            wanted = name.startswith(only) and (again or name not in known)
            if not wanted and name not in known:
                continue
            if not model.exists():
                make(model, SIZES[case.model])
            if wanted:
                known[name] = measured(case, model)
            rows[name] = row(case, planned(case, model), known[name])
            if known.keys() == rows.keys():
                write_json(out, head | {"rows": [rows[_name(one)] for one in cases() if _name(one) in rows]})
            peak, ratio = known[name] / 1e6, rows[name]["planned_over_peak"]
            typer.echo(f"{name:45} peak {peak:5.0f} MB, planned {ratio} of it")


def _name(case: Case) -> str:
    return f"{case.model} / {case.engine} x {case.ranks} / {case.variant}"


def _case(row: dict[str, Any]) -> Case:
    return Case(*(row[name] for name in ("model", "engine", "ranks", "variant")))


if __name__ == "__main__":
    typer.run(main)
