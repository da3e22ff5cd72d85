"""What resizing is worth: tokens that a clone needs to reach the loss a random init of its shape ends with.

    python scripts/bench_resize.py MODEL VALID.txt

Down: MODEL at half its width. Up: a small base, trained here, at twice its width. Random inits train for the whole
budget, and their learning rate falls to zero at its end: their best case. Clones get a quarter of it (down) or 1/2.2
(up), with the same schedule over what they get, and should end at or below the random init's last loss. Equal seeds see
the same batches in the same order. Peak learning rates are tuned for each side on seed 0, and further while the best is
at an edge; variants of a clone train at the clone's, the base at the random init's. What the sources themselves have
cost is not counted, but written down; the base is stopped while it is worse than the random inits will be, so that its
clones have to earn it. VALID.txt is text that nobody trained on.

One row is one run; finished rows are kept in --runs. One thread, bf16 products, fp32 weights. About two hours.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_text import training_text, windows
from resize_clones import Sources, separation
from resize_plot import draw
from resize_rows import Bench, Result, Row, end_loss, tokens_to_reach

from dynaconv.artifacts.files import write_json
from dynaconv.cli.quiet import silence_libraries
from dynaconv.config import DataConfig
from dynaconv.data.corpus import load_corpus
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import evaluation_batches
from dynaconv.train.pretrain import Schedule
from dynaconv.train.shape import Shape, build

LARGE = Shape(hidden=128, ffn=512, layers=4, heads=2, kv_heads=1, vocabulary=2048)  # half of MODEL, twice the base
SMALL = replace(LARGE, hidden=64, ffn=256, heads=1)
PACKAGE_CHARACTERS = 250_000  # of each package, at most: more tokens than a random init's budget
CALIBRATION_TOKENS = 65536


@dataclass(frozen=True)
class Comparison:
    """Clones of one kind against random inits of their shape.

    Attributes:
        start: ``subclone`` or ``hyperclone``.
        fewer: How many times fewer tokens a clone gets: the claim.
        optimizer: Of all rows.
        tokens: Budget of a random init.
        random_rates: Peak learning rates tried for random inits.
        rates: The same for clones.
        base_tokens: Budget of the small base.
        variants: Of the clone.
    """

    start: str
    fewer: float
    optimizer: str
    tokens: int
    random_rates: tuple[float, ...]
    rates: tuple[float, ...]
    base_tokens: int = 0
    variants: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In the result file."""
        return f"{self.start}, {self.optimizer}"


ADAMW_RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
COMPARISONS = (
    Comparison(
        "subclone", 4.0, "AdamW", 5_000_000, ADAMW_RATES, ADAMW_RATES, variants=("without rescale", "without ordering")
    ),
    Comparison(
        "hyperclone",
        2.2,
        "Muon",
        1_500_000,
        (2.5e-3, 5e-3, 1e-2),
        (2.5e-3, 5e-3),
        2_000_000,
        variants=("without noise",),
    ),
)


def main(
    model: Annotated[Path, typer.Argument(help="Dense checkpoint to halve.")],
    valid: Annotated[Path, typer.Argument(help="Text nobody has trained on.")],
    seeds: Annotated[int, typer.Option(help="Seeds of every row.")] = 3,
    exclude: Annotated[str, typer.Option(help="Packages left out of the training text.")] = "rich,typer,idlelib",
    runs: Annotated[Path, typer.Option(help="Where finished rows are kept.")] = Path("runs/bench-resize"),
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/resize.json"),
    picture: Annotated[Path, typer.Option(help="The curves.")] = Path("docs/resize.png"),
) -> None:
    """Trains the rows, writes the table, draws the curves."""
    silence_libraries()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    text = training_text(runs / "train.txt", exclude.split(","), PACKAGE_CHARACTERS)
    data = DataConfig(train=[str(text)], validation_share=0.0, sequence_length=256)
    train = load_corpus(data, tokenizer, validation_tokens=0).train
    schedule = Schedule(batch_size=8, warmup_share=0.03, decay_share=1.0, precision="bf16")
    bench = Bench(runs, train, list(windows(tokenizer, valid)), schedule)
    summary = {each.name: compare(bench, each, model, tokenizer, seeds) for each in COMPARISONS}
    content = {
        "method": " ".join((__doc__ or "").split("\n\n")[2].split()),
        "command": shlex.join(["python", "scripts/bench_resize.py", model.name, valid.name, "--seeds", str(seeds)]),
        "settings": {"model": model.name, "valid": valid.name, "seeds": seeds, "excluded": exclude},
        "comparisons": [asdict(each) for each in COMPARISONS],
        "schedule": bench.shared,
        "shapes": {"clones and random inits": asdict(LARGE), "small base": asdict(SMALL)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "threads": 1},
        "summary": summary,
        "short of the claim": short_of_the_claim(bench, tokenizer),
        "rows": bench.rows,
    }
    write_json(out, content)
    draw(content, picture)


def compare(bench: Bench, wanted: Comparison, model: Path, tokenizer: Any, seeds: int) -> dict[str, Any]:
    """Trains the rows of one comparison; what each start needed and where it ended."""
    row = Row("random", "", 0.0, 0, wanted.tokens, wanted.optimizer)
    random = bench.tuned(row, wanted.random_rates, seeds, lambda row: build(LARGE, row.seed))
    summary: dict[str, Any] = {"random": ends(random)}
    base = replace(row, start="base", learning_rate=random[0]["learning_rate"], tokens=wanted.base_tokens)
    small = bench.folder / base.name
    if wanted.start == "hyperclone":
        summary["base"] = ends([trained_base(bench, base)])
        tokenizer.save_pretrained(small)
    calibration = list(evaluation_batches(bench.windows, 16, CALIBRATION_TOKENS))
    sources = Sources.measured(model, small, bench.folder / "importance", calibration)
    variants = clones(bench, wanted, sources, seeds)
    ours, theirs = losses(variants[""]), losses(random)
    summary |= {
        "claim": f"{wanted.fewer:g} times fewer tokens than the random init",
        "holds_by_seed": [our <= their for our, their in zip(ours, theirs, strict=True)],
        "holds_against_best_random": [our <= min(theirs) for our in ours],
        "variants": {name: ends(results) | against(results, random) for name, results in variants.items()},
    }
    return summary


def trained_base(bench: Bench, base: Row) -> Result:
    """Trains and saves the small model that is hypercloned."""
    return bench.run(base, lambda row: build(SMALL, row.seed), keep=bench.folder / base.name)


def short_of_the_claim(bench: Bench, tokenizer: Any) -> list[dict[str, Any]]:
    """Hyperclones of seed 0 that did not get there, each kind after its base.

    AdamW hardly moves the copies apart, and they stay where the base was; Muon needs more than a base that has seen no
    more than a random init.
    """
    found = []
    for optimizer, base_rate, base_tokens, tokens, rates in (
        ("AdamW", 1.5e-3, 16_000_000, 5_000_000, (3.75e-4, 7.5e-4, 1.5e-3)),
        ("Muon", 5e-3, 1_500_000, 1_500_000, (2.5e-3, 5e-3, 1e-2)),
    ):
        base = Row("base", "", base_rate, 0, base_tokens, optimizer)
        small = bench.folder / base.name
        found.append(ends([trained_base(bench, base)]))
        tokenizer.save_pretrained(small)
        for lr in rates:
            row = Row("hyperclone", "", lr, 0, int(tokens / 2.2), optimizer, small.name)
            result = bench.run(row, Sources(small, small, small).clone, separation(bench.held_out[0]))
            found.append(ends([result]))
    return found


def clones(bench: Bench, wanted: Comparison, sources: Sources, seeds: int) -> dict[str, list[Result]]:
    """The clone at its best learning rate, and its variants at the same one, for every seed."""
    measure = separation(bench.held_out[0]) if wanted.start == "hyperclone" else None
    source = (sources.large if wanted.start == "subclone" else sources.small).name
    row = Row(wanted.start, "", 0.0, 0, int(wanted.tokens / wanted.fewer), wanted.optimizer, source)
    found = {"": bench.tuned(row, wanted.rates, seeds, sources.clone, measure)}
    row = replace(row, learning_rate=found[""][0]["learning_rate"])
    for name in wanted.variants:
        each = [replace(row, variant=name, seed=seed) for seed in range(seeds)]
        found[name] = [bench.run(one, sources.clone, measure) for one in each]
    return found


def ends(results: Sequence[Result]) -> dict[str, Any]:
    """What rows of one start and learning rate began and ended with, seed after seed."""
    first = results[0]
    found: dict[str, Any] = {name: first[name] for name in ("learning_rate", "tokens", "optimizer", "source")}
    found |= {"start_losses": [r["curve"][0][1] for r in results], "end_losses": losses(results)}
    if first["before"]:
        found["copies_apart"] = {when: [result[when] for result in results] for when in ("before", "after")}
    return found


def losses(results: Sequence[Result]) -> list[float]:
    """Last loss of each row."""
    return [end_loss(result) for result in results]


def against(results: Sequence[Result], random: Sequence[Result]) -> dict[str, Any]:
    """Tokens that rows needed for the last loss of the random init of their seed, and how many times fewer that is.

    The same against the best random init of all seeds: some find out how to copy from the context, others do not.
    """
    budget, found = random[0]["curve"][-1][0], {}
    for name, targets in {"": losses(random), "_of_best": [min(losses(random))] * len(random)}.items():
        reached = [tokens_to_reach(one, target) for one, target in zip(results, targets, strict=True)]
        found[f"tokens_to_reach{name}"] = reached
        found[f"factors{name}"] = [None if r is None else budget / max(r, 1) for r in reached]
    return found


if __name__ == "__main__":
    typer.run(main)
