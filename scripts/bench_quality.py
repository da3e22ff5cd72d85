"""What a dial is worth: losses at equal cost, against every baseline, on the same weights and tokens.

    python scripts/bench_quality.py MODEL VALID.txt --training-free
    python scripts/bench_quality.py MODEL VALID.txt
    python scripts/bench_quality.py MODEL VALID.txt --tuned FOLDER

MODEL is a dense checkpoint, VALID.txt text that neither it nor the fine-tuning has seen. All methods get the same bf16
weights (a copy is made of other checkpoints), compute in float32, and are scored on the same random windows.

With --training-free: the baselines of ``quality_peers.py`` and our own recipes without fine-tuning, at every budget of
their calibrated dials. Without: a copy trained by each recipe, and one densely, on the same tokens
(``quality_tuned.py``). Budgets of those are matched by solving the threshold on the scored windows while gated: one
number is fitted, to cost and not to loss.

With --tuned: one model of recipe ``tune`` that was trained elsewhere, FOLDER, in the same way.

By default the text to calibrate and train on is an equal share of every package on this machine; by size, a few large
ones would drown the rest. Resumable: trained copies and finished rows are kept in --runs. Several processes may each
train some copies (--only); each writes the result file from all rows that are there.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_ffn import MethodScore, Parent
from quality_peers import BASELINES, peers
from quality_plot import draw
from quality_rows import Rows, curves, known_rows, summary
from quality_text import LENGTH, WINDOWS, half_precision, training_text, windows
from quality_tuned import COPIES, Copy, load_float, run, score_copy, untrained

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.stock import load_dense
from dynaconv.artifacts.files import write_json
from dynaconv.cli.quiet import silence_libraries
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.policy import Policy
from dynaconv.errors import ConfigError, suggest
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.scoring import Score, most_likely, score
from dynaconv.recipes import compose

RECIPES = ("default", "routed")  # our own, without fine-tuning
STAGES = ["profile", "carve", "calibrate", "export"]
HELD_OUT = 0.3  # of the calibration text, for calibrate: the rest is profiled, and nothing is trained
CALIBRATION = ["calibrate.tokens=8192", "calibrate.score_tokens=2048", "calibrate.speed_tokens=0"]  # scored here anyway
CALIBRATION_WINDOWS = 32  # that baselines take their thresholds and experts from


class Half(Enum):
    """What the weights of all methods are rounded to first; both take two bytes."""

    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """Torch's."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


@dataclass
class Judge:
    """The parent, and the windows on which everything is scored.

    Attributes:
        model: The checkpoint in half precision.
        valid: Text to score on.
        count: Windows of it.
        length: Tokens of a window.
    """

    model: Path
    valid: Path
    count: int
    length: int

    def __post_init__(self) -> None:
        self.tokenizer, self.checkpoint = load_tokenizer(self.model), Checkpoint.open(self.model)
        self.batches = list(windows(self.tokenizer, self.valid, self.count, self.length))
        self.parent = load_dense(self.model, torch.device("cpu")).float()
        self.wanted = most_likely(self.parent, self.batches)

    def rows(self, path: Path, settings: dict[str, Any], seed: int = 0) -> Rows:
        """The rows at ``path``, the parent's first."""
        cost = CostModel.of(self.checkpoint, context=self.length // 2)
        rows = Rows(path, settings, seed, cost.ffn / (cost.attention + cost.ffn + cost.head))
        rows.row("parent", "dense", 1.0, lambda: MethodScore(score(self.parent, self.batches).loss, 1.0, 1.0, 1.0, 1.0))
        return rows

    def measure(self, network: Any, policy: Callable[[], Policy | None]) -> Callable[[], Score]:
        """Scores ``network`` when called."""
        return lambda: score(network, self.batches, policy(), parent=self.wanted)


def main(
    model: Annotated[Path, typer.Argument(help="Dense checkpoint.")],
    valid: Annotated[Path, typer.Argument(help="Text nobody has trained on.")],
    training_free: Annotated[bool, typer.Option("--training-free", help="Baselines and recipes, untrained.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate and train on; package sources.")] = None,
    exclude: Annotated[str, typer.Option(help="Packages left out of the package sources.")] = "rich,typer,idlelib",
    count: Annotated[int, typer.Option("--windows", help="Windows that are scored.")] = WINDOWS,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = LENGTH,
    half: Annotated[Half, typer.Option("--dtype", help="Type of the weights that all methods get.")] = Half.bf16,
    tokens: Annotated[int, typer.Option(help="Fine-tuning tokens of each copy.")] = 1_000_000,
    tuned: Annotated[Path | None, typer.Option(help="Model of recipe tune, made elsewhere, to score.")] = None,
    only: Annotated[str, typer.Option(help="What to measure now, as 'TEAL;default'.")] = "",
    runs: Annotated[Path, typer.Option(help="Where trained copies and rows are kept.")] = Path("runs/bench-quality"),
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/quality.json"),
    picture: Annotated[Path, typer.Option(help="The curves.")] = Path("docs/quality.png"),
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Converts, scores, writes the table, draws it."""
    silence_libraries()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # else every stage chooses by measuring
    torch.set_num_threads(threads)
    chosen = wanted(only, [*RECIPES, *BASELINES] if training_free else [copy.name for copy in COPIES])
    text = calibration or training_text(runs / "train.txt", exclude.split(","))
    settings = {"model": model.name, "valid": valid.name, "windows": count, "length": length, "dtype": half.value}
    settings["text"] = calibration.name if calibration else f"package sources but {exclude}"
    files: dict[Path, dict[str, Any]] = {runs / "rows" / "training-free.json": settings}
    files |= {runs / "rows" / f"{copy.name}-{tokens}.json": {**settings, "tokens": tokens} for copy in COPIES}
    if tuned is not None:
        files = {runs / "rows" / f"{model.name}-tuned.json": settings}
    judge = Judge(half_precision(model, runs / f"{model.name}-{half.value}", half.dtype), valid, count, length)
    if tuned is not None:
        path, own = next(iter(files.items()))
        score_copy(judge.rows(path, own), Copy("tune", 0), tuned, judge.measure, judge.batches)
    elif training_free:
        measure_training_free(judge, judge.rows(*next(iter(files.items()))), text, runs, chosen)
    else:
        for copy, (path, own) in zip(COPIES, list(files.items())[1:], strict=True):
            if copy.name in chosen:
                measure_tuned(judge, judge.rows(path, own, copy.seed), copy, text, runs, tokens)
    mode = ["--training-free"] if training_free else ["--tokens", str(tokens)]
    mode = mode if tuned is None else ["--tuned", "FOLDER"]
    mode += ["--calibration", calibration.name] if calibration else []
    command = ["python", "scripts/bench_quality.py", model.name, valid.name, *mode, "--windows", str(count)]
    head = {"command": shlex.join(command), "settings": {**settings, "tokens": tokens}, "torch": torch.__version__}
    rows = [row for path, own in files.items() for row in known_rows(path, own)]
    rows = [row for i, row in enumerate(rows) if i == 0 or row["weights"] != "parent"]
    content = head | {"summary": summary(rows), "curves": curves(rows), "rows": rows}
    write_json(out, content)
    draw(content, picture)


def wanted(only: str, names: list[str]) -> set[str]:
    """What ``--only`` names, or all.

    Raises:
        ConfigError: It names something else.
    """
    chosen = set(only.split(";")) if only else set(names)
    for name in sorted(chosen - set(names)):
        raise ConfigError(f"--only knows no {name!r}", hint=suggest(name, names))
    return chosen


def measure_training_free(judge: Judge, rows: Rows, text: Path, runs: Path, chosen: set[str]) -> None:
    """Rows of the baselines, and of our own recipes at every budget of their dials."""
    parent = Parent(judge.parent, judge.checkpoint)
    inputs = parent.inputs(windows(judge.tokenizer, text, CALIBRATION_WINDOWS, judge.length, seed=8))
    for method in peers(typer.echo):
        if method.name in chosen:
            scored = partial(parent.score, method, inputs, judge.batches, judge.wanted)
            rows.row(method.name, method.setting, method.share, scored)
    for recipe in RECIPES:
        if recipe in chosen:
            config = compose(recipe, ["export.check=false", f"data.validation_share={HELD_OUT}", *CALIBRATION])
            config.source, config.data.train, config.stages = str(judge.model), [str(text)], STAGES
            config.data.sequence_length = judge.length
            own = load_float(run(config, runs / f"{recipe}-training-free", "export")["export"])
            for budget in own.layout.dial.budgets:
                policy = partial(own.policy, Dial(budget=budget))
                rows.row(f"{recipe}, training-free", f"budget {budget:g}", budget, judge.measure(own, policy))


def measure_tuned(judge: Judge, rows: Rows, copy: Copy, text: Path, runs: Path, tokens: int) -> None:
    """Rows of one trained copy, and of what it was before where that is asked for."""
    folder = run(copy.config(judge.model, text, tokens), runs / f"{copy.name}-{tokens}", "finetune")
    if copy.weights in ("routed", "nested") and copy.seed == 0:
        untrained(rows, copy, folder["carve"], judge.measure, judge.batches)
    score_copy(rows, copy, folder["finetune"], judge.measure, judge.batches)


if __name__ == "__main__":
    typer.run(main)
