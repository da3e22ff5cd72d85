"""What routing is worth: losses at equal active share, against every baseline, on the same weights and tokens.

    python scripts/bench_quality.py MODEL VALID.txt

MODEL is a dense checkpoint, VALID.txt text that neither it nor the fine-tuning has seen. Trains a copy by each recipe,
and one densely, on the same tokens, then scores each policy on 160 random windows of 256 tokens. Training text is an
equal share of every package on this machine; by size, a few large ones would drown the rest. Shares are matched by
solving the threshold on those windows while gated: one number is fitted, to share and not to loss.

Resumable: trained copies and finished rows are kept in --runs. Several processes may each train some copies (--only);
each writes the result file from all rows that are there.
"""

from __future__ import annotations

import math
import os
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_plot import draw

from dynaconv.arch.stock import load_dense
from dynaconv.artifacts.files import read_json, write_json
from dynaconv.artifacts.run import Run
from dynaconv.calibrate.solve import solve_budget
from dynaconv.cli.quiet import silence_libraries
from dynaconv.config import RunConfig
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import ByThreshold, Full, Policy, Static, Uniform, at_one_threshold
from dynaconv.evaluation.baselines import oracle_routers, recorded_widths, shuffled, static_widths
from dynaconv.evaluation.scoring import Score, most_likely, score
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.progress import Progress
from dynaconv.recipes import compose

SHARES = (0.25, 0.375, 0.5)
PACKAGE_CHARACTERS = 60_000  # of each package, at most
WINDOWS, LENGTH, BATCH = 160, 256, 16
DENSE = [  # plain training likes larger steps than a dial's; of 4, 8 and 16 windows at 3e-4, 16 did best
    "finetune.losses.full.weight=1",
    "finetune.losses.distill.weight=0",
    "finetune.losses.distill_full.weight=0",
    "finetune.batch_size=16",
    "finetune.learning_rate=3e-4",
]
OWN_POLICY = {  # what each recipe makes, by the policy it is meant for
    "routed": "routed",
    "nested": "routed",
    "nested-difficulty": "routed",
    "nested-uniform": "uniform width",
    "static-half": "uniform width",
}


@dataclass(frozen=True)
class Copy:
    """A copy to train.

    Attributes:
        weights: The recipe, or ``dense``: plain training of the parent.
        seed: Seeds data order and dial.
    """

    weights: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its rows."""
        return f"{self.weights}-{self.seed}"

    def config(self, model: Path, text: Path, tokens: int) -> RunConfig:
        """The recipe on ``text``."""
        overrides = [f"finetune.tokens={tokens}", f"seed={self.seed}", "finetune.wandb=off"]
        dense = self.weights == "dense"
        config = compose("nested-uniform" if dense else self.weights, overrides + DENSE * dense)
        config.source, config.data.train = str(model), [str(text)]
        return config


COPIES = (
    Copy("routed", 0),
    Copy("routed", 1),
    Copy("nested", 0),
    Copy("nested-uniform", 0),
    Copy("nested", 1),
    Copy("nested-uniform", 1),
    Copy("nested-difficulty", 0),
    Copy("static-half", 0),
    Copy("dense", 0),
)


@dataclass
class Rows:
    """Measured rows of one copy in a file of their own; a row that is there is not measured again."""

    path: Path
    settings: dict[str, Any]
    copy: Copy

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = known_rows(self.path, self.settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def row(self, weights: str, policy: str, share: float, measure: Callable[[], Score]) -> dict[str, Any]:
        """Measures and saves one row, or finds it."""
        key = {"weights": weights, "seed": self.copy.seed, "policy": policy, "share": share}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        got = measure()
        row = key | {"loss": got.loss, "active_share": got.active_share, "agreement": got.agreement}
        row["width_by_layer"] = list(got.widths)
        self.rows.append(row)
        write_json(self.path, {"settings": self.settings, "rows": self.rows})
        typer.echo(f"{weights:18} {policy:26} asked {share:.3f} spent {got.active_share:.4f} loss {got.loss:.4f}")
        return row


def known_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the file at ``path`` that were measured with ``settings``."""
    known = read_json(path) if path.is_file() else {}
    return known["rows"] if known.get("settings") == settings else []


def main(
    model: Annotated[Path, typer.Argument(help="Dense checkpoint.")],
    valid: Annotated[Path, typer.Argument(help="Text nobody has trained on.")],
    tokens: Annotated[int, typer.Option(help="Fine-tuning tokens of each copy.")] = 1_000_000,
    exclude: Annotated[str, typer.Option(help="Packages left out of the training text.")] = "rich,typer,idlelib",
    only: Annotated[str, typer.Option(help="Copies to train now, as nested-0,dense-0; all by default.")] = "",
    runs: Annotated[Path, typer.Option(help="Where trained copies and rows are kept.")] = Path("runs/bench-quality"),
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/quality.json"),
    picture: Annotated[Path, typer.Option(help="The curves.")] = Path("docs/quality.png"),
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Trains, scores, writes the table, draws it."""
    silence_libraries()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else every stage chooses by measuring
    torch.set_num_threads(threads)
    text = training_text(runs / "train.txt", exclude.split(","))
    settings = {"model": model.name, "valid": valid.name, "tokens": tokens, "excluded": exclude}
    batches = list(windows(load_tokenizer(model), valid))
    parent = load_dense(model, torch.device("cpu"))
    wanted = most_likely(parent, batches)

    def measure(network: Any, policy: Callable[[], Policy | None]) -> Callable[[], Score]:
        return lambda: score(network, batches, policy(), parent=wanted)

    for copy in COPIES:
        if only and copy.name not in only.split(","):
            continue
        table = Rows(runs / "rows" / f"{copy.name}-{tokens}.json", settings, copy)
        table.row("parent", "dense", 1.0, measure(parent, Full))
        folder = train(copy.config(model, text, tokens), runs / f"{copy.name}-{tokens}")
        if copy.weights in ("routed", "nested") and copy.seed == 0:
            untrained(table, folder["carve"], measure, batches)
        score_copy(table, folder["finetune"], measure, batches)
    rows = [row for copy in COPIES for row in known_rows(runs / "rows" / f"{copy.name}-{tokens}.json", settings)]
    rows = [row for i, row in enumerate(rows) if i == 0 or row["weights"] != "parent"]
    command = f"python scripts/bench_quality.py {model.name} {valid.name} --tokens {tokens}"
    head = {"command": command, "settings": settings, "torch": torch.__version__}
    content = head | {"summary": summary(rows), "rows": rows}
    write_json(out, content)
    draw(content, picture)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each recipe by its own policy, against plain dense training on the same tokens; lists are by seed.

    ``loss`` by share; ``full_dial_cost``: relative loss of the full dial over dense training's; ``perplexity_over``:
    relative perplexity over dense training's, by share; ``ahead``: nats by which the mean of routed, or of nested, is
    below another's.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["policy"] in (OWN_POLICY.get(row["weights"]), "full dial", "dense"):
            losses.setdefault(row["weights"], {}).setdefault(f"{row['share']:g}", []).append(row["loss"])
    found: dict[str, Any] = {"loss": losses}
    if "dense" in losses:
        dense = losses["dense"]["1"][0]
        dials = {name: by_share for name, by_share in losses.items() if name in OWN_POLICY}
        found["full_dial_cost"] = {
            name: [loss / dense - 1 for loss in by_share["1"]] for name, by_share in dials.items() if "1" in by_share
        }
        found["perplexity_over"] = {
            name: {share: [math.expm1(loss - dense) for loss in each] for share, each in by_share.items()}
            for name, by_share in dials.items()
        }
    found["ahead"] = {ours: _ahead(ours, losses) for ours in ("routed", "nested") if ours in losses}
    return found


def _ahead(ours: str, losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    own = losses[ours]
    return {
        name: {share: _mean(each) - _mean(own[share]) for share, each in by_share.items() if share in own}
        for name, by_share in losses.items()
        if name in OWN_POLICY and name != ours
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


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


def untrained(table: Rows, folder: Path, measure: Any, batches: list[Batch]) -> None:
    """The carved checkpoint before any fine-tuning: closed-form routers against uniform widths."""
    from dynaconv.dynamic.modeling import load

    model, name = load(folder).eval(), f"carved for {table.copy.weights}"
    for share in SHARES:
        table.row(name, "uniform width", share, measure(model, partial(uniform, model, share)))
        table.row(name, "closed-form router", share, measure(model, partial(routed, model, batches, share)))


def score_copy(table: Rows, folder: Path, measure: Any, batches: list[Batch]) -> None:
    """Every policy on one trained copy; the oracle on the first seed only."""
    from dynaconv.dynamic.modeling import load

    weights, model = table.copy.weights, load(folder).eval()
    if weights == "static-half":
        table.row(weights, "uniform width", 0.5, measure(model, partial(uniform, model, 0.5)))
        return
    table.row(weights, "full dial", 1.0, measure(model, Full))
    if weights == "dense":
        return
    for share in SHARES:
        table.row(weights, "uniform width", share, measure(model, partial(uniform, model, share)))
        if model.layout.router.kind != "none":
            score_routed(table, model, share, measure, batches)
        if weights in ("nested", "nested-uniform") and table.copy.seed == 0:
            with oracle_routers(model):
                table.row(weights, "label oracle", share, measure(model, partial(routed, model, batches, share)))


def score_routed(table: Rows, model: Any, share: float, measure: Any, batches: list[Batch]) -> None:
    """The routers, and what their widths are worth by layer only, and on random tokens."""
    weights, policy = table.copy.weights, cache(partial(routed, model, batches, share))
    row = table.row(weights, "routed", share, measure(model, policy))
    if weights == "nested":
        static = Static(static_widths(row["width_by_layer"], model.layout.blocks))
        table.row(weights, "static widths by layer", share, measure(model, lambda: static))
        replay = cache(lambda: shuffled(recorded_widths(model, batches, policy()), seed=0))
        table.row(weights, "same widths, random tokens", share, measure(model, replay))


def uniform(model: Any, share: float) -> Uniform:
    """One width for all tokens and layers; of routed experts, each token's best so many."""
    return Uniform(round(share * model.layout.blocks))


def routed(model: Any, batches: list[Batch], share: float) -> ByThreshold:
    """The routers at the threshold that spends ``share`` of the FFNs on ``batches``."""
    solved = solve_budget(model, batches, share, tolerance=0.002, iterations=10)
    return at_one_threshold(solved.threshold, model.layout.layers)


if __name__ == "__main__":
    typer.run(main)
