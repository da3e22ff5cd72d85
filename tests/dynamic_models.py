"""Tiny dynamic models for tests: random weights, routers with random opinions, a dial table solved by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.registry import known_families
from dynaconv.config import LossConfig, LossesConfig
from dynaconv.dynamic.layout import CopyLayout, DialTable, FFNLayout, Layout, RouterLayout
from dynaconv.dynamic.modeling import attach, load_routers
from dynaconv.frontier import Frontier, OperatingPoint
from dynaconv.kernels.partition import Partition

ROUTERS = {
    "width": RouterLayout("width", linear=False, rank=8, bound=3.0),
    "curve": RouterLayout("curve", linear=True, rank=0),
    "class": RouterLayout("class", linear=True, rank=8),
    "linear": RouterLayout("linear", linear=True, rank=8, bound=3.0),
    "sketch": RouterLayout("sketch", bits=3, coarse=2, reach=0.7),
    "none": RouterLayout("none"),
}
SELF_TAUGHT: dict[str, Any] = {  # settings of fine-tuning without a parent
    "teacher": "self",
    "budgets": [0.2, 0.75],
    "losses": LossesConfig(full=LossConfig(0.5), distill=LossConfig(0.5), distill_full=LossConfig(0.0)),
}
THRESHOLDS = {  # of the budgets .25, .5 and 1
    "width": (-0.5, -2.0, -8.0),
    "curve": (1.0, -0.5, -40.0),
    "class": (0.7, 0.4, 0.0),
    "linear": (0.7, 0.0, -4.0),
    "sketch": (-2.0, -3.5, -12.0),
    "none": (-1.0, -2.0, -4.0),
}
MARGIN = 1.0
"""How far above its threshold a neuron of :func:`neurons_model` has exact values, in nats."""


def even_blocks(neurons: int, blocks: int) -> Partition:
    """``blocks`` blocks whose sizes differ by one neuron at most."""
    return Partition.at([neurons * n // blocks for n in range(blocks + 1)])


def a_frontier(budgets: tuple[float, ...], qualities: tuple[float, ...]) -> Frontier:
    """A frontier whose other figures mean nothing."""
    names = ("bytes_share", "flops_share", "active_share", "exact_share")
    rest = dict.fromkeys(("flops_per_token", "bytes_per_token", "loss", "agreement"), 1.0)
    points = tuple(
        OperatingPoint(budget=budget, quality=quality, **dict.fromkeys(names, budget), **rest)
        for budget, quality in zip(budgets, qualities, strict=True)
    )
    return Frontier(points[-1], points)


def layout_of(folder: Path, kind: str = "width", *, blocks: int = 4, partition: Partition | None = None) -> Layout:
    """The layout of the dense checkpoint in ``folder`` with routers of ``kind``, calibrated by hand."""
    checkpoint, budgets = Checkpoint.open(folder), (0.25, 0.5, 1.0)
    thresholds = tuple((threshold,) * checkpoint.layers for threshold in THRESHOLDS[kind])
    return Layout(
        partition=partition or even_blocks(checkpoint.sizes["ffn"], blocks),
        layers=checkpoint.layers,
        ffn=FFNLayout(**asdict(checkpoint.family.ffn)),
        router=ROUTERS[kind],
        dial=DialTable(budgets, thresholds),
        frontier=a_frontier(budgets, (0.8, 0.9, 1.0)),
    )


def dynamic_model(
    folder: Path,
    kind: str = "width",
    *,
    blocks: int = 4,
    seed: int = 1,
    partition: Partition | None = None,
    stock: Any = None,
) -> Any:
    """The dense checkpoint in ``folder``, made dynamic without reordering, with opinionated routers.

    Args:
        folder: The checkpoint.
        kind: Of the routers.
        blocks: N.
        seed: Of the routers.
        partition: The blocks, where ``blocks`` does not say enough.
        stock: The model that becomes dynamic, where it is not simply what ``folder`` holds.
    """
    layout = layout_of(folder, kind, blocks=blocks, partition=partition)
    model = attach(AutoModelForCausalLM.from_pretrained(folder) if stock is None else stock, layout)
    generator = torch.Generator().manual_seed(seed)
    load_routers(
        model,
        {name: 0.4 * torch.randn(value.shape, generator=generator) for name, value in model.router_state().items()},
    )
    return model.eval()


def neurons_model(
    folder: Path,
    *,
    copy: CopyLayout = CopyLayout(bits=4, group=32, values=True),  # noqa: B008
    router: RouterLayout = ROUTERS["sketch"],
    means: tuple[float, ...] = (0.25, 0.5),
    seed: int = 1,
    stock: Any = None,
) -> Any:
    """The dense checkpoint in ``folder`` with sketch routers over single neurons, calibrated by hand.

    Args:
        folder: The checkpoint.
        copy: Of the weights; tokens use low-bit values where it has any.
        router: Of the sketch.
        means: Budgets of the sets of means, which are random.
        seed: Of the means.
        stock: See :func:`dynamic_model`.
    """
    checkpoint = Checkpoint.open(folder)
    layout = layout_of(folder, "sketch", partition=Partition.equal(checkpoint.sizes["ffn"], 1))
    assert layout.dial is not None
    rows = layout.dial.thresholds
    exact = (*(tuple(threshold + MARGIN for threshold in row) for row in rows[:-1]), rows[-1])
    table = replace(layout.dial, exact=exact if copy.values else ())
    itemsize = checkpoint.dtype.itemsize
    layout = replace(layout, router=router, copy=copy, means=means, itemsize=itemsize, dial=table)
    stock = AutoModelForCausalLM.from_pretrained(folder) if stock is None else stock
    generator = torch.Generator().manual_seed(seed)
    model = attach(stock, layout)
    state = model.router_state()
    load_routers(model, {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()})
    for ffn in model.ffns():
        ffn.router.up_mean.abs_()
    return model.eval()


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(B, T) random tokens of the tests' tokenizer."""
    return torch.randint(1, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def masked_neurons(stock: Any, family: str, kept: Iterable[int] | torch.Tensor) -> Iterator[None]:
    """A stock model without the FFN neurons that are not in ``kept``; (L, n) where they differ by layer."""
    spec, hooks = known_families()[family].ffn, []
    kept = torch.as_tensor(kept if isinstance(kept, torch.Tensor) else list(kept), dtype=torch.int64)
    for layer in range(stock.config.num_hidden_layers):

        def mask(module: Any, args: tuple[torch.Tensor], layer: int = layer) -> tuple[torch.Tensor]:
            on = torch.zeros(args[0].shape[-1], dtype=args[0].dtype)
            return (args[0] * on.index_fill(0, kept[layer] if kept.dim() == 2 else kept, 1.0),)

        down = stock.get_submodule(f"{spec.path.format(layer=layer)}.{spec.down}")
        hooks.append(down.register_forward_pre_hook(mask))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
