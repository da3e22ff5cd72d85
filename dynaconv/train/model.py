"""The model that fine-tuning trains, the one that teaches it, and the checkpoint that comes out."""

from __future__ import annotations

import math
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
from dynaconv.dynamic.layout import ROUTER_FILE, Layout, RouterLayout
from dynaconv.dynamic.modeling import attach
from dynaconv.train.engine import Engine
from dynaconv.train.trainable import add_adapters, choose, merged


def routed_model(folder: Path, tuning: FinetuneConfig) -> Any:
    """The carved model in fp32 with the routers that ``tuning`` trains, and all else that it does not frozen.

    ``curve`` routers and those of routed experts start from the closed-form ones, the others silent: every token alike.
    """
    layout = Layout.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tuning.trainable == "lora":
        add_adapters(stock, tuning)
    router = router_layout(tuning, stock.config.hidden_size, routed=layout.routed)
    model = attach(stock, replace(layout, router=router, dial=None, frontier={}))
    if router.kind == layout.router.kind in ("curve", "blocks"):
        known = read_tensors(folder / ROUTER_FILE)
        for ffn in model.ffns():
            prefix = f"layers.{ffn.layer}.router."
            own = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
            ffn.router.load_state_dict(own, strict=False)
    choose(model, tuning.trainable)
    if tuning.gradient_checkpointing:
        # transformers 5.23 has a new name for it and warns at the old one
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def router_layout(tuning: FinetuneConfig, hidden_size: int, *, routed: bool = False) -> RouterLayout:
    """Routers of the kind that ``tuning`` trains, for a residual width of ``hidden_size``, of routed experts or not."""
    if tuning.router == "uniform":
        return RouterLayout()
    rank = tuning.router_rank or 64 * math.ceil(hidden_size / 16 / 64)
    kind = "blocks" if routed else tuning.router
    return RouterLayout(kind, linear=kind != "gate", rank=rank, bound=tuning.bound)


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
    if network.layout.router.kind != "none":
        write_tensors(folder / ROUTER_FILE, tuned)


def router_names(network: Any) -> dict[str, str]:
    """What ``router_state`` calls the router parameters, by the network's own names."""
    places = {id(module): name for name, module in network.named_modules()}
    return {
        f"{places[id(ffn)]}.router.{name}": f"layers.{ffn.layer}.router.{name}"
        for ffn in network.ffns()
        for name, _ in ffn.router.named_parameters()
    }
