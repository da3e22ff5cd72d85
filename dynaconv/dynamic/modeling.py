"""The dynamic model: a stock transformers model whose FFNs listen to a dial.

``load(folder)`` builds the stock class that ``config.json`` names, through transformers' own loading, then puts a
:class:`DynamicFFN` to work in the place of each FFN. Nothing else of the stock model changes, so caches, generation,
quantised attention and ``device_map`` work as they do there. ``DynaconvForCausalLM`` is the same behind
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. L sites, B sequences.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
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

from dynaconv.dynamic.call import Call, checkpoint_contexts
from dynaconv.dynamic.controller import Controlled
from dynaconv.dynamic.dial import Dial, DialLike, as_dial
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.generation import DialedGeneration, Surrounding
from dynaconv.dynamic.layout import LAYOUT_FILE, OPERATING_POINT_FILE, ROUTER_FILE, Layout
from dynaconv.dynamic.policy import AfterPrompt, ByThreshold, Full, Policy, Uniform
from dynaconv.dynamic.projections import rebind
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.thresholds import Thresholds


class DynamicMixin(DialedGeneration):
    """What a dynamic model adds to its stock class.

    Attributes:
        layout: Blocks, routers and the calibrated dial.
        call: The policy and the recorder that its sites see; shared by all views of the model.
        surrounding: The dial of a surrounding ``generate``; each view has its own.
    """

    layout: Layout
    call: Call
    _dial: Dial
    _own: Policy
    _thresholds: Thresholds

    @property
    def dial(self) -> Dial:
        """Used by calls that name none: the stored operating point, or the full dial. Checked when it is set."""
        return self._dial

    @dial.setter
    def dial(self, value: Dial | float) -> None:
        dial = as_dial(value)
        if not isinstance(dial, Dial):
            raise ValueError("a model has one dial; name one for each sequence in the call")
        self._own, self._dial = self._policy_of(dial, self._thresholds), dial

    def policy(self, dial: DialLike | None = None, *, held: Thresholds | None = None) -> Policy:
        """The policy of ``dial``; of the surrounding call, or of the model's own dial, where it is ``None``.

        Args:
            dial: See :func:`as_dial`.
            held: Where its thresholds are written; ``None`` for memory of their own.

        Raises:
            ValueError: A dial that this model cannot follow, such as a budget before calibration.
        """
        if dial is None:
            return self.surrounding.policy or self._own_policy()
        return self._policy_of(as_dial(dial), held or Thresholds())

    def controlled(self, policy: Policy, dials: Dial | Sequence[Dial]) -> Policy:
        """``policy`` with a controller that holds the budgets of ``dials``, where these want one."""
        if not isinstance(policy, ByThreshold):
            return policy
        each = [dials] if isinstance(dials, Dial) else list(dials)
        slopes = [0.0 if dial.is_full or not dial.controlled else dial.slope(self.layout) for dial in each]
        if not any(slopes):
            return policy
        device = policy.thresholds.device
        budgets = torch.tensor([dial.resolved(self.layout) for dial in each], device=device)
        cost, sites = self.ffns()[0].cost.bytes, len(self.layout.sites)
        return Controlled(policy, budgets, torch.tensor(slopes, device=device), cost, sites)

    def _own_policy(self) -> Policy:
        if isinstance(self._own, ByThreshold) and self._own.thresholds.device != self._device():
            self.dial = self._dial  # the model was moved
        return self._own

    def _policy_of(self, dial: Dial | tuple[Dial, ...], held: Thresholds) -> Policy:
        if isinstance(dial, Dial):
            if dial.is_full:
                return Full()
            if dial.width is not None:
                return Uniform(dial.width)
            return held.fill(dial, self.layout, self._device())
        if not dial:
            raise ValueError("one dial a sequence was asked for, and the list is empty")
        return held.fill(dial, self.layout, self._device())

    def _device(self) -> torch.device:
        """Where thresholds lie: with the model; the CPU where that is offloaded."""
        device: torch.device = self.device  # type: ignore[attr-defined]
        return torch.device("cpu") if device.type == "meta" else device

    def at(self, dial: Dial | float) -> Any:
        """A view of this model with a dial of its own; it shares every weight, and costs no memory.

        Such as a draft for ``generate(assistant_model=model.at(0.25))``.
        """
        view: Any = copy.copy(self)
        view.__dict__.pop("_compiled_call", None)  # generation's, which calls the model it was compiled for
        view.surrounding, view._thresholds = Surrounding(), Thresholds()
        view.generation_config = copy.deepcopy(view.generation_config)
        view.dial = dial
        return view

    def ffns(self) -> list[DynamicFFN]:
        """The L dynamic FFNs, in order."""
        assert isinstance(self, nn.Module)
        return [module for module in self.modules() if isinstance(module, DynamicFFN)]

    def __call__(self, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        """Stock ``forward`` at ``dial``.

        Here and not only in ``forward``, which accelerate and others replace on the instance.
        """
        return self._run_at(dial, super().__call__, args, kwargs)  # type: ignore[misc]

    def _run_at(
        self, dial: DialLike | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``run``, a forward pass, under the policy of ``dial``."""
        before = self.call.policy
        self.call.policy = self._policy_for(dial, args, kwargs)
        try:
            return run(*args, **kwargs)
        finally:
            self.call.policy = before

    def _policy_for(self, dial: DialLike | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Policy:
        """The policy of a forward pass: of the dial it names, of the call around it, or of the model's own dial."""
        if dial is None and self.call.policy is not None:
            return self.call.policy
        around = self.surrounding
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        given = next((value for value in inputs if value is not None), None)
        policy = self.policy(dial)
        if dial is None and around.reading and around.policy is not None and around.prompt is not None:
            around.reading = False  # of a prompt in several pieces, each is announced
            tokens, prompt = 0 if given is None else given.shape[1], around.prompt_tokens
            drafted = 0 < prompt < tokens and isinstance(around.prompt, Full)
            return AfterPrompt(policy, prompt, tokens) if drafted else around.prompt
        if isinstance(policy, (ByThreshold, Controlled)):  # checked here, since some models flatten the batch inside
            if given is not None:
                policy.require(given.shape[0])
            if torch.is_grad_enabled() and isinstance(policy, ByThreshold):
                return policy.clone()  # a recomputation needs these thresholds, whatever the dial is by then
        return policy

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **settings: Any
    ) -> None:
        """Where transformers' ways of turning activation checkpointing on meet: recomputed layers keep their dial.

        Raises:
            ValueError: Reentrant checkpointing is asked for, which cannot carry the dial.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("reentrant activation checkpointing loses the dial: use use_reentrant=False")
        contexts = functools.partial(checkpoint_contexts, self.call)
        carrying = functools.partial(gradient_checkpointing_func, context_fn=contexts)
        super()._set_gradient_checkpointing(enable, carrying, **settings)  # type: ignore[misc]

    def router_state(self) -> dict[str, Tensor]:
        """Routers, and means of neurons that are off, as ``dynaconv.safetensors`` names them."""
        return {
            f"layers.{ffn.site.index}.{name}": value.detach()
            for ffn in self.ffns()
            for name, value in ffn.own_state().items()
        }

    def dense_state(self) -> dict[str, Tensor]:
        """All other tensors, under the parent's names."""
        assert isinstance(self, nn.Module)
        own = {id(value) for ffn in self.ffns() for value in ffn.own_state().values()}
        return {name: value for name, value in self.state_dict(keep_vars=True).items() if id(value) not in own}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Stock ``save_pretrained`` of the plain checkpoint, with routers and layout beside it."""
        if any(ffn.copy is not None and ffn.copy.packed for ffn in self.ffns()):
            raise ValueError(
                "this model holds low-bit values only, and cannot be saved: load it without values='low-bit'"
            )
        super().save_pretrained(save_directory, state_dict=self.dense_state(), **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        self.layout.save(folder)
        save_file({name: value.cpu().contiguous() for name, value in self.router_state().items()}, folder / ROUTER_FILE)


@functools.cache
def dynamic_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of ``stock`` that takes ``dial=`` in ``forward`` and ``generate``."""

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        return self._run_at(dial, super(made, self).forward, args, kwargs)

    signature = inspect.signature(stock.forward)  # generation looks at the names forward takes
    taken = list(signature.parameters.values())
    place = len(taken) - (taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
    taken.insert(place, inspect.Parameter("dial", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]

    # The stock class's own name: transformers writes it into config.json, and the folder stays a stock checkpoint.
    made: Any = type(stock.__name__, (DynamicMixin, stock), {"forward": forward, "__module__": __name__})
    return made


def __getattr__(name: str) -> Any:
    """Classes of :func:`dynamic_class` by the name of their stock class, so that models pickle."""
    stock = None if name.startswith("_") else getattr(transformers, name, None)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return dynamic_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        ValueError: Routers are missing, unexpected, of another shape or of an unknown kind.
    """
    call, kind = Call(), _router_kind(layout)
    activation_name = getattr(model.config, layout.ffn.activation)
    for site in layout.sites:
        ffn = DynamicFFN(
            model.get_submodule(layout.ffn.path.format(layer=site.index)),
            site=site,
            names=layout.ffn,
            activation=ACT2FN[activation_name],
            activation_name=activation_name,
            router=functools.partial(kind, partition=site.partition, layout=layout.router),
            call=call,
            copy=None if layout.copy is None else FewBitCopy(layout.copy, layout.router.bits, layout.router.coarse),
            means=len(layout.means),
            itemsize=layout.itemsize,
        )
        ffn.install(model)
    model.__class__ = dynamic_class(type(model))  # type: ignore[arg-type]
    rebind(model)
    made: Any = model
    made.layout, made.call, made.surrounding, made._thresholds = layout, call, Surrounding(), Thresholds()
    if routers is not None:
        load_routers(made, routers)
    made.dial = dial or Dial.full()
    return made


def _router_kind(layout: Layout) -> type[Router]:
    kind = KINDS.get(layout.router.kind)
    if kind is None:
        raise ValueError(
            f"{LAYOUT_FILE} has router kind {layout.router.kind!r}; this dynaconv knows {', '.join(KINDS)}: "
            "upgrade dynaconv, or export the model again"
        )
    return kind


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
        for name, value in ffn.own_state().items():
            value.data = value.data.float()
            value.data.copy_(routers[f"layers.{ffn.site.index}.{name}"])


def load(path: str | Path, **kwargs: Any) -> Any:
    """Loads a converted folder (or hub name) as a dynamic model.

    Args:
        path: The folder.
        **kwargs: Passed to the stock class's ``from_pretrained`` (``dtype``, ``device_map``, ...). The dtype of the
            checkpoint is kept unless given. With ``values="low-bit"`` memory holds the low-bit values of the FFNs only,
            also at the full dial, for machines where the parent does not fit once it is loaded; they are decoded each
            time they are used, which is slow, and such a model cannot be saved. ``dynaconv eval MODEL --values low-bit
            --dial full`` says what that costs.

    Raises:
        ValueError: The folder holds no dynaconv layout, its routers do not fit it, or there are no low-bit values.
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
        values = kwargs.pop("values", "exact")
        if values not in ("exact", "low-bit"):
            raise ValueError(f"values is {values!r}; it must be exact or low-bit")
        kwargs.setdefault("dtype", "auto")
        kwargs.pop("trust_remote_code", None)
        stock = getattr(transformers, config.architectures[0])
        loaded = stock.from_pretrained(source, *args, config=config, **kwargs)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        stored = layout.router.kind != "none" or layout.means
        routers = load_file(_file(source, ROUTER_FILE, hub)) if stored else None
        attach(model, layout, routers, stored_dial(folder))
        if values == "low-bit":
            for ffn in model.ffns():
                ffn.pack()
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
