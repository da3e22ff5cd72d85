"""Training-free baselines that read every weight in fewer bits: round to nearest, HQQ, and GPTQ.

Codes are for groups of weights along the input. A group's scale, and its minimum or zero point, are fp16 and counted.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch
from quality_ffn import FFN, Network, Shares
from torch import Tensor
from torch.nn.functional import linear, normalize, pad

from dynaconv.errors import ConfigError

GROUP = 32  # weights along the input that share a scale
PARENT_BITS = 16  # of a weight in bf16


class Exact:
    """The parent's own bf16 weights: what baselines that leave weights out read by default."""

    suffix = ""

    def rounded_ffn(self, ffn: FFN, inputs: Tensor) -> FFN:
        """``ffn`` itself."""
        return ffn

    def columns_read(self, on: Tensor) -> float:
        """Mean share of a bf16 matrix that is read for the columns that are ``on``, ``(..., columns)`` bool."""
        return float(on.float().mean())


@dataclass(frozen=True)
class Quantised:
    """All FFN weights rounded to few bits, and read for every token.

    Attributes:
        bits: Of a code.
        group: Weights along the input that share a scale, and a minimum where there is one.
    """

    bits: int
    group: int = GROUP
    name = "quantised"
    constants = 2  # fp16 numbers a group

    @property
    def setting(self) -> str:
        """The bits, and the group where it is not the usual one."""
        return f"{self.bits} bits" + (f", groups of {self.group}" if self.group != GROUP else "")

    @property
    def share(self) -> float:
        """Bytes of the codes and of what comes with a full group."""
        return (self.bits + 16 * self.constants / self.group) / PARENT_BITS

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """The FFN with rounded weights."""
        rounded = self.rounded_ffn(ffn, inputs)
        outer, inner = (self.columns_read(torch.ones(len(matrix), dtype=torch.bool)) for matrix in (ffn.down, ffn.gate))
        read = (2 * outer + inner) / 3
        return lambda x: (linear(rounded.hidden(x), rounded.down), Shares(read, 1.0, 1.0))

    @property
    def suffix(self) -> str:
        """What is added to the name of a baseline that leaves some of these weights out."""
        return f" on {self.name}, {self.setting}"

    def columns_read(self, on: Tensor) -> float:
        """Mean share of a bf16 matrix that is read for the columns that are ``on``, ``(..., columns)`` bool.

        Of a group with any column that is on, scale and minimum are read.
        """
        touched = pad(on, (0, -on.shape[-1] % self.group)).unflatten(-1, (-1, self.group)).any(-1)
        groups = float(touched.float().mean()) * touched.shape[-1] / on.shape[-1]  # for each column
        return (self.bits * float(on.float().mean()) + 16 * self.constants * groups) / PARENT_BITS

    def rounded_ffn(self, ffn: FFN, inputs: Tensor) -> FFN:
        """``ffn`` with rounded weights; ``inputs`` are not looked at."""
        return FFN(self.rounded(ffn.gate), self.rounded(ffn.up), self.rounded(ffn.down), ffn.activation)

    def rounded(self, weight: Tensor) -> Tensor:
        """``(rows, columns)`` as its codes say it; a last group that is not full has a scale of its own."""
        rows, columns = weight.shape
        missing = -columns % self.group
        filled = pad(weight[:, None].float(), (0, missing), mode="replicate")[:, 0] if missing else weight.float()
        values = self.rounded_groups(filled.reshape(-1, self.group))
        return values.reshape(rows, -1)[:, :columns].to(weight.dtype)

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """``(groups, group)`` as their codes say them."""
        raise NotImplementedError


class Symmetric(Quantised):
    """Round to nearest (RTN), symmetric: a scale for each group, codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""

    name = "RTN symmetric"
    constants = 1

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """Scales are rounded to fp16 first, so that codes are right for what is stored."""
        top = 2 ** (self.bits - 1) - 1
        scale = _fp16(groups.abs().amax(1, keepdim=True) / top)
        return (groups / _not_zero(scale)).round().clamp(-top, top) * scale


class Asymmetric(Quantised):
    """Round to nearest (RTN), asymmetric: a minimum and a scale for each group, codes from 0 to 2^bits - 1."""

    name = "RTN asymmetric"

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """Minimums and scales are rounded to fp16 first, so that codes are right for what is stored."""
        return self._nearest(groups, *self._grid(groups))

    def _grid(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and scale of each group, ``(groups, 1)``."""
        least = _fp16(groups.amin(1, keepdim=True))
        return least, _fp16((groups.amax(1, keepdim=True) - least) / (2**self.bits - 1))

    def _nearest(self, values: Tensor, least: Tensor, scale: Tensor) -> Tensor:
        return ((values - least) / _not_zero(scale)).round().clamp(0, 2**self.bits - 1) * scale + least


class GPTQ(Asymmetric):
    """GPTQ (arXiv 2210.17323): columns are rounded one after the other, and later ones make up for the error.

    What it keeps small is the error of the matrix's output on calibration text. Asymmetric codes; a group's minimum
    and scale are taken when its first column is reached; columns in their own order; 1 % damping. All inputs are the
    dense model's, while the paper's are those of the model rounded so far. Inputs are normalised by token: as they
    are, the few tokens with massive activations decide alone, and the others come out worse than rounded to nearest.
    """

    name = "GPTQ"

    def rounded_ffn(self, ffn: FFN, inputs: Tensor) -> FFN:
        """``ffn`` with weights rounded for ``inputs``."""
        outer, inner = _error_factor(normalize(inputs)), _error_factor(normalize(ffn.hidden(inputs)))
        gate, up = self.compensated(ffn.gate, outer), self.compensated(ffn.up, outer)
        return FFN(gate, up, self.compensated(ffn.down, inner), ffn.activation)

    def compensated(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``(rows, columns)`` rounded; ``factor`` is what :func:`_error_factor` makes of its inputs."""
        left, found = weight.float().clone(), torch.empty_like(weight)
        for start in range(0, weight.shape[1], self.group):
            group = left[:, start : start + self.group]  # a view: what is made up for shows
            grid, within = self._grid(group), factor[start : start + self.group, start : start + self.group]
            errors = torch.empty_like(group)
            for i in range(group.shape[1]):
                column = group[:, i : i + 1]
                rounded = self._nearest(column, *grid)
                found[:, start + i] = rounded[:, 0]
                errors[:, i] = (column - rounded)[:, 0] / within[i, i]
                group[:, i + 1 :] -= errors[:, i : i + 1] * within[i, i + 1 :]
            stop = start + group.shape[1]
            left[:, stop:] -= errors @ factor[start:stop, stop:]
        return found


class HQQ(Quantised):
    """HQQ, half-quadratic quantisation (Badri and Shaji, 2023), by the authors' library ``hqq``.

    Asymmetric codes whose zero points minimise a robust error of the weights; no calibration text. The library's own
    settings: scales along the input, its optimiser on, zero points rounded for 4 bits. Scales and zero points are
    rounded to fp16 afterwards.
    """

    name = "HQQ"

    @staticmethod
    def missing() -> bool:
        """Whether the library is not installed."""
        return importlib.util.find_spec("hqq") is None

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """What the library makes of them.

        Raises:
            ConfigError: It is not installed.
        """
        if self.missing():
            raise ConfigError("HQQ needs the hqq package, which is not installed", hint="pip install hqq")
        quantise = importlib.import_module("hqq.core.quantize").Quantizer.quantize
        codes, meta = quantise(
            groups,
            nbits=self.bits,
            group_size=self.group,
            axis=1,
            round_zero=self.bits == 4,
            bitpack=False,
            device="cpu",
            compute_dtype=torch.float32,
        )
        values: Tensor = (codes.float() - _fp16(meta["zero"])) * _fp16(meta["scale"])
        return values


def _error_factor(inputs: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse second moment of ``(M, columns)`` inputs, damped: ``(columns, columns)``."""
    moment = inputs.double().t() @ inputs.double()
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(moment), upper=True).float()


def _fp16(values: Tensor) -> Tensor:
    return values.half().float()


def _not_zero(scale: Tensor) -> Tensor:
    return scale.where(scale != 0, 1.0)
