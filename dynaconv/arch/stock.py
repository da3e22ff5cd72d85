"""Stock models of transformers: loading one, and what it calls the tensors that a checkpoint stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynaconv.arch.checkpoint import Checkpoint


def stock_names(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Stored name -> name in ``model``, the stock model of ``checkpoint``.

    They differ where transformers calls the head something else than the checkpoints it loads and saves (GPT-NeoX).
    """
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return {
        name: f"{heads[0]}.{name.rpartition('.')[2]}" if slot.spec.part == "head" else name
        for name, slot in checkpoint.slots.items()
    }


def load_dense(folder: Path, device: torch.device) -> Any:
    """The dense checkpoint in ``folder`` as transformers loads it: frozen, in its own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval().requires_grad_(False)
