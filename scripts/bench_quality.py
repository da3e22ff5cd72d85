"""What routing is worth: losses at equal active share, against every baseline, on the same weights and tokens.

    python scripts/bench_quality.py MODEL VALID.txt

MODEL is a dense checkpoint, VALID.txt text that neither it nor the fine-tuning has seen. Trains three copies on
the same tokens (routed, uniform widths, plain dense), then scores each policy on 160 random windows of 256 tokens.
Training text is an equal share of every package on this machine; by size, a few large ones would drown the rest.
Shares are matched by solving the level on those windows while gated: one number is fitted, to share and not to loss.
Resumable: trained weights are kept in --runs, finished rows in --out.
"""

from __future__ import annotations

import json
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaconv.arch.stock import load_dense
from dynaconv.artifacts.files import read_json, write_json
from dynaconv.artifacts.run import Run
from dynaconv.calibrate.solve import solve_budget
from dynaconv.cli.quiet import silence_libraries
from dynaconv.config import RunConfig
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import Policy, Routed, Static, Uniform
from dynaconv.evaluation.baselines import oracle_routers, recorded_widths, shuffled, static_widths
from dynaconv.evaluation.scoring import Score, most_likely, score
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.progress import Progress
from dynaconv.recipes import compose

SHARES = (0.125, 0.25, 0.375, 0.5)
PACKAGE_CHARACTERS = 60_000  # of each package, at most
WINDOWS, LENGTH, BATCH = 160, 256, 16
TRAINING = {
    "gate": [],
    "uniform": ["router=uniform"],
    "dense": ["router=uniform", "losses.full.weight=1", "losses.distill.weight=0"],
}


@dataclass
class Table:
    """Rows of the result file; a row that is there is not measured again."""

    path: Path
    head: dict[str, Any]

    def __post_init__(self) -> None:
        known = read_json(self.path) if self.path.is_file() else {}
        self.rows: list[dict[str, Any]] = (
            known.get("rows", []) if known.get("settings") == self.head["settings"] else []
        )

    def row(self, weights: str, policy: str, share: float, measure: Callable[[], Score]) -> dict[str, Any]:
        """Measures and saves one row, or finds it."""
        key = {"weights": weights, "policy": policy, "share": share}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        got = measure()
        row = key | {"loss": got.loss, "active_share": got.active_share, "agreement": got.agreement}
        row["width_by_layer"] = list(got.widths)
        self.rows.append(row)
        write_json(self.path, self.head | {"rows": self.rows})
        typer.echo(f"{weights:10} {policy:26} asked {share:.3f} spent {got.active_share:.4f} loss {got.loss:.4f}")
        return row


def main(
    model: Annotated[Path, typer.Argument(help="Dense checkpoint.")],
    valid: Annotated[Path, typer.Argument(help="Text nobody has trained on.")],
    tokens: Annotated[int, typer.Option(help="Fine-tuning tokens.")] = 1_500_000,
    seed: Annotated[int, typer.Option(help="Seeds data order and dial.")] = 0,
    exclude: Annotated[str, typer.Option(help="Packages left out of the training text.")] = "rich,typer,idlelib",
    variants: Annotated[str, typer.Option(help="Copies to train.")] = "gate,uniform,dense",
    runs: Annotated[Path, typer.Option(help="Where trained copies are kept.")] = Path("runs/bench-quality"),
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/quality.json"),
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
) -> None:
    """Trains, scores, writes the table."""
    silence_libraries()
    torch.set_num_threads(threads)
    text = training_text(runs / "train.txt", exclude.split(","))
    settings = {"model": model.name, "valid": valid.name, "tokens": tokens, "seed": seed, "excluded": exclude}
    command = f"python scripts/bench_quality.py {model.name} {valid.name} --tokens {tokens} --seed {seed}"
    table = Table(out, {"command": command, "settings": settings, "torch": torch.__version__})
    batches = list(windows(load_tokenizer(model), valid))
    parent = load_dense(model, torch.device("cpu"))
    wanted = most_likely(parent, batches)

    def measure(network: Any, policy: Policy | None) -> Callable[[], Score]:
        return lambda: score(network, batches, policy, parent=wanted)

    table.row("parent", "dense", 1.0, measure(parent, None))
    for variant in variants.split(","):
        overrides = [f"finetune.tokens={tokens}", f"seed={seed}", "finetune.wandb=off"]
        overrides += [f"finetune.{override}" for override in TRAINING[variant]]
        config = compose("nested", overrides)
        config.source, config.data.train = str(model), [str(text)]
        folder = train(config, runs / f"{variant}-{tokens}-{seed}")
        if variant == "gate":
            untrained(table, folder["carve"], measure, batches)
        rows(table, variant, folder["finetune"], measure, batches)
    typer.echo(json.dumps({"command": command, "rows": len(table.rows)}))


def train(config: RunConfig, path: Path) -> dict[str, Path]:
    """Profile, carve and finetune in ``path``; the folder of each stage."""
    began = time.monotonic()
    run = Run.open(path) if (path / "manifest.json").is_file() else Run.create(path)
    with Progress() as progress:
        outcomes = run_pipeline(config, run, until="finetune", progress=progress)
    typer.echo(f"{path.name}: {time.monotonic() - began:.0f} s")
    return {outcome.name: outcome.folder for outcome in outcomes}


def training_text(path: Path, exclude: list[str], characters: int = PACKAGE_CHARACTERS) -> Path:
    """Python source of the standard library and of installed packages, at most ``characters`` of each; made once."""
    if path.is_file():
        return path
    paths = sysconfig.get_paths()
    skipped = {*exclude, "site-packages", "encodings", "pydoc_data", "lib2to3"}
    packages: dict[str, list[Path]] = {}
    for root in (Path(paths["purelib"]), Path(paths["stdlib"])):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if not skipped & set(parts):
                packages.setdefault(f"{root.name}/{parts[0] if len(parts) > 1 else ''}", []).append(file)
    documents = []
    for files in packages.values():
        random.Random(0).shuffle(files)
        left = characters
        for file in files:
            source = file.read_text(encoding="utf-8", errors="ignore")[:left]
            documents += [source] if source.strip() else []
            left -= len(source)
            if left <= 0:
                break
    random.Random(0).shuffle(documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return path


def windows(tokenizer: Any, valid: Path) -> Iterator[Batch]:
    """160 windows at random places of the text, batch after batch of 16."""
    ids = tokenizer(valid.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    tokens, generator = torch.tensor(ids), torch.Generator().manual_seed(7)
    for _ in range(WINDOWS // BATCH):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
        yield Batch(torch.stack([tokens[i : i + LENGTH] for i in starts]))


def untrained(table: Table, folder: Path, measure: Any, batches: list[Batch]) -> None:
    """The carved checkpoint before any fine-tuning: closed-form routers against uniform widths."""
    from dynaconv.dynamic.modeling import load

    model = load(folder).eval()
    for share in SHARES:
        table.row("carved", "uniform width", share, measure(model, Uniform(round(share * model.layout.blocks))))
        table.row("carved", "closed-form router", share, measure(model, routed(model, batches, share)))


def rows(table: Table, variant: str, folder: Path, measure: Any, batches: list[Batch]) -> None:
    """Every policy on one trained copy."""
    from dynaconv.dynamic.modeling import load

    model = load(folder).eval()
    table.row(variant, "full dial", 1.0, measure(model, None))
    if variant == "dense":
        return
    for share in SHARES:
        table.row(variant, "uniform width", share, measure(model, Uniform(round(share * model.layout.blocks))))
        with oracle_routers(model):
            table.row(variant, "label oracle", share, measure(model, routed(model, batches, share)))
        if model.layout.router.kind == "none":
            continue
        policy = routed(model, batches, share)
        row = table.row(variant, "routed", share, measure(model, policy))
        static = static_widths(row["width_by_layer"], model.layout.blocks)
        table.row(variant, "static widths by layer", share, measure(model, Static(static)))
        replay = shuffled(recorded_widths(model, batches, policy), seed=0)
        table.row(variant, "same widths, random tokens", share, measure(model, replay))


def routed(model: Any, batches: list[Batch], share: float) -> Routed:
    """The routers at the level that spends ``share`` of the FFNs on ``batches``."""
    solved = solve_budget(model, batches, share, tolerance=0.002, iterations=10)
    return Routed(torch.full((model.layout.layers,), solved.level))


if __name__ == "__main__":
    typer.run(main)
