"""``dynaconv bench``: how fast a model generates at each dial, the parent beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynaconv.artifacts.files import size_text, storage_errors
from dynaconv.cli.folders import check_weights, model_folder, read_layout
from dynaconv.cli.model import chosen_dial, parsed_dial
from dynaconv.cli.output import in_short, print_json, print_note, say, say_wrapped
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.threads import Work, choose, using

if TYPE_CHECKING:
    from dynaconv.dynamic.dial import Dial
    from dynaconv.evaluation.bench import Sizes, Speed, Speeds
    from dynaconv.evaluation.bench_models import Subject

SHAPE_DIALS = "0.15,0.25,0.35,0.5,full"
PICTURES = (".png", ".svg", ".pdf")


class DType(StrEnum):
    """Types of weights in memory."""

    bf16 = "bf16"
    fp32 = "fp32"


@dataclass(frozen=True)
class Plan:
    """A command line that has been checked, without anything heavy loaded.

    Attributes:
        name: Of the model or shape, with what was cut, for people.
        dials: By ascending budget.
        work: Sizes that the number of threads is chosen for.
        make: Loads or makes the models.
    """

    name: str
    dials: list[Dial]
    work: Work
    make: Callable[[], Subject]


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="A converted model, or a run that holds one.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Random weights instead: llama-1b, llama-8b, qwen3-0.6b.", show_default=False
        ),
    ] = None,
    dials: Annotated[
        str | None,
        typer.Option(
            metavar="D,D", help="Budgets, such as 0.2,0.3,full; left out: those calibrated.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 64,
    prompt: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of prompt.")] = 32,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences generated together.")] = 1,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns of each candidate; medians count.")] = 5,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that prompts are cut from.", show_default=False)
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only so many layers of the shape.", show_default=False)
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A vocabulary of so many tokens.", show_default=False)
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of weights in memory; the model's own, bf16 of shapes.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; the fastest, unless given.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw tokens/s against bytes.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Measure how fast a model generates at each dial, and how many bytes it reads, the parent beside it.

    Parent is stock transformers with the same weights. With --shape, nothing has to be converted first.
    """
    _check(model, shape, layers, vocab, text, picture)

    from dynaconv.evaluation.bench import Sizes

    sizes = Sizes(batch=batch, prompt=prompt, tokens=tokens, rounds=rounds)
    if model is not None:
        plan = _plan_of_model(model, dials, sizes, dtype, text)
    else:
        plan = _plan_of_shape(str(shape), dials, sizes, dtype or DType.bf16, layers, vocab)
    count = _threads(threads, plan.work, quiet=as_json)
    with using(count):
        subject, speeds = _run(plan, sizes, quiet=as_json)
        settings = _settings(plan, subject, sizes)
    if picture is not None:
        from dynaconv.evaluation.bench_picture import draw_speeds

        with storage_errors(picture):
            draw_speeds(speeds, picture, sequences=batch, name=plan.name)
    if as_json:
        print_json({**settings, **asdict(speeds)})
        return
    _show(settings, speeds)
    if picture is not None:
        say(f"Picture: {picture}")


def _check(
    model: Path | None,
    shape: str | None,
    layers: int | None,
    vocab: int | None,
    text: Path | None,
    picture: Path | None,
) -> None:
    """Stops at what no model or shape could make good.

    Raises:
        ConfigError: Options contradict each other, or name files that are not there.
    """
    if (model is None) == (shape is None):
        wrong = "there is nothing to measure" if model is None else "a model and a shape are given"
        raise ConfigError(wrong, expected="MODEL or --shape NAME", hint="dynaconv bench --shape llama-1b --layers 4")
    if shape is None and (layers is not None or vocab is not None):
        raise ConfigError("--layers and --vocab cut shapes, not models", hint="leave them out, or --shape NAME")
    if shape is not None and text is not None:
        raise ConfigError("--text needs a model with a tokenizer", hint="leave it out: shapes read random tokens")
    if text is not None and not text.is_file():
        raise ConfigError("no such file", where=text, expected="text that prompts are cut from")
    if picture is not None and (picture.suffix not in PICTURES or not picture.absolute().parent.is_dir()):
        expected = f"a file in a folder that exists, ending in {', '.join(PICTURES)}"
        raise ConfigError("the picture cannot be written", where=picture, expected=expected)


def _plan_of_model(path: Path, dials: str | None, sizes: Sizes, dtype: DType | None, text: Path | None) -> Plan:
    from dynaconv.dynamic.dial import Dial
    from dynaconv.evaluation.bench_models import of_folder
    from dynaconv.pipeline.runner import work_of

    folder = model_folder(path)
    layout = read_layout(folder)
    if dials is not None:
        chosen = _in_order([chosen_dial(folder, one.strip(), "--dials") for one in dials.split(",")])
    elif layout.dial is None:
        hint = "dynaconv calibrate RUN, then dynaconv export RUN; or --dials full"
        raise ArtifactError("this model has no calibrated dial", where=folder, hint=hint)
    else:
        chosen = [Dial(budget=budget) for budget in layout.dial.budgets]
    check_weights(folder)

    def make() -> Subject:
        read = None if text is None else text.read_text(encoding="utf-8", errors="replace")
        return of_folder(folder, sizes, _device(), dtype=None if dtype is None else _torch_dtype(dtype), text=read)

    return Plan(str(path), chosen, work_of(folder), make)


def _plan_of_shape(
    shape: str, dials: str | None, sizes: Sizes, dtype: DType, layers: int | None, vocab: int | None
) -> Plan:
    from dynaconv.evaluation.bench_models import of_shape
    from dynaconv.evaluation.shapes import SHAPES, shape_config

    config = shape_config(shape, layers=layers, vocab=vocab)
    whole, cut = SHAPES[shape], []
    for field, words in (("num_hidden_layers", "layers"), ("vocab_size", "tokens of vocabulary")):
        if config[field] < whole[field]:
            cut.append(f"{config[field]} of {whole[field]} {words}")
    chosen = _in_order(parsed_dial(one.strip(), "--dials") for one in (dials or SHAPE_DIALS).split(","))
    budgets = [float(dial.budget or 1.0) for dial in chosen if not dial.is_full]

    def make() -> Subject:
        return of_shape(config, budgets, sizes, _device(), _torch_dtype(dtype))

    name = f"{shape}, {'cut to ' + ' and '.join(cut) + ', ' if cut else ''}random weights"
    return Plan(name, chosen, Work(hidden=config["hidden_size"], ffn=config["intermediate_size"]), make)


def _in_order(dials: Iterable[Dial | None]) -> list[Dial]:
    """By ascending budget, each once."""
    return sorted({dial for dial in dials if dial is not None}, key=lambda dial: dial.budget or 0.0)


def _torch_dtype(dtype: DType) -> Any:
    import torch

    return {DType.bf16: torch.bfloat16, DType.fp32: torch.float32}[dtype]


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _threads(asked: int | None, work: Work, *, quiet: bool) -> int | None:
    """The number of CPU threads that was asked for, or that is fastest now, which is said on stderr."""
    if asked is not None:
        return asked
    choice = choose(lambda: Work(tokens=1, hidden=work.hidden, ffn=work.ffn))
    if choice.reason and not quiet:
        print_note(choice.reason)
    return choice.count


def _run(plan: Plan, sizes: Sizes, *, quiet: bool) -> tuple[Subject, Speeds]:
    from dynaconv.evaluation.bench import measure
    from dynaconv.progress import Progress

    with Progress(quiet=quiet) as progress:
        progress.say(f"bench: {plan.name}: making parent and dynamic model")
        subject = plan.make()
        with progress.task("bench", total=sizes.turns(len(plan.dials)), unit="turns") as task:
            speeds = measure(
                subject.parent,
                subject.model,
                subject.cost,
                plan.dials,
                subject.prompt,
                sizes,
                finished=lambda name: task.advance(note=name),
            )
    return subject, speeds


def _settings(plan: Plan, subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """What the figures depend on, for ``--json``."""
    import torch
    import transformers

    device = subject.prompt.device
    return {
        "model": plan.name,
        "dtype": str(subject.parent.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **asdict(sizes),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _show(settings: dict[str, Any], speeds: Speeds) -> None:
    threads = f"{settings['threads']} thread{'s' * (settings['threads'] > 1)}"
    where = threads if settings["device"] == "cpu" else settings["device"]
    say_wrapped(
        f"{settings['model']}, {settings['dtype']}, {where}; {settings['batch']} x {settings['tokens']} tokens after a "
        f"prompt of {settings['prompt']}, medians of {settings['rounds']} rounds"
    )
    columns = [
        Column("dial"),
        Column("tokens/s"),
        Column("first token"),
        Column("bytes/step" if settings["batch"] > 1 else "bytes/token"),
        Column("promised"),
        Column("measured"),
        Column("memory"),
        Column("path", words=True, wraps=12),
    ]
    print_table(columns, [_row(one) for one in (speeds.parent, *speeds.dials)])
    say_wrapped(
        f"Promised is the ratio of the bytes that the parent reads to those of the dial, measured that of their "
        f"tokens/s. Memory is the share of {speeds.bandwidth / 1e9:.1f} GB/s, what a plain sum over "
        "a large buffer reads here."
    )
    for path, reason in dict.fromkeys((one.path, one.reason) for one in speeds.dials if one.reason):
        say_wrapped(f"Path {path}: {reason}.")


def _row(one: Speed) -> list[str]:
    return [
        "parent" if one.dial is None else f"{one.dial:g}",
        in_short(one.tokens_per_s),
        f"{1e3 * one.first_token_s:.3g} ms",
        size_text(one.bytes_per_step),
        f"{one.promised:.2f}x",
        f"{one.measured:.2f}x",
        f"{one.bandwidth_share:.0%}",
        one.path,
    ]
