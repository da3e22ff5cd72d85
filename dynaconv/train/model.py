"""The model that fine-tuning trains, the one that teaches it, and the checkpoint that comes out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint, copy_side_files
from dynaconv.arch.stock import stock_names
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.artifacts.writer import CheckpointWriter, write_tensors
from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.layout import ROUTER_FILE, Layout
from dynaconv.dynamic.modeling import attach
from dynaconv.train.engine import Engine
from dynaconv.train.router_kinds import router_layout, starts_from
from dynaconv.train.trainable import BASE, add_adapters, choose, merged


def trainable_model(folder: Path, tuning: FinetuneConfig) -> Any:
    """The carved model in fp32 with the routers that ``tuning`` trains, and all else that it does not train frozen.

    Routers of a kind that carve solves start from its solution, whose scores they give exactly; others start silent,
    with the same score for every token.
    """
    layout = Layout.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tuning.trainable == "lora":
        add_adapters(stock, tuning)
    router = router_layout(tuning, stock.config.hidden_size, layout.router)
    model = attach(stock, replace(layout, router=router, dial=None, frontier=None))
    if starts_from(layout.router, router.kind):
        known = read_tensors(folder / ROUTER_FILE)
        for ffn in model.ffns():
            prefix = f"layers.{ffn.site.index}.router."
            own = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
            ffn.router.load_state_dict(own, strict=False)  # the hidden branch is new, and silent
    choose(model, tuning.trainable)
    if tuning.gradient_checkpointing:
        # transformers 5.23 has a new name for it and warns at the old one
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def write_checkpoint(engine: Engine, carved: Path, folder: Path, shard_bytes: int) -> None:
    """Writes the weights, adapters merged, under the parent's names and dtypes, routers and layout beside them.

    Every rank takes part; rank 0 writes.

    Args:
        engine: Has the trained model.
        carved: What it was loaded from.
        folder: Where to.
        shard_bytes: Largest shard.
    """
    if not engine.ranks.main:
        for _ in engine.weights():  # hands over this rank's parts
            pass
        return
    network, checkpoint = engine.network, Checkpoint.open(carved)
    stored = {name: stored for stored, name in stock_names(checkpoint, network).items()}
    routers, tuned = router_names(network), dict[str, Tensor]()
    layout = [(info.name, info.dtype, info.shape) for info in checkpoint.reader.tensors.values()]
    dtypes = {name: dtype for name, dtype, _ in layout}
    with CheckpointWriter(folder, layout, shard_bytes=shard_bytes) as writer:
        for name, value in merged(network, engine.weights()):
            if name in routers:
                tuned[routers[name]] = value.detach().cpu().clone()
            elif stored.get(name) in dtypes:
                writer.write(stored[name], value.detach().to("cpu", dtypes[stored[name]]))
    copy_side_files(carved, folder)
    shutil.copyfile(carved / "config.json", folder / "config.json")
    network.layout.save(folder)
    if tuned:
        write_tensors(folder / ROUTER_FILE, tuned)


def router_names(network: Any) -> dict[str, str]:
    """What ``router_state`` calls what the stock FFNs do not have, by the network's own names without adapters."""
    places = {id(module): name.replace(BASE, ".") for name, module in network.named_modules()}
    return {
        f"{places[id(ffn)]}.{name}": f"layers.{ffn.site.index}.{name}"
        for ffn in network.ffns()
        for name in ffn.own_state()
    }
