"""Windows of tokens, and batches of them as a pure function of the step: resuming needs only the step's number.

B windows in a batch, T tokens in a window, S tokens in all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
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
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """``input_ids`` with padding replaced by -100, (B, T) int64; the model shifts them."""
        if self.attention_mask is None:
            return self.input_ids
        return self.input_ids.masked_fill(~self.attention_mask, IGNORED)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def predicted(self) -> Tensor:
        """(B, T - 1) bool: positions whose next token is real, and so is scored."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids[:, 1:], dtype=torch.bool)
        return self.attention_mask[:, 1:] & self.attention_mask[:, :-1]

    def rows(self, start: int, stop: int) -> Batch:
        """Windows ``[start, stop)`` of the batch: a micro-batch, or one process's share."""
        mask = None if self.attention_mask is None else self.attention_mask[start:stop]
        return Batch(self.input_ids[start:stop], mask)

    def split(self, parts: int) -> list[Batch]:
        """The batch in at most ``parts`` micro-batches of as equal a size as can be."""
        bounds = [round(part * len(self.input_ids) / parts) for part in range(parts + 1)]
        return [self.rows(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.input_ids.to(device), mask)


class Windows:
    """One stream of tokens cut into windows of equal length.

    The stream is a circle: a grid that starts at an offset still uses every token, its last window running over the
    end into the beginning.

    Args:
        tokens: (S,) int32, documents joined by the end-of-text token.
        length: T.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens = tokens
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    @property
    def total_tokens(self) -> int:
        """Tokens in all the windows together, without padding."""
        return len(self) * self.length

    def take(self, indices: Sequence[int] | Tensor, offsets: Sequence[int] | Tensor | int = 0) -> Batch:
        """The windows at ``indices`` (B,), of a grid shifted by ``offsets`` tokens (one for all, or (B,))."""
        starts = torch.as_tensor(indices) * self.length + torch.as_tensor(offsets)  # (B,)
        positions = starts[:, None] + torch.arange(self.length)  # (B, T)
        return Batch(self.tokens[positions % len(self.tokens)].long())


class PaddedWindows(Windows):
    """One document a window, cut to T tokens or padded.

    Args:
        documents: Token ids of each document.
        length: T.
        padding: Token id that fills; masked wherever it stands for padding.
    """

    def __init__(self, documents: Sequence[Tensor], length: int, padding: int) -> None:
        rows = torch.full((len(documents), length), padding, dtype=torch.int32)
        for row, document in zip(rows, documents, strict=True):
            row[: len(document)] = document[:length]
        self.lengths = torch.tensor([min(len(document), length) for document in documents], dtype=torch.int64)
        super().__init__(rows, length)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens in all the windows together, without padding."""
        return int(self.lengths.sum())

    def take(self, indices: Sequence[int] | Tensor, offsets: Sequence[int] | Tensor | int = 0) -> Batch:
        """The documents at ``indices`` (B,); there is no grid to shift, so ``offsets`` change nothing."""
        chosen = torch.as_tensor(indices)
        mask = torch.arange(self.length) < self.lengths[chosen, None]  # (B, T)
        return Batch(self.tokens[chosen].long(), None if bool(mask.all()) else mask)


def training_batch(windows: Windows, step: int, batch_size: int, seed: int) -> Batch:
    """Batch of training step ``step`` (from 0): a pure function of its arguments.

    Windows are drawn without replacement within an epoch, in an order and on a grid offset drawn for each epoch from
    (seed, epoch). A batch may end one epoch and begin the next.
    """
    indices, offsets = [], []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, len(windows))
        order, offset = _epoch(len(windows), windows.length, seed, epoch)
        indices.append(int(order[place]))
        offsets.append(offset)
    return windows.take(indices, offsets)


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


@functools.lru_cache(maxsize=4)  # an epoch's order is asked for at each of its steps
def _epoch(count: int, length: int, seed: int, epoch: int) -> tuple[Tensor, int]:
    """Order of ``count`` windows and the grid's offset in tokens, drawn for (seed, epoch)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    return order, int(torch.randint(length, (), generator=generator))
