"""``dynaconv eval`` and ``dynaconv generate``: use a converted model at a point of its dial."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynaconv.cli.folders import check_weights, frontier_errors, model_folder, read_layout, scored_folder
from dynaconv.cli.output import print_json, print_note
from dynaconv.cli.table import Column, print_table
from dynaconv.errors import ArtifactError, CheckpointError, ConfigError
from dynaconv.evaluation.perplexity import BATCH, TOKENS, evaluate_folder

if TYPE_CHECKING:
    from dynaconv.dynamic.dial import Dial

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A converted model, or a run that holds one.")]
Scored = Annotated[Path, typer.Argument(metavar="MODEL", help="A converted model, a run, or a dense checkpoint.")]
DialOption = Annotated[
    str | None,
    typer.Option(
        "--dial",
        metavar="D",
        help="Share of the parent's FFN bytes to read for a token, in (0, 1], or full. Left out: the stored point.",
        show_default=False,
    ),
]


class Values(StrEnum):
    """What of the FFNs is held in memory."""

    exact = "exact"
    low_bit = "low-bit"


ValuesOption = Annotated[
    Values, typer.Option("--values", help="What memory holds of the FFNs: low-bit is smaller, slower, less exact.")
]


def evaluate(
    model: Scored,
    data: Annotated[str, typer.Option(metavar="SPEC", help="Text: a file, glob, folder, data set or python-stdlib.")],
    dial: DialOption = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to score at most.")] = TOKENS,
    values: ValuesOption = Values.exact,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings below data, such as data.field=answer.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Score a model on text, at one point of its dial. A dense checkpoint is scored by the same code."""
    from dynaconv.recipes import compose

    folder = scored_folder(model)
    chosen = chosen_dial(folder, dial)
    check_weights(folder)
    config = compose(overrides=[f"data={data}", *(overrides or [])]).data
    with _threads(folder, tokens=min(tokens, BATCH * config.sequence_length), quiet=as_json):
        scores = evaluate_folder(folder, chosen, config, tokens=tokens, values=values.value)
    if as_json:
        print_json(scores)
    else:
        print_table((Column("", words=True), Column("")), [[name, _shown(value)] for name, value in scores.items()])


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from.")],
    dial: DialOption = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to write at most.")] = 128,
    values: ValuesOption = Values.exact,
) -> None:
    """Continue a text at one point of the dial, greedily, token by token."""
    folder = model_folder(model)
    chosen = chosen_dial(folder, dial)
    check_weights(folder)

    import torch
    from transformers import AutoTokenizer, TextStreamer

    from dynaconv.dynamic.modeling import load

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded = load(folder, values=values.value)
    except (OSError, ValueError) as error:
        raise CheckpointError("the model cannot be loaded", where=folder, found=error) from error
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ConfigError("the prompt holds no tokens", hint="--prompt with some text")
    with _threads(folder, tokens=1), torch.inference_mode():
        loaded.eval().generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            dial=chosen,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


def _threads(folder: Path, *, tokens: int, quiet: bool = False) -> AbstractContextManager[None]:
    """As many CPU threads as are fastest for ``tokens`` tokens at a time, chosen now and said on stderr."""
    from dynaconv.pipeline.runner import work_of
    from dynaconv.threads import choose, using

    choice = choose(lambda: replace(work_of(folder), tokens=tokens))
    if choice.reason and not quiet:
        print_note(choice.reason)
    return using(choice.count)


def chosen_dial(folder: Path, text: str | None, option: str = "--dial") -> Dial | None:
    """The dial that ``--dial`` asks for; ``None`` leaves it to the point stored in the model.

    Raises:
        ConfigError: It is no share in (0, 1].
        ArtifactError: The model has no calibrated dial.
        QualityError: It lies below the lowest measured budget.
    """
    if text is None:
        return None
    dial = parsed_dial(text, option)
    if dial.is_full:
        return dial
    layout = read_layout(folder)
    if layout.dial is None or layout.frontier is None:
        hint = f"dynaconv calibrate RUN, then dynaconv export RUN; or {option} full"
        raise ArtifactError("this model has no calibrated dial", where=folder, hint=hint)
    with frontier_errors(where=folder):
        layout.frontier.at(float(text))
    return dial


def parsed_dial(text: str, option: str) -> Dial:
    """The dial that ``text``, the value of ``option``, means.

    Raises:
        ConfigError: It is no share in (0, 1].
    """
    from dynaconv.dynamic.dial import Dial

    try:
        budget = 1.0 if text == "full" else float(text)
    except ValueError:
        budget = math.nan
    if not 0 < budget <= 1:
        expected = "a share of the parent's FFN bytes, above 0 and at most 1, such as 0.5; or full"
        raise ConfigError(f"{option} is {text!r}", expected=expected)
    return Dial(budget=budget)
