"""Runs a model layer by layer over many batches, with one decoder layer in memory at a time.

The stock transformers model is kept without weights. Stubs stand where its decoder layers were: one call of the model
on a batch then shows what it would hand each layer (attention mask, rotary embeddings, ...), whatever the family, and
the real layer is called with exactly that. Embedding and head are loaded for their own pass only.

On the CPU everything is computed in float32, whatever the checkpoint holds; on a GPU in the checkpoint's own dtype.

B batch, T tokens, D residual width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.profile.skeleton import activation, load, loaded, skeleton

LOGITS_BYTES = 64 * 1024**2  # logits held at once; V may be 10^5 and more


class Stub(nn.Module):
    """Stands where decoder layer was: notes what it is given, and returns ``answer`` or its input."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.answer: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a decoder layer's arguments."""
        self.given, self.arguments = hidden, (args, kwargs)
        return hidden if self.answer is None else self.answer


class LayerStream:
    """A checkpoint's forward pass in three steps: :meth:`embed`, every :meth:`layer` in turn, :meth:`head`.

    Args:
        checkpoint: The dense checkpoint.
        device: Where to compute; the first GPU where there is one, by default.
        trust_remote_code: Let transformers run code from the checkpoint's folder.

    Attributes:
        device: Where it computes.
        dtype: What it computes in.
        activation: The FFN's nonlinearity.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | None = None, *, trust_remote_code: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device or default_device()
        self.dtype = checkpoint.dtype if self.device.type == "cuda" else torch.float32
        self.activation: Callable[[Tensor], Tensor] = activation(checkpoint.activation)
        self._model = skeleton(checkpoint, self.dtype, self.device, trust_remote_code=trust_remote_code)
        container, _, self._ffn = checkpoint.family.ffn.path.partition(".{layer}.")
        layers = self._model.get_submodule(container)
        self._layers: list[nn.Module] = list(layers)
        self._layer_prefix = container + ".{layer}."
        self._stubs = [Stub() for _ in self._layers]
        for index, stub in enumerate(self._stubs):
            layers[index] = stub
        self._embedding_name, self._head_name = self._names_of_ends()
        ends = tuple(f"{name}." for name in (self._embedding_name, self._head_name))
        outer = [name for name in checkpoint.names_of_layer(None) if not name.startswith(ends)]
        for name in outer:  # the final norm: small, and part of every call of the model
            prefix = name.rpartition(".")[0]
            load(self._model.get_submodule(prefix), checkpoint, [name], prefix, self.dtype, self.device)
        self._unpadded: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What the first decoder layer receives of each batch: (B, T, D) tensors."""
        names = self._names_under(self._embedding_name)
        embedding, hidden = self._model.get_submodule(self._embedding_name), []
        with self._loaded(embedding, names, self._embedding_name):
            for batch in batches:
                moved = batch.to(self.device)
                self._call(input_ids=moved.input_ids, attention_mask=moved.attention_mask)
                given = self._stubs[0].given
                assert given is not None
                hidden.append(given)
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights, for the duration of the block.

        Raises:
            CheckpointError: A weight is NaN or infinite; the message names the tensor.
        """
        prefix = self._layer_prefix.format(layer=index)
        layer = self._layers[index]
        with self._loaded(layer, self.checkpoint.names_of_layer(index), prefix.removesuffix(".")):
            yield layer

    def ffn(self, layer: nn.Module) -> nn.Module:
        """The feed-forward network of a decoder layer."""
        return layer.get_submodule(self._ffn)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """Output (B, T, D) of ``layer`` (loaded, number ``index``) for its input (B, T, D) on ``batch``."""
        args, kwargs = self._arguments(hidden, batch)[index]
        output = layer(hidden, *args, **kwargs)
        advanced: Tensor = output[0] if isinstance(output, tuple) else output
        return advanced

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from final hidden states (M, D) to logits (M, V): the model's own norm, head and what follows."""
        prefix = self._embedding_name if self.checkpoint.tied else self._head_name
        last = self._stubs[-1]

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            last.answer = hidden[None]
            scores: Tensor = self._model(inputs_embeds=last.answer, use_cache=False).logits[0]
            return scores

        with self._loaded(self._model.get_submodule(self._head_name), self._names_under(prefix), prefix):
            try:
                yield logits
            finally:
                last.answer = last.given = None

    @torch.no_grad()
    def loss(self, hidden: Sequence[Tensor], batches: Sequence[Batch]) -> float:
        """Mean loss in nats a token, over the tokens whose successor is known, from final hidden states (B, T, D)."""
        rows = max(1, LOGITS_BYTES // (4 * self.checkpoint.sizes["vocab"]))
        total, count = torch.zeros((), dtype=torch.float64), 0
        with self.head() as logits:
            for states, batch in zip(hidden, batches, strict=True):
                known = predicting(batch)
                inputs = states[:, :-1][known[:, :-1].to(states.device)]
                targets = batch.input_ids[:, 1:][known[:, :-1]].to(states.device)
                for part, target in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
                    total += cross_entropy(logits(part).float(), target, reduction="sum").double().cpu()
                count += len(targets)
        return float(total / max(1, count))

    def _arguments(self, hidden: Tensor, batch: Batch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model hands each decoder layer besides its input; without padding this depends on shape only."""
        shape = tuple(hidden.shape)
        if batch.attention_mask is None and shape in self._unpadded:
            return self._unpadded[shape]
        self._call(inputs_embeds=hidden, attention_mask=batch.to(self.device).attention_mask)
        arguments = [stub.arguments for stub in self._stubs]
        if batch.attention_mask is None:
            self._unpadded[shape] = arguments
        return arguments

    def _call(self, **inputs: Tensor | None) -> None:
        """Runs what is around the decoder layers, so that the stubs show what each layer would be given."""
        self._model.base_model(**inputs, use_cache=False)

    def _names_of_ends(self) -> tuple[str, str]:
        """Module names of the embedding and of the head."""
        names = {id(module): name for name, module in self._model.named_modules()}
        ends = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        return names[id(ends[0])], names[id(ends[1])]

    def _names_under(self, module: str) -> list[str]:
        return [name for name in self.checkpoint.names_of_layer(None) if name.startswith(f"{module}.")]

    def _loaded(self, module: nn.Module, names: list[str], prefix: str) -> AbstractContextManager[None]:
        return loaded(module, self.checkpoint, names, prefix, self.dtype, self.device)


def predicting(batch: Batch) -> Tensor:
    """Tokens whose successor in the window is a real token, and that are real themselves: (B, T) bool."""
    mask = batch.attention_mask
    real = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
    following = torch.zeros_like(real)
    following[:, :-1] = real[:, 1:]
    return real & following


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
