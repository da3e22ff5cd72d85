"""AdamW as every engine runs it: parameter groups, their peak learning rates, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from dynaconv.config import FinetuneConfig


def parameter_groups(network: Any, config: FinetuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters that are trained: their names, peak learning rates and weight decay."""
    routers = {id(p) for ffn in network.ffns() for p in ffn.router.parameters()}
    vectors = {id(ffn.means) for ffn in network.ffns()}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    dims = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in named}  # DeepSpeed may have taken p apart
    groups = {
        "weights": [(n, p) for n, p in named if id(p) not in routers | vectors and dims[n] > 1],
        "vectors": [(n, p) for n, p in named if id(p) not in routers and (dims[n] <= 1 or id(p) in vectors)],
        "routers": [(n, p) for n, p in named if id(p) in routers],
    }
    peaks = {"routers": config.router_learning_rate}
    decays = {"weights": config.weight_decay}
    return [
        {
            "params": [p for _, p in group],
            "names": [n for n, _ in group],
            "name": name,
            "peak": peaks.get(name, config.learning_rate),
            "weight_decay": decays.get(name, 0.0),
        }
        for name, group in groups.items()
        if group
    ]


def adamw(groups: list[dict[str, Any]], config: FinetuneConfig) -> torch.optim.AdamW:
    """The optimizer of every engine, over :func:`parameter_groups`."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]))


def set_learning_rates(optimizer: Any, peaks: list[float], factor: float) -> None:
    """Sets the learning rate of each group to ``factor`` times its peak."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the peak learning rates at ``step`` (from 0): linear warm-up, times cosine decay to zero."""
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
