"""The stock transformers model of a checkpoint without its weights, and loading parts of it from the shards.

Parameters start on the meta device, where they take no memory. What a model computes instead of storing (rotary
frequencies) is made for real at once: such buffers are in no shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.errors import CheckpointError, suggest


def skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> Any:
    """The checkpoint's causal language model, every parameter on the meta device, every buffer on ``device``.

    Args:
        checkpoint: Whose model.
        dtype: What it computes in.
        device: Where it will run.
        trust_remote_code: Let transformers run code from the checkpoint's folder.

    Raises:
        CheckpointError: transformers cannot build the model that ``config.json`` describes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise CheckpointError("transformers cannot build this model", where=checkpoint.folder, found=found) from error
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _compute_buffers(model, module, device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _compute_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Gives ``module`` of ``model`` the buffers that no checkpoint stores, as transformers does when it loads one."""
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, torch.empty_like(buffer, device=device))
    model._init_weights(module)  # its parameters are on the meta device, where nothing happens


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The nonlinearity that transformers calls ``name``.

    Raises:
        CheckpointError: transformers knows no such one.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise CheckpointError(f"transformers has no activation called {name!r}", expected=suggest(name, ACT2FN))
    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function


def load(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Iterable[str],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Gives ``module`` all its tensors: ``names`` are ``prefix``, a dot, and the module's own names for them.

    Raises:
        CheckpointError: A tensor holds NaN or infinity (the tensor is named), or its file changed.
    """
    read = checkpoint.reader.read_finite
    state = {name.removeprefix(f"{prefix}."): read(name).to(device, dtype) for name in names}
    module.load_state_dict(state, assign=True)


@contextmanager
def borrowing(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """``module`` computes with ``tensors`` in place of its parameters of these names, for the duration of the block."""
    kept = {name: module.get_parameter(name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in kept.items():
            setattr(module, name, parameter)


@contextmanager
def loaded(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Iterable[str],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """As :func:`load`, for the duration of the block: afterwards ``module`` takes no memory again."""
    load(module, checkpoint, names, prefix, dtype, device)
    try:
        yield
    finally:
        module.to("meta")


@contextmanager
def lent(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Iterable[str],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """As :func:`loaded`, but every submodule reads its tensors when it is called and drops them when it is done.

    One projection is in memory at a time, and is read again for every call.

    Raises:
        CheckpointError: When a submodule is called: as :func:`load`.
    """
    owned: dict[str, dict[str, str]] = {}
    for name in names:
        path, _, own = name.removeprefix(f"{prefix}.").rpartition(".")
        owned.setdefault(path, {})[own] = name
    read = checkpoint.reader.read_finite
    open_now: list[tuple[nn.Module, AbstractContextManager[None]]] = []

    def begin(called: nn.Module, _: Any) -> None:
        tensors = {own: read(name).to(device, dtype) for own, name in of[called].items()}
        lending = borrowing(called, tensors)
        lending.__enter__()
        open_now.append((called, lending))

    def end(called: nn.Module, _: Any, __: Any) -> None:
        while open_now and open_now[-1][0] is called:
            open_now.pop()[1].__exit__(None, None, None)

    of = {module.get_submodule(path): tensors for path, tensors in owned.items()}
    hooks = [each.register_forward_pre_hook(begin) for each in of]
    hooks += [each.register_forward_hook(end, always_call=True) for each in of]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
