"""DeepSpeed behind the engine protocol: ZeRO 0 to 3, offload, one global clip, AdamW of torch with our groups.

Weights are kept in fp32; ``finetune.precision: bf16`` runs forward passes under autocast, as with plain torch. Every
rank reads the whole model before ZeRO 3 takes it apart. Importing this file does not import deepspeed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dynaconv.config import RunConfig
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import Decision
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.site import Site
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.kernels.choice import Soft
from dynaconv.ranks import Ranks
from dynaconv.train.deepspeed_config import deepspeed_config
from dynaconv.train.optimizer import adamw, parameter_groups, set_learning_rates
from dynaconv.train.precision import autocast

TAG = "engine"


class DeepSpeedEngine:
    """DeepSpeed with the optimizer, groups and learning rates of :class:`dynaconv.train.engine.TorchEngine`.

    Args:
        network: The dynamic model, whole, on any device.
        config: The recipe.
        ranks: The processes that train together.

    Raises:
        ConfigError: ``engine.deepspeed_config`` contradicts the recipe, or deepspeed is not installed.
    """

    def __init__(self, network: Any, config: RunConfig, ranks: Ranks) -> None:
        deepspeed = import_deepspeed(ranks)
        self.network, self.device, self.ranks, self.config = network, ranks.device, ranks, config.finetune
        self.stage, self.offloads = config.engine.zero_stage, config.engine.offload_optimizer
        self.kind = f"deepspeed-zero{self.stage}" + "-offload" * self.offloads
        self._counts = {name: tensor.numel() for name, tensor in network.state_dict().items()}
        if self.stage == 3:
            _declare_leaves(deepspeed, network)
            if not network.get_input_embeddings().weight.requires_grad:
                network.enable_input_require_grads()  # or the weights of the first FFN are dropped before their turn
        optimizer = adamw(parameter_groups(network, config.finetune), config.finetune)
        self.peaks = [group["peak"] for group in optimizer.param_groups]
        settings = deepspeed_config(config, ranks.world)
        with _captured_output():
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._deepspeed = deepspeed

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What DeepSpeed leaves to us: the parent's passes run in the same precision as its own."""
        return autocast(self.config, self.device)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients of ``loss``; DeepSpeed reduces them over ranks when its stage wants to.

        With offload it hands on the gradients of those parameters alone that the last pass reaches, so one of a single
        token, with a gradient of zero, reaches all.
        """
        self.model.set_gradient_accumulation_boundary(last and not self.offloads)
        if self.stage > 0:  # DeepSpeed does so in a forward pass; without one in between, it forgets the last gradients
            self.optimizer.clear_backward_seen_flag()
        # Times one: a loss that is itself an output of the model, DeepSpeed would scale all the same.
        self.model.backward(loss * 1, scale_wrt_gas=False)
        if last and self.offloads:
            with self.network.call.using(_AllOn()), self.autocast():
                logits = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device)).logits
            self.model.set_gradient_accumulation_boundary(True)
            self.model.backward(0 * logits.float().sum(), scale_wrt_gas=False)

    def step(self, factor: float) -> dict[str, float]:
        """One AdamW step."""
        set_learning_rates(self.optimizer, self.peaks, factor)
        norm = None
        if self.stage == 0:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self.model.step()
        for kept in getattr(self.optimizer, "accumulated_grads_in_cpu", {}).values():
            kept.zero_()  # ZeRO 2 would add to what is left of a parameter that the first pass does not reach
        norm = self.model.get_global_grad_norm() if norm is None else norm
        return {"gradient_norm": float(norm)}

    def save(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint: each rank writes its part."""
        self.model.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote at the same number of ranks.

        Raises:
            ArtifactError: DeepSpeed finds nothing it can load.
        """
        found, _ = self.model.load_checkpoint(str(folder), tag=TAG)
        if found is None:
            raise ArtifactError("DeepSpeed cannot load the saved state", where=folder, hint="remove it to begin again")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whole, one at a time; with ZeRO 3, gathered from all ranks.

        Raises:
            ArtifactError: A gathered tensor has another number of elements than the network began with.
        """
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            with self._whole(tensor):
                if tensor.numel() != self._counts[name]:
                    expected = f"{self._counts[name]} elements"
                    raise ArtifactError(
                        "gathering the weights lost some", where=name, expected=expected, found=tensor.numel()
                    )
                yield name, tensor.detach()

    def _whole(self, tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
        if not hasattr(tensor, "ds_id"):
            return contextlib.nullcontext()
        gathered: contextlib.AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters([tensor])
        return gathered


def import_deepspeed(ranks: Ranks) -> Any:
    """The module, silent, with a process group to work in even where there is one process.

    Raises:
        ConfigError: It is not installed.
    """
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        backend = "gloo" if ranks.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        import deepspeed
    except ImportError as error:
        hint = "pip install 'dynaconv[deepspeed]', or engine.kind=torch"
        raise ConfigError("engine.kind is deepspeed, and that is not installed", found=error, hint=hint) from error
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout is the result's
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on the spot; gloo does the same
    with _captured_output():
        deepspeed.init_distributed(verbose=False)
    return deepspeed


@contextlib.contextmanager
def _captured_output() -> Iterator[None]:
    """Keeps what DeepSpeed prints for the log: stdout is the result's."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            logging.getLogger("dynaconv").debug("DeepSpeed: %s", line)


class _AllOn:
    """Policy: all blocks, with a gradient of zero to the routers, so that a backward pass reaches them."""

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """Ones, (..., N)."""
        nothing = 0 * router(x).reshape(*x.shape[:-1], -1).sum(-1, keepdim=True)
        return Decision(Soft(nothing + torch.ones(site.blocks, device=x.device)))


def _declare_leaves(deepspeed: Any, network: Any) -> None:
    """Tells ZeRO 3 that an FFN's weights belong together: its dial decides what is called in it, and how often."""
    deepspeed.utils.set_z3_leaf_modules(network, [DynamicFFN])
    for ffn in network.ffns():
        if ffn.names.gate is None:  # its up projection runs the whole network, so it needs the down projection's too
            ffn.hooks_only_move_weights = True
            opening, closing = ffn.projections()
            for parameter in closing.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(opening, parameter)
