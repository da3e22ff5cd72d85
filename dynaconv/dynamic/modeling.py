"""The dynamic model: a stock transformers model whose FFNs listen to a dial.

``load(folder)`` builds the stock class that ``config.json`` names, through transformers' own loading, then puts a
:class:`DynamicFFN` to work in the place of each FFN. Nothing else of the stock model changes, so caches, generation,
quantised attention and ``device_map`` work as they do there. ``DynaconvForCausalLM`` is the same behind
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from dynaconv.dynamic.context import checkpoint_contexts, current_policy, using
from dynaconv.dynamic.dial import Dial, as_dial
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.layout import LAYOUT_FILE, OPERATING_POINT_FILE, ROUTER_FILE, Layout
from dynaconv.dynamic.policy import Full, Policy, Routed, Uniform

DialLike = Dial | float | Sequence[Dial | float]


class DynamicMixin:
    """What a dynamic model adds to its stock class.

    Attributes:
        layout: Blocks, routers and the calibrated dial.
        dial: Used by calls that name none: the stored operating point, or the full dial.
    """

    layout: Layout
    dial: Dial

    def policy(self, dial: DialLike | None = None) -> Policy:
        """The policy of ``dial``; of the surrounding call, or of the model's own dial, where it is ``None``.

        Raises:
            ValueError: A dial that this model cannot follow, such as a budget before calibration.
        """
        if dial is None:
            return current_policy() or self.policy(self.dial)
        value = as_dial(dial)
        if isinstance(value, Dial):
            if value.is_full:
                return Full()
            if value.width is not None:
                return Uniform(value.width)
            return Routed(torch.tensor(value.levels(self.layout.dial, self.layout.layers)))
        if not value:
            raise ValueError("one dial a sequence was asked for, and the list is empty")
        return Routed(torch.tensor([one.levels(self.layout.dial, self.layout.layers) for one in value]))

    def ffns(self) -> list[DynamicFFN]:
        """The L dynamic FFNs, in order."""
        assert isinstance(self, nn.Module)
        return [module for module in self.modules() if isinstance(module, DynamicFFN)]

    def generate(self, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        """Stock ``generate`` at ``dial``: a budget, a :class:`Dial`, or one for each sequence of the batch."""
        with using(self.policy(dial)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **settings: Any
    ) -> None:
        """Where transformers' ways of turning activation checkpointing on meet: recomputed layers keep their dial.

        Raises:
            ValueError: Reentrant checkpointing is asked for, which cannot carry the dial.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("reentrant activation checkpointing loses the dial: use use_reentrant=False")
        carrying = functools.partial(gradient_checkpointing_func, context_fn=checkpoint_contexts)
        super()._set_gradient_checkpointing(enable, carrying, **settings)  # type: ignore[misc]

    def router_state(self) -> dict[str, Tensor]:
        """Router parameters as ``dynaconv.safetensors`` names them."""
        return {
            f"layers.{ffn.layer}.router.{name}": value.detach()
            for ffn in self.ffns()
            for name, value in ffn.router.state_dict().items()
        }

    def dense_state(self) -> dict[str, Tensor]:
        """All other tensors, under the parent's names."""
        assert isinstance(self, nn.Module)
        routers = {id(value) for ffn in self.ffns() for value in ffn.router.state_dict(keep_vars=True).values()}
        return {name: value for name, value in self.state_dict(keep_vars=True).items() if id(value) not in routers}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Stock ``save_pretrained`` of the plain checkpoint, with routers and layout beside it."""
        super().save_pretrained(save_directory, state_dict=self.dense_state(), **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        self.layout.save(folder)
        save_file({name: value.cpu().contiguous() for name, value in self.router_state().items()}, folder / ROUTER_FILE)


@functools.cache
def dynamic_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of ``stock`` that takes ``dial=`` in ``forward`` and ``generate``."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        policy = self.policy(dial)
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        given = next((value for value in inputs if value is not None), None)
        if isinstance(policy, Routed) and given is not None:  # here, since some models flatten the batch inside
            policy.require(len(given))
        with using(policy):
            return super(made, self).forward(*args, **kwargs)

    signature = inspect.signature(stock.forward)  # generation looks at the names forward takes
    taken = list(signature.parameters.values())
    place = len(taken) - (taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
    taken.insert(place, inspect.Parameter("dial", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]

    # The stock class's own name: transformers writes it into config.json, and the folder stays a stock checkpoint.
    made: Any = type(stock.__name__, (DynamicMixin, stock), {"forward": forward, "__module__": __name__})
    return made


def attach(
    model: PreTrainedModel, layout: Layout, routers: Mapping[str, Tensor] | None = None, dial: Dial | None = None
) -> Any:
    """Makes a loaded stock model dynamic, in place.

    Args:
        model: The stock model, its FFN neurons already in block order.
        layout: Blocks and routers.
        routers: Router parameters by name; ``None`` leaves routers as they start.
        dial: What calls that name no dial use; the full dial by default.

    Returns:
        ``model``, now also a :class:`DynamicMixin`.

    Raises:
        ValueError: Routers are missing, unexpected, or of another shape.
    """
    activation = ACT2FN[getattr(model.config, layout.ffn.activation)]
    for layer in range(layout.layers):
        ffn = DynamicFFN(
            model.get_submodule(layout.ffn.path.format(layer=layer)),
            layer=layer,
            edges=layout.edges,
            ffn=layout.ffn,
            activation=activation,
            router=layout.router,
        )
        ffn.install(model)
    model.__class__ = dynamic_class(type(model))  # type: ignore[arg-type]
    made: Any = model
    made.layout, made.dial = layout, dial or Dial.full()
    if routers is not None:
        load_routers(made, routers)
    return made


def load_routers(model: Any, routers: Mapping[str, Tensor]) -> None:
    """Copies router parameters, all of them and no others, in fp32.

    Raises:
        ValueError: A name or a shape does not fit.
    """
    expected = model.router_state()
    wrong = sorted(set(expected) ^ set(routers))
    wrong += [name for name in set(expected) & set(routers) if expected[name].shape != routers[name].shape]
    if wrong:
        raise ValueError(f"{ROUTER_FILE} does not fit {LAYOUT_FILE}: {', '.join(wrong)}")
    for ffn in model.ffns():
        ffn.router.float()
        prefix = f"layers.{ffn.layer}.router."
        ffn.router.load_state_dict({name.removeprefix(prefix): routers[name] for name in routers if prefix in name})


def load(path: str | Path, **kwargs: Any) -> Any:
    """Loads a converted folder (or hub name) as a dynamic model.

    Args:
        path: The folder.
        **kwargs: Passed to the stock class's ``from_pretrained`` (``dtype``, ``device_map``, ...). The dtype of the
            checkpoint is kept unless given.

    Raises:
        ValueError: The folder holds no dynaconv layout, or its routers do not fit it.
    """
    return DynaconvForCausalLM.from_pretrained(path, **kwargs)


class DynaconvForCausalLM(PreTrainedModel):
    """What ``auto_map`` names. Calling ``from_pretrained`` gives a dynamic subclass of the stock class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with routers and dial attached. See :func:`load`."""
        source = str(pretrained_model_name_or_path)
        hub: dict[str, Any] = {
            name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs
        }
        folder = _file(source, LAYOUT_FILE, hub).parent
        layout = Layout.load(folder)
        if config is None:
            config = transformers.AutoConfig.from_pretrained(source, **hub)
        kwargs.setdefault("dtype", "auto")
        kwargs.pop("trust_remote_code", None)
        stock = getattr(transformers, config.architectures[0])
        loaded = stock.from_pretrained(source, *args, config=config, **kwargs)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        routers = load_file(_file(source, ROUTER_FILE, hub)) if layout.router.kind != "none" else None
        attach(model, layout, routers, stored_dial(folder))
        return model if info is None else (model, info)


def stored_dial(folder: Path) -> Dial | None:
    """The operating point chosen for ``folder``, ``None`` where none was."""
    path = folder / OPERATING_POINT_FILE
    if not path.is_file():
        return None
    return Dial(budget=json.loads(path.read_text(encoding="utf-8"))["budget"])


def _file(source: str, name: str, hub: Mapping[str, Any]) -> Path:
    try:
        path = cached_file(source, name, **hub)
    except OSError as error:
        raise ValueError(f"{source} holds no {name}: it was not made by dynaconv, or is incomplete") from error
    return Path(path)
