"""Backend for sketched FFNs on a CPU: a few tokens, each with neurons of its own. Ships with every exported model.

What is read is what the cost model counts: the coarse planes of all neurons, further planes and values of those that
are wanted, in rows; nothing is gathered and no mask is written. Packed once, when it first runs: codes lie as the loops
read them, beside the weights, and down once more, by neuron. Needs numba (``pip install 'dynaconv[cpu]'``).

D residual width, F neurons, M tokens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dynaconv.kernels.codes import Codes, unpacked
from dynaconv.kernels.sketched import Asked, Computed, SketchedBackend, SketchedFFN

TOKENS = 8
"""Tokens of a call, at most. Each one's neurons are computed by themselves, and more of them make a matrix product."""
PART = 1 << 21
"""Weights of one matrix for which another thread is worth waking."""
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_fast": 2, "gelu_pytorch_tanh": 2, "relu": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def can_run(ffn: SketchedFFN, x: Tensor) -> tuple[bool, str]:
    """A few tokens on a CPU, where numba is installed and nothing records gradients."""
    if not x.is_cpu:
        return False, "tensors are not on the CPU"
    if torch.is_grad_enabled() and (x.requires_grad or ffn.weights.requires_grad):
        return False, "gradients are recorded, and this backend is for inference"
    if len(x) > TOKENS:
        return False, f"{len(x)} tokens at once, more than {TOKENS}: matrix products are faster"
    return _fits(ffn)


def _fits(ffn: SketchedFFN) -> tuple[bool, str]:
    up = ffn.up
    if ffn.weights.up.dtype not in DTYPES or ffn.activation not in ACTIVATIONS:
        return False, f"there are no loops for {ffn.weights.up.dtype} and {ffn.activation}"
    if ffn.coarse != 2 or not 2 <= ffn.bits <= up.bits <= 4 or (ffn.down is not None and up.bits != 4):
        return False, f"its loops read 2 bits, then up to 4, and not {ffn.coarse}, {ffn.bits} and {up.bits}"
    if up.group != 32 or up.columns % 16:
        return False, f"its loops take groups of 32 and widths divisible by 16, not {up.group} and {up.columns}"
    if not _installed():
        return False, "numba 0.68 or newer is not installed: pip install 'dynaconv[cpu]'"
    return True, "a few tokens with neurons of their own, on a CPU"


@functools.cache
def _installed() -> bool:
    if find_spec("numba") is None:
        return False
    major, minor = metadata.version("numba").split(".")[:2]
    return (int(major), int(minor)) >= (0, 68)  # older ones come with an LLVM that names instructions otherwise


def run(ffn: SketchedFFN, x: Tensor, asked: Asked) -> Computed:
    """See :class:`SketchedBackend`."""
    packed: _Packed | None = ffn.packed.get("cpu")
    if packed is None:
        packed = ffn.packed["cpu"] = _Packed(ffn)
    return packed.run(x, asked)


class _Packed:
    """An FFN as the loops take it."""

    def __init__(self, ffn: SketchedFFN) -> None:
        from dynaconv.kernels.cpu_sketched_rows import Memory, Records, Sizes

        weights, look = ffn.weights, ffn.gate or ffn.up
        self.neurons, self.residual = weights.up.shape
        self.pieces = -(-self.residual // 256)
        self.gated, self.factor = ffn.gate is not None, np.float32(np.exp(ffn.reach))
        self.sizes = Sizes(
            residual=self.residual,
            pieces=self.pieces,
            planes=ffn.up.bits,
            second=ffn.bits,
            gated=int(self.gated),
            low=int(ffn.down is not None),
            activation=ACTIVATIONS[ffn.activation],
            dtype=DTYPES[weights.up.dtype],
        )
        bias = weights.gate_bias if self.gated else weights.up_bias
        first, places = _records([("two", self._two(look)), ("numbers", self._numbers(look.units, bias, ffn.looked))])
        down, up = None if ffn.down is None else ffn.down.units, ffn.up if self.gated else None
        second, more = _records([
            ("two", self._numbers(ffn.up.units, weights.up_bias, ffn.norms, down)),
            ("up", self._two(up)), ("up_third", self._plane(up, 2)), ("third", self._plane(look, 2)),
            ("up_fourth", self._plane(up, 3)), ("fourth", self._plane(look, 3)),
            ("down_steps", self._steps(ffn.down)), ("down", self._four(ffn.down)),
        ])  # fmt: skip
        del more["two"]
        self.how = Records(first=first.shape[1], numbers=places["numbers"], second=second.shape[1], **more)
        exact = weights.gate if weights.gate is not None else weights.up
        read = [one.detach().contiguous() for one in (exact, weights.up)]  # where they lie, as a rule
        self._kept = [first, second, *read, weights.down.detach().t()]  # addresses are no references
        for made in (0, 1, 4):
            self._kept[made] = _on_large_pages(self._kept[made])
        self.memory = Memory(*(one.data_ptr() for one in self._kept))
        self.bias = None if weights.down_bias is None else weights.down_bias.detach().float()
        self.rounding = None if ffn.rounding is None else ffn.rounding.detach().float().numpy()

    def run(self, x: Tensor, asked: Asked) -> Computed:
        """The output (M, D) of tokens ``x`` (M, D), and how many neurons each used."""
        from dynaconv.kernels.cpu_sketched_loops import compute
        from dynaconv.kernels.cpu_sketched_rows import take_apart

        tokens, numbers, lanes = len(x), x.detach().float(), 16 * self.pieces
        padded = self._fit(numbers, 16 * lanes).contiguous().numpy()
        taken = self._taken(tokens)
        take_apart(padded, taken)
        factors, widths = np.full(tokens, self.factor), np.zeros((tokens, 2), np.float32)
        if self.gated or self.rounding is not None:
            lengths = torch.linalg.vector_norm(numbers, dim=-1).numpy()
            factors *= lengths if self.gated else np.float32(1)
            if self.rounding is not None:
                widths = lengths[:, None] * self.rounding
        level = asked.level.expand(tokens).contiguous().numpy()
        exact = level if asked.exact_level is None else asked.exact_level.expand(tokens).contiguous().numpy()
        means = _NO_MEANS if asked.mean is None else asked.mean.detach().float().view(-1, self.neurons).numpy()

        def part(start: int, stop: int) -> tuple[Any, Any]:
            out, counts = np.zeros((tokens, 16 * lanes), np.float32), np.zeros((tokens, 3), np.int32)
            work, lowered = np.empty((2, lanes), np.float32), np.zeros((tokens, -(-self.pieces // 2) * 16), np.float32)
            compute(
                self.memory, self.how, self.sizes, start, stop, padded, taken, factors, widths, level, exact, means,
                work, lowered, out, counts,
            )  # fmt: skip
            return out, counts

        parts = self._parts()
        waiting = [_pool().submit(part, *others) for others in parts[1:]]
        out, counts = part(*parts[0])
        for other in waiting:
            added, counted = other.result()
            out, counts = out + added, counts + counted
        output = torch.from_numpy(out)[:, : self.residual]
        for one in (asked.base, self.bias):
            if one is not None:
                output += one
        return Computed(output.to(x.dtype), torch.from_numpy(counts))

    def _taken(self, tokens: int) -> Any:
        from dynaconv.kernels.cpu_sketched_rows import Taken

        lanes = 16 * self.pieces
        bytes_ = np.empty((2, tokens, 16 * lanes), np.int8)
        numbers = np.empty((2, tokens, lanes), np.float32)
        return Taken(bytes_[0], bytes_[1], numbers[0], numbers[1])

    def _parts(self) -> list[tuple[int, int]]:
        """Neurons of each thread."""
        threads = max(1, min(torch.get_num_threads(), self.neurons * self.residual // PART))
        edges = [self.neurons * i // threads for i in range(threads + 1)]
        return list(itertools.pairwise(edges))

    def _two(self, of: Codes | None) -> Tensor | None:
        """The first two planes, with scales and minimums, (F, 80 P)."""
        if of is None:
            return None
        lanes = (2 * self._bits(of, 0) + self._bits(of, 1)).view(-1, self.pieces, 16, 4, 4)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
        codes = (lanes << shifts).sum(3, dtype=torch.uint8).flatten(2)
        steps = [self._fit(part, 8 * self.pieces).view(-1, self.pieces, 8) for part in (of.scales, of.minimums)]
        return torch.cat([codes, *steps], dim=2).flatten(1)

    def _plane(self, of: Codes | None, index: int) -> Tensor | None:
        """One plane, (F, 32 P); ``None`` where it does not exist."""
        if of is None or index >= of.bits:
            return None
        ordered = self._bits(of, index).view(-1, self.pieces, 16, 4, 4).transpose(2, 3).flatten(1)
        return (ordered.unflatten(1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)

    def _four(self, of: Codes | None) -> Tensor | None:
        """All four planes, (F, 128 P)."""
        if of is None:
            return None
        code = 8 * self._bits(of, 0) + 4 * self._bits(of, 1) + 2 * self._bits(of, 2) + self._bits(of, 3)
        halves = code.view(-1, 8 * self.pieces, 2, 16)
        return (halves[:, :, 0] + (halves[:, :, 1] << 4)).flatten(1)

    def _steps(self, of: Codes | None) -> Tensor | None:
        """Scales and minimums, (F, 32 ceil(P / 2))."""
        if of is None:
            return None
        groups = -(-self.pieces // 2) * 16
        return torch.cat([self._fit(part, groups) for part in (of.scales, of.minimums)], dim=1)

    def _bits(self, of: Codes, index: int) -> Tensor:
        """The bits of one plane, (F, 256 P)."""
        return self._fit(unpacked(of.planes[index])[:, : of.columns], 256 * self.pieces)

    def _fit(self, part: Tensor, columns: int) -> Tensor:
        return pad(part, (0, columns - part.shape[1]))

    def _numbers(self, units: Tensor, bias: Tensor | None, size: Tensor, further: Tensor | None = None) -> Tensor:
        """Units, bias, size, and further units, as bytes (F, 32)."""
        zeros = torch.zeros(self.neurons, 2)
        parts = [units.float(), zeros[:, :1] if bias is None else bias.float()[:, None], size.float()[:, None]]
        joined = torch.cat([*parts, zeros if further is None else further.float(), zeros], dim=1)
        return joined.detach().contiguous().view(torch.uint8)


def _records(parts: list[tuple[str, Tensor | None]]) -> tuple[Tensor, dict[str, int]]:
    """The parts (F, n) in rows one after another, padded to whole cache lines, and where each begins."""
    places, place = dict[str, int](), 0
    for name, part in parts:
        places[name] = place
        place += 0 if part is None else part.shape[1]
    rows = torch.cat([part for _, part in parts if part is not None], dim=1)
    return pad(rows, (0, -place % 64)), places


def _on_large_pages(tensor: Tensor) -> Tensor:
    """A copy on large pages, where the system has them: rows that are read lie far apart."""
    memory = mmap.mmap(-1, max(1, tensor.nbytes))
    with contextlib.suppress(AttributeError, OSError):  # not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return made.copy_(tensor)


_NO_MEANS = np.zeros((1, 0), np.float32)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="dynaconv-ffn")


CPU_SKETCHED = SketchedBackend("cpu-sketched", can_run, run)
