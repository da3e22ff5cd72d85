r"""Pretrains a dense model to convert: the embedded default's recipe at any shape.

    python scripts/pretrain_base.py --out base                      the embedded default's settings
    python scripts/pretrain_base.py --out base-80m --hidden 768 --layers 12 --vocabulary 8192 --positions 1024 \
        --sequence-length 512 --batch 64 --accumulation 4 --tokens 2e8 --lr 1e-3 --dtype bf16 --data corpus/

    python scripts/pretrain_base.py --out relu-4m --family opt --hidden 256 --vocabulary 2048 --tokens 4e7 --batch 8

Sizes that are not given follow from --hidden: heads of 64 (32 below a width of 256), half as many key and value heads,
and an FFN of three times the width, rounded up to 128 neurons so that it cuts into 8 blocks. Families without a gate
(gpt2, opt) have an FFN of four times the width, and as many key and value heads as query heads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dynaconv.cli.quiet import silence_libraries
from dynaconv.errors import DynaconvError


def main(
    out: Annotated[Path, typer.Option(help="Folder that is made.")],
    data: Annotated[list[str] | None, typer.Option(help="Text; may be given more than once.")] = None,
    validation: Annotated[list[str] | None, typer.Option(help="Held-out text; else a share of --data.")] = None,
    field: Annotated[str, typer.Option(help="Text field of records.")] = "text",
    family: Annotated[str, typer.Option(help="llama, qwen3, gpt2 or opt.")] = "llama",
    hidden: Annotated[int, typer.Option(help="Residual width.")] = 128,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    ffn: Annotated[int | None, typer.Option(help="FFN neurons.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = 1024,
    positions: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    untied: Annotated[bool, typer.Option("--untied", help="A head of its own.")] = False,
    tokens: Annotated[float, typer.Option(help="Training tokens, such as 2e8.")] = 768e3,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows in an optimiser step.")] = 2,
    accumulation: Annotated[int, typer.Option(help="Micro-batches a step is cut into.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-3,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 for autocast; saved as fp32.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds weights and data order.")] = 0,
) -> None:
    """Pretrains a dense model and saves it with its tokenizer, its held-out loss and what it was made with."""
    import torch

    from dynaconv.config import DataConfig
    from dynaconv.progress import Progress
    from dynaconv.train.pretrain import Pretraining, Schedule, pretrain
    from dynaconv.train.shape import UNGATED, Shape

    if dtype not in ("fp32", "bf16"):
        raise typer.BadParameter(f"{dtype!r} is neither fp32 nor bf16", param_hint="--dtype")
    heads = heads or max(1, hidden // (64 if hidden >= 256 else 32))
    gated = family not in UNGATED
    shape = Shape(
        hidden=hidden,
        ffn=ffn or -(-(3 if gated else 4) * hidden // 128) * 128,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads or (heads // 2 if gated and heads % 2 == 0 else heads),
        vocabulary=vocabulary,
        positions=positions,
        tied=not untied,
        family=family,
    )
    schedule = Schedule(
        tokens=int(tokens),
        batch_size=batch,
        accumulation=accumulation,
        learning_rate=lr,
        precision=dtype,
        seed=seed,
        threads=threads,
    )
    text = DataConfig(
        train=data or ["python-stdlib"], validation=validation or None, field=field, sequence_length=sequence_length
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress() as progress:
        pretrain(out, Pretraining(shape, schedule, text), progress, device=device)


if __name__ == "__main__":
    silence_libraries()
    try:
        typer.run(main)
    except DynaconvError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
