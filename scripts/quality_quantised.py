"""Training-free baselines that read every weight in fewer bits: round to nearest, and HQQ.

Codes are for groups of weights along the input. A group's scale, and its minimum or zero point, are fp16 and counted.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import torch
from quality_ffn import FFN, Network, Shares
from torch import Tensor
from torch.nn.functional import linear, pad

from dynaconv.errors import ConfigError

GROUP = 32  # weights along the input that share a scale
PARENT_BITS = 16  # of a weight in bf16


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
        """The FFN with rounded weights; ``inputs`` are not looked at."""
        matrices = (ffn.gate, ffn.up, ffn.down)
        gate, up, down = (self.rounded(weight) for weight in matrices)
        rounded = FFN(gate, up, down, ffn.activation)
        groups = sum(len(weight) * -(-weight.shape[1] // self.group) for weight in matrices)
        weights = sum(weight.numel() for weight in matrices)
        read = (self.bits + 16 * self.constants * groups / weights) / PARENT_BITS
        return lambda x: (linear(rounded.hidden(x), rounded.down), Shares(read, 1.0, 1.0))

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
    """Round to nearest, symmetric: a scale for each group, codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""

    name = "round to nearest, symmetric"
    constants = 1

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """Scales are rounded to fp16 first, so that codes are right for what is stored."""
        top = 2 ** (self.bits - 1) - 1
        scale = _fp16(groups.abs().amax(1, keepdim=True) / top)
        return (groups / _not_zero(scale)).round().clamp(-top, top) * scale


class Asymmetric(Quantised):
    """Round to nearest, asymmetric: a minimum and a scale for each group, codes from 0 to 2^bits - 1."""

    name = "round to nearest, asymmetric"

    def rounded_groups(self, groups: Tensor) -> Tensor:
        """Minimums and scales are rounded to fp16 first, so that codes are right for what is stored."""
        top = 2**self.bits - 1
        least = _fp16(groups.amin(1, keepdim=True))
        scale = _fp16((groups.amax(1, keepdim=True) - least) / top)
        return ((groups - least) / _not_zero(scale)).round().clamp(0, top) * scale + least


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


def _fp16(values: Tensor) -> Tensor:
    return values.half().float()


def _not_zero(scale: Tensor) -> Tensor:
    return scale.where(scale != 0, 1.0)
