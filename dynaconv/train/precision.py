"""The precision that training computes in. Weights and optimizer states are fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dynaconv.config import FinetuneConfig


def autocast(config: FinetuneConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where ``config`` asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
