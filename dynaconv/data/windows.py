"""Windows of tokens, and batches of them as a pure function of the step: resuming needs only the step's number.

B windows in a batch, T tokens in a window, S tokens in all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # label that transformers and torch leave out of a loss


@dataclass(frozen=True)
class Batch:
    """Model input.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) bool, False on padding; ``None`` where nothing is padded.
        loss_mask: (B, T) bool, False on tokens that are read but not to be predicted, such as a user's question;
            ``None`` where all real tokens are.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    loss_mask: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """``input_ids`` with -100 where nothing is to be predicted, (B, T) int64; the model shifts them."""
        labels = self.input_ids.clone()
        labels[:, 1:].masked_fill_(~self.predicted, IGNORED)
        for mask in (self.attention_mask, self.loss_mask):
            if mask is not None:
                labels[:, 0].masked_fill_(~mask[:, 0], IGNORED)
        return labels

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def predicted(self) -> Tensor:
        """(B, T - 1) bool: :func:`scored_tokens` without the last token of each window."""
        return scored_tokens(self)[:, :-1]

    def rows(self, start: int, stop: int) -> Batch:
        """Windows ``[start, stop)`` of the batch: a micro-batch, or one process's share."""
        return self._each(lambda tensor: tensor[start:stop])

    def split(self, parts: int) -> list[Batch]:
        """The batch in at most ``parts`` micro-batches of as equal a size as can be."""
        bounds = [round(part * len(self.input_ids) / parts) for part in range(parts + 1)]
        return [self.rows(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        masks = (None if mask is None else change(mask) for mask in (self.attention_mask, self.loss_mask))
        return Batch(change(self.input_ids), *masks)


def scored_tokens(batch: Batch) -> Tensor:
    """Tokens whose prediction of the next one counts, (B, T) bool: in losses, in what profile measures, in scores.

    A token counts where it and its successor in the window are real, and the successor is to be predicted. So the last
    token of a window never does, and of a conversation those before each token of the assistant's answers do.
    """
    scored = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    scored[:, :-1] = True
    if batch.attention_mask is not None:
        scored[:, :-1] &= batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
    if batch.loss_mask is not None:
        scored[:, :-1] &= batch.loss_mask[:, 1:]
    return scored


class Windows:
    """One stream of tokens cut into windows of equal length.

    The stream is a circle: a grid that starts at an offset still uses every token, its last window running over the
    end into the beginning.

    Args:
        tokens: (S,) int32 or uint16, documents joined by the end-of-text token; may be a mapped file.
        length: T.
        scored: (S,) bool, which tokens are to be predicted; ``None`` where all are.
    """

    def __init__(self, tokens: Tensor, length: int, scored: Tensor | None = None) -> None:
        self.tokens = tokens
        self.length = length
        self.scored = scored

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    @property
    def total_tokens(self) -> int:
        """Tokens in all the windows together, without padding."""
        return len(self) * self.length

    def take(self, indices: Sequence[int] | Tensor, offsets: Sequence[int] | Tensor | int = 0) -> Batch:
        """The windows at ``indices`` (B,), of a grid shifted by ``offsets`` tokens (one for all, or (B,))."""
        starts = torch.as_tensor(indices) * self.length + torch.as_tensor(offsets)  # (B,)
        positions = (starts[:, None] + torch.arange(self.length)) % len(self.tokens)  # (B, T)
        loss_mask = None if self.scored is None else self.scored[positions]
        return Batch(self.tokens[positions].long(), None, loss_mask)

    def drawn(self, places: Iterable[int], seed: int) -> Batch:
        """The windows at ``places`` (from 0) of the training order that ``seed`` draws.

        Windows are drawn without replacement within an epoch, in an order and on a grid offset drawn for each epoch
        from (seed, epoch).
        """
        indices, offsets = [], []
        for position in places:
            epoch, place = divmod(position, len(self))
            order, offset = _epoch(len(self), self.length, seed, epoch)
            indices.append(int(order[place]))
            offsets.append(offset)
        return self.take(indices, offsets)


class PaddedWindows(Windows):
    """One document a window, padded to T tokens.

    Args:
        tokens: (S,) int32 or uint16, the documents one behind the other, each cut to T tokens at most.
        lengths: (N,) int64, tokens of each.
        length: T.
        padding: Token id that fills; masked wherever it stands for padding.
        scored: (S,) bool, which tokens are to be predicted; ``None`` where all are.
    """

    def __init__(
        self, tokens: Tensor, lengths: Tensor, length: int, padding: int, scored: Tensor | None = None
    ) -> None:
        self.lengths, self.padding = lengths, padding
        self.starts = lengths.cumsum(0) - lengths
        super().__init__(tokens, length, scored)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        """Tokens in all the windows together, without padding."""
        return int(self.lengths.sum())

    def take(self, indices: Sequence[int] | Tensor, offsets: Sequence[int] | Tensor | int = 0) -> Batch:
        """The documents at ``indices`` (B,); there is no grid to shift, so ``offsets`` change nothing."""
        chosen = torch.as_tensor(indices)
        places = torch.arange(self.length)
        mask = places < self.lengths[chosen, None]  # (B, T)
        positions = (self.starts[chosen, None] + places).clamp(max=len(self.tokens) - 1)  # (B, T)
        ids = self.tokens[positions].long().masked_fill(~mask, self.padding)
        loss_mask = None if self.scored is None else self.scored[positions] & mask
        return Batch(ids, None if bool(mask.all()) else mask, loss_mask)


def training_batch(windows: Windows, step: int, batch_size: int, seed: int) -> Batch:
    """Batch of training step ``step`` (from 0): a pure function of its arguments, so the step is all of its position.

    A batch may end one epoch and begin the next; see :meth:`Windows.drawn`.
    """
    return windows.drawn(range(step * batch_size, (step + 1) * batch_size), seed)


def evaluation_batches(
    windows: Windows, batch_size: int, limit_tokens: int | None = None, seed: int = 0, *, skip_tokens: int = 0
) -> Iterator[Batch]:
    """A fixed random choice of windows, each once; the last batch may be smaller.

    Args:
        windows: Usually those held out.
        batch_size: B.
        limit_tokens: Stop after this many tokens, rounded up to whole windows; ``None`` takes all.
        seed: Draws the choice.
        skip_tokens: Leave out the windows that ``limit_tokens=skip_tokens`` would take: a disjoint second choice.
    """
    order, _ = _epoch(len(windows), windows.length, seed, -1)
    start = math.ceil(skip_tokens / windows.length)
    stop = len(order) if limit_tokens is None else start + math.ceil(limit_tokens / windows.length)
    chosen = order[start:stop]
    for first in range(0, len(chosen), batch_size):
        yield windows.take(chosen[first : first + batch_size])


@functools.lru_cache(maxsize=16)  # an epoch's order is asked for at each of its steps
def _epoch(count: int, length: int, seed: int, epoch: int) -> tuple[Tensor, int]:
    """Order of ``count`` windows and the grid's offset in tokens, drawn for (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    return order, int(torch.randint(length, (), generator=generator))
