"""What a speed measurement runs: parent and dynamic model with one set of weights in memory, and a prompt.

B sequences, T tokens of prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import size_text
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.dynamic.layout import Layout
from dynaconv.dynamic.modeling import load
from dynaconv.errors import CheckpointError, ConfigError
from dynaconv.evaluation.bench import BUFFER, Sizes
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.shapes import imagined, random_dynamic, random_parent, share_weights, sketched_layout
from dynaconv.memory import available_bytes
from dynaconv.profile.skeleton import skeleton

TEXT = """The library opens at nine. Every morning the same old man waits at the door, a newspaper under his arm, and
talks about the weather with whoever stands beside him. Inside it is warm. He takes the chair at the window, reads the
first page twice, and then writes a letter to his sister, who moved to the coast many years ago. He has told her about
the new bridge, about the price of bread, and about a dog that follows the postman from house to house. """
"""What prompts are cut from where no other text is given."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        parent: The stock model.
        model: The dynamic model, with the same weights.
        cost: Of the parent, as it is held in memory.
        prompt: (B, T) int64, on the device of the models.
    """

    parent: Any
    model: Any
    cost: CostModel
    prompt: Tensor


def of_folder(
    folder: Path, sizes: Sizes, device: torch.device, *, dtype: torch.dtype | None = None, text: str | None = None
) -> Subject:
    """A converted model, and its parent with the same weights in the same memory.

    Args:
        folder: A model folder.
        sizes: Of what is generated.
        device: Where.
        dtype: Of the weights in memory; the checkpoint's own where it is ``None``.
        text: What prompts are cut from.

    Raises:
        CheckpointError: The model or its tokenizer cannot be loaded.
        ConfigError: There is not enough memory, no text, or the model is trained for shorter sequences.
    """
    checkpoint = Checkpoint.open(folder)
    held, longest = dtype or checkpoint.dtype, checkpoint.max_positions
    if longest is not None and sizes.prompt + sizes.tokens > longest:
        found = f"--prompt {sizes.prompt} and --tokens {sizes.tokens}"
        raise ConfigError("the sequences are too long for this model", expected=f"{longest} tokens", found=found)
    needed = memory_bytes(checkpoint, Layout.load(folder), held)
    require_memory(needed, device, hint="--dtype bf16, or a machine with more")
    prompt = prompt_of(TEXT if text is None else text, load_tokenizer(folder), sizes)
    try:
        model = load(folder, dtype=held).to(device).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError("the model cannot be loaded", where=folder, found=error) from error
    parent = share_weights(skeleton(checkpoint, held, device), model.dense_state())
    cost = replace(CostModel.of(checkpoint, context=sizes.context), itemsize=held.itemsize)
    return Subject(parent, model, cost, prompt.to(device))


def of_shape(
    config: Mapping[str, Any], budgets: Sequence[float], sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> Subject:
    """Random weights of a shape, and a dial solved on random tokens.

    Args:
        config: Content of ``config.json``; see :func:`~dynaconv.evaluation.shapes.shape_config`.
        budgets: Of the dial, ascending, below 1.
        sizes: Of what is generated.
        device: Where.
        dtype: Of the weights.

    Raises:
        ConfigError: There is not enough memory, or a budget is below what the routers read.
    """
    checkpoint = imagined(config, dtype)
    require_memory(_needed(config, dtype), device, hint=_fewer_layers(config, dtype, device))
    parent = random_parent(checkpoint, device)
    model = random_dynamic(checkpoint, parent, budgets)
    generator = torch.Generator().manual_seed(1)  # other tokens than the dial was solved on
    prompt = torch.randint(checkpoint.sizes["vocab"], (sizes.batch, sizes.prompt), generator=generator)
    return Subject(parent, model, CostModel.of(checkpoint, context=sizes.context), prompt.to(device))


def prompt_of(text: str, tokenizer: Any, sizes: Sizes) -> Tensor:
    """Prompts (B, T) cut from ``text``, which is repeated where it is short; each begins somewhere else.

    Raises:
        ConfigError: The text holds no tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("the text for prompts holds no tokens", hint="--text with some text in it")
    starts = [sequence * len(ids) // sizes.batch for sequence in range(sizes.batch)]
    return torch.tensor([[ids[(start + i) % len(ids)] for i in range(sizes.prompt)] for start in starts])


def memory_bytes(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype) -> int:
    """Memory that parent and dynamic model need together: weights once, few-bit copies, the buffer that is read."""
    ffns = checkpoint.layers * checkpoint.ffn_parameters
    copies = 0 if layout.copy is None else 1 + layout.copy.values  # made to be computed with, as calibration counts
    return (checkpoint.parameters + copies * ffns) * dtype.itemsize + BUFFER


def require_memory(needed: int, device: torch.device, *, hint: str) -> None:
    """Stops before anything is made that does not fit.

    Raises:
        ConfigError: ``device`` has less than ``needed`` bytes to give.
    """
    available = free_bytes(device)
    if available is not None and needed > available:
        expected, found = f"about {size_text(needed)}", f"{size_text(available)} available"
        raise ConfigError("not enough memory for this model", expected=expected, found=found, hint=hint)


def free_bytes(device: torch.device) -> int | None:
    """Memory that ``device`` has to give; ``None`` where that is not known."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def _needed(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    checkpoint = imagined(config, dtype)
    return memory_bytes(checkpoint, sketched_layout(checkpoint), dtype)


def _fewer_layers(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> str:
    """What to try where the whole shape does not fit."""
    available, layers = free_bytes(device) or math.inf, int(config["num_hidden_layers"])
    fits = (n for n in range(layers - 1, 0, -1) if _needed({**config, "num_hidden_layers": n}, dtype) <= available)
    most = next(fits, None)
    return "--layers 1 --vocab 2048, or a smaller shape" if most is None else f"--layers {most}, which fits"
