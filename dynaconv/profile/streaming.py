"""Runs a model layer by layer over many batches, with one decoder layer in memory at a time.

The stock transformers model is kept without weights. Stubs stand where its decoder layers were: one call of the model
on a batch then shows what it would hand each layer (attention mask, rotary embeddings, ...), whatever the family, and
the real layer is called with exactly that. Of the embedding only the rows of tokens that occur are read, and the head
passes by in pieces of the vocabulary.

On the CPU everything is computed in float32, whatever the checkpoint holds, unless :func:`quick_dtype` is asked for; on
a GPU in the checkpoint's own dtype.

B batch, T tokens, D residual width, F FFN width, V vocabulary, M tokens of any batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch, scored_tokens
from dynaconv.profile.skeleton import activation, borrowing, lent, load, loaded, skeleton

PIECE = 2048  # rows of the head, and columns of the logits, in memory at a time; fixed, so that two models' go together
HEAD_BYTES = 32 * 1024**2  # logits held at once, or the hidden states they come from, whichever take more
READ_BYTES = 8 * 1024**2  # of the embedding, read at once


class Stub(nn.Module):
    """Stands where a decoder layer was: notes what it is given, and returns ``answer`` or its input.

    Args:
        layer: The layer, asked for what the model reads off it (which kind of attention, ...).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._stands_for = [layer]  # in a list: no submodule
        self.given: Tensor | None = None
        self.answer: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a decoder layer's arguments."""
        self.given, self.arguments = hidden, (args, kwargs)
        return hidden if self.answer is None else self.answer

    def __getattr__(self, name: str) -> Any:
        """What is not its own is the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)


class LayerStream:
    """A checkpoint's forward pass in steps: :meth:`embed`, every :meth:`layer` in turn, then what the head makes of it.

    Args:
        checkpoint: The dense checkpoint.
        device: Where to compute; the first GPU where there is one, by default.
        dtype: What to compute in, if not as the module says.
        trust_remote_code: Let transformers run code from the checkpoint's folder.

    Attributes:
        device: Where it computes.
        dtype: What it computes in.
        activation: The FFN's nonlinearity.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device or default_device()
        self.dtype = dtype or (checkpoint.dtype if self.device.type == "cuda" else torch.float32)
        self.activation: Callable[[Tensor], Tensor] = activation(checkpoint.activation)
        self._model = skeleton(checkpoint, self.dtype, self.device, trust_remote_code=trust_remote_code)
        container, _, ffn = checkpoint.family.ffn.path.partition(".{layer}")
        self._layer_path, self._ffn = container + ".{layer}", ffn.removeprefix(".")
        layers = self._model.get_submodule(container)
        self._layers: list[nn.Module] = list(layers)
        self._stubs = [Stub(layer) for layer in self._layers]
        for index, stub in enumerate(self._stubs):
            layers[index] = stub
        self._load_around()
        self._model.get_input_embeddings().padding_idx = None  # that only gradients ask for; it counts rows left out
        self._unpadded: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What the first decoder layer receives of each batch: (B, T, D) tensors.

        Raises:
            CheckpointError: A row of a token in ``batches`` is NaN or infinite; the message names the tensor.
        """
        tokens = torch.cat([batch.input_ids.unique() for batch in batches]).unique().cpu()
        (name,) = self._names_of("embedding")
        embedding, hidden, places = self._model.get_input_embeddings(), [], tokens.to(self.device)
        with borrowing(embedding, {"weight": self._rows(name, tokens)}):
            for batch in batches:
                moved = batch.to(self.device)
                embedded = embedding(torch.searchsorted(places, moved.input_ids))
                self._call(inputs_embeds=embedded, attention_mask=moved.attention_mask)
                given = self._stubs[0].given
                assert given is not None
                hidden.append(given)
        return hidden

    @contextmanager
    def layer(self, index: int, *, lean: bool = False) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights, for the duration of the block.

        Args:
            index: From 0.
            lean: Have one projection in memory at a time instead of the layer; each call then reads all of them.

        Raises:
            CheckpointError: A weight is NaN or infinite; the message names the tensor.
        """
        path, layer = self._layer_path.format(layer=index), self._layers[index]
        names = self.checkpoint.names_of_layer(index)
        with (lent if lean else loaded)(layer, self.checkpoint, names, path, self.dtype, self.device):
            yield layer

    def ffn(self, layer: nn.Module) -> nn.Module:
        """The module of a decoder layer that holds the projections of its FFN; the layer itself with some families."""
        return layer.get_submodule(self._ffn)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """Output (B, T, D) of ``layer`` (loaded, number ``index``) for its input (B, T, D) on ``batch``."""
        args, kwargs = self._arguments(hidden, batch)[index]
        output = layer(hidden, *args, **kwargs)
        advanced: Tensor = output[0] if isinstance(output, tuple) else output
        return advanced

    def logits_pieces(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of final hidden states (M, D), by pieces of the vocabulary that are the same for every model.

        Yields:
            The first token of the piece, and the logits (M, at most PIECE) of its tokens.

        Raises:
            CheckpointError: A weight of the head is NaN or infinite; the message names the tensor.
        """
        for start, logits in self._heads():
            yield start, torch.cat([logits(part) for part in torch.split(hidden, self._rows_at_once())])

    @torch.no_grad()
    def loss(self, hidden: Sequence[Tensor], batches: Sequence[Batch]) -> float:
        """Mean loss in nats a token, over :func:`scored_tokens`, from final hidden states (B, T, D).

        Raises:
            CheckpointError: A weight of the head is NaN or infinite; the message names the tensor.
        """
        chunks = [
            _Scored(states, rows, batch.input_ids.flatten()[rows.cpu() + 1].to(states.device))
            for states, batch in zip(hidden, batches, strict=True)
            for rows in torch.split(
                scored_tokens(batch).flatten().nonzero()[:, 0].to(states.device), self._rows_at_once()
            )
        ]
        for start, logits in self._heads():
            for chunk in chunks:
                chunk.add(start, logits(chunk.states()).float())
        count = sum(len(chunk.targets) for chunk in chunks)
        return sum(chunk.nats() for chunk in chunks) / max(1, count)

    def _heads(self) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
        """By pieces of the vocabulary: its first token, and a function from hidden states (M, D) to logits (M, piece).

        The model's own final norm, its head cut down to the piece, and whatever elementwise thing follows.
        """
        vocabulary, head = self.checkpoint.sizes["vocab"], self._model.get_output_embeddings()
        try:
            for start in range(0, vocabulary, PIECE):
                with borrowing(head, self._head_rows(start, min(start + PIECE, vocabulary))):
                    yield start, self._logits
        finally:
            self._stubs[-1].answer = self._stubs[-1].given = None

    def _head_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows of the head's parameters, by the names it has for them."""
        read = self.checkpoint.reader.read_finite
        return {
            name.rpartition(".")[2]: read(name, (start, stop)).to(self.device, self.dtype)
            for name in self._names_of("head")
        }

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        """What the model as it is makes of final hidden states (M, D): M texts of one token, so no mask is large."""
        self._stubs[-1].answer = hidden[:, None]
        scores: Tensor = self._model(inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0]
        return scores

    def _rows_at_once(self) -> int:
        """Tokens whose logits are computed at once."""
        return max(1, HEAD_BYTES // (4 * max(PIECE, self.checkpoint.sizes["residual"])))

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        """The rows (ascending, (n,) on the CPU) of a stored matrix (V, D): (n, D). Reads what lies close together."""
        info = self.checkpoint.reader.tensors[name]
        table = torch.empty(len(rows), *info.shape[1:], dtype=self.dtype, device=self.device)
        together = max(1, READ_BYTES * info.shape[0] // info.nbytes)
        done = 0
        for count in torch.unique_consecutive(rows // together, return_counts=True)[1].tolist():
            wanted = rows[done : done + count]
            first = int(wanted[0])
            read = self.checkpoint.reader.read_finite(name, (first, int(wanted[-1]) + 1))
            table[done : done + count] = read[wanted - first].to(self.device, self.dtype)
            done += count
        return table

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

    def _load_around(self) -> None:
        """Final norm and learned positions: small, and part of every call of the model."""
        modules: dict[str, list[str]] = {}
        for name in self.checkpoint.names_of_layer(None):
            if self.checkpoint.slots[name].spec.part not in ("embedding", "head"):
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        for path, names in modules.items():
            load(self._model.get_submodule(path), self.checkpoint, names, path, self.dtype, self.device)

    def _names_of(self, part: str) -> list[str]:
        """Stored tensors of the embedding, or those that the head multiplies with and adds."""
        parts = {part, "embedding"} if self.checkpoint.tied else {part}
        return [name for name, slot in self.checkpoint.slots.items() if slot.spec.part in parts]


class _Scored:
    """Tokens whose loss is gathered by pieces of the vocabulary.

    Args:
        hidden: Final hidden states (B, T, D).
        rows: Which of the B * T tokens, (M,) int64.
        targets: The tokens that follow, (M,) int64.
    """

    def __init__(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> None:
        self._hidden, self._rows, self.targets = hidden.flatten(0, 1), rows, targets
        self._normaliser = torch.full(targets.shape, -torch.inf, device=targets.device)
        self._own = torch.zeros_like(self._normaliser)

    def states(self) -> Tensor:
        """Their hidden states (M, D)."""
        return self._hidden[self._rows]

    def add(self, start: int, logits: Tensor) -> None:
        """Gathers the logits (M, piece) of the tokens from ``start`` on."""
        inside = (self.targets >= start) & (self.targets < start + logits.shape[1])
        places = torch.where(inside, self.targets - start, 0)
        picked = logits.gather(1, places[:, None])[:, 0]
        piece = cross_entropy(logits, places, reduction="none") + picked  # logsumexp, in a quarter of its time
        self._normaliser = torch.logaddexp(self._normaliser, piece)
        self._own = torch.where(inside, picked, self._own)

    def nats(self) -> float:
        """Their summed loss, once every piece was gathered."""
        return float((self._normaliser - self._own).double().sum())


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quick_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """What is fastest for measurements, which need no more accuracy than the model itself has.

    That is the checkpoint's dtype on a GPU, and float32 on a CPU, but bf16 for bf16 checkpoints where the CPU has
    instructions for its products: about five times as fast as float32. Other CPUs emulate them, slowly.
    """
    quick = device.type == "cuda" or (checkpoint.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return checkpoint.dtype if quick else torch.float32
