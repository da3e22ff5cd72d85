"""Tiny dynamic models for tests: random weights, routers with random opinions, a dial table solved by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynaconv.arch.blocks import block_edges
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.dynamic.layout import DialTable, FFNLayout, Layout, RouterLayout
from dynaconv.dynamic.modeling import attach

ROUTERS = {
    "gate": RouterLayout("gate", linear=False, rank=8, bound=3.0),
    "curve": RouterLayout("curve", linear=True, rank=0),
    "class": RouterLayout("class", linear=True, rank=8),
    "none": RouterLayout("none"),
}
LEVELS = {"gate": (0.5, 2.0, 8.0), "curve": (-1.0, 0.5, 40.0), "class": (0.3, 0.6, 1.0), "none": (1.0, 2.0, 4.0)}


def dynamic_model(folder: Path, kind: str = "gate", *, blocks: int = 4, seed: int = 1) -> Any:
    """The dense checkpoint in ``folder``, made dynamic without reordering, with opinionated routers."""
    checkpoint = Checkpoint.open(folder)
    ffn = checkpoint.family.ffn
    levels = tuple((level,) * checkpoint.layers for level in LEVELS[kind])
    layout = Layout(
        edges=block_edges(checkpoint.sizes["ffn"], blocks),
        layers=checkpoint.layers,
        ffn=FFNLayout(ffn.path, ffn.gate, ffn.up, ffn.down, ffn.activation),
        router=ROUTERS[kind],
        dial=DialTable((0.25, 0.5, 1.0), levels, (0.8, 0.9, 1.0)),
    )
    torch.manual_seed(seed)
    model = attach(AutoModelForCausalLM.from_pretrained(folder), layout)
    with torch.no_grad():
        for ffn_module in model.ffns():
            for parameter in ffn_module.router.parameters():
                parameter.normal_(0.0, 0.4)
    return model.eval()


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(B, T) random tokens of the tests' tokenizer."""
    return torch.randint(1, 257, (batch, length), generator=torch.Generator().manual_seed(seed))
