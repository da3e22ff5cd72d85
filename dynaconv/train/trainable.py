"""Which parameters a run trains; adapters of low rank (LoRA, arXiv 2106.09685) through peft, and merging them.

Routers are always trained. Adapters are put on every linear layer of the stock model but the head, before it is made
dynamic, so a dynamic FFN computes with them like any other projection. They are merged tensor by tensor when the result
is written, which then has the parent's names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.ffn import DynamicFFN

BASE, DOWN, UP = ".base_layer.", ".lora_A.", ".lora_B."


def add_adapters(stock: nn.Module, config: FinetuneConfig) -> None:
    """Puts an adapter on each linear layer of ``stock`` but its head, in place; they start as no change at all."""
    from peft import LoraConfig, inject_adapter_in_model

    head = stock.get_output_embeddings()  # type: ignore[operator]
    layers = {name: m for name, m in stock.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    for kind in {type(module) for module in layers.values()}:  # Conv1D stores its weight the other way round
        names = [name for name, module in layers.items() if type(module) is kind]
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=0.0,
            target_modules=names,
            fan_in_fan_out=kind is Conv1D,
        )
        inject_adapter_in_model(settings, stock)


def choose(network: Any, trainable: str) -> None:
    """Freezes what ``trainable`` (see :class:`FinetuneConfig`) leaves alone in the dynamic ``network``."""
    if trainable == "all":
        return
    chosen = {id(value) for ffn in network.ffns() for value in ffn.own_state().values()}
    if trainable == "ffn":
        projections = [module for ffn in network.ffns() for module in ffn.projections()]
        chosen |= {id(p) for module in projections for p in module.parameters()}
    for name, parameter in network.named_parameters():
        adapter = trainable == "lora" and (DOWN in name or UP in name)
        parameter.requires_grad_(adapter or id(parameter) in chosen)


def down_weight(ffn: DynamicFFN) -> Tensor:
    """The matrix (D, F) that the down projection of ``ffn`` computes with: its weight, and what its adapters add."""
    module: Any = ffn.projections()[-1]
    weight: Tensor = module.weight
    for adapter in getattr(module, "active_adapters", ()):
        weight = weight + module.get_delta_weight(adapter)
    return weight.t() if isinstance(getattr(module, "base_layer", module), Conv1D) else weight


def merged(network: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """``weights`` by the network's names, with what adapters add put into the weights they adapt.

    Args:
        network: Says which layers have adapters.
        weights: Each layer's weight before its adapter's two matrices, as in a state dict.
    """
    held: dict[str, Tensor] = {}
    for name, value in weights:
        if name.endswith(f"{BASE}weight"):
            held[name.removesuffix(f"{BASE}weight")] = value
        elif DOWN in name:
            held[name.partition(DOWN)[0] + DOWN] = value
        elif UP in name:
            layer = name.partition(UP)[0]
            module: Any = network.get_submodule(layer)
            base, change = held.pop(layer), value.float() @ held.pop(layer + DOWN).float()
            change = (change.t() if module.fan_in_fan_out else change) * module.scaling["default"]
            yield f"{layer}.weight", (base.float() + change).to(base.dtype)
        else:
            yield name.replace(BASE, "."), value
