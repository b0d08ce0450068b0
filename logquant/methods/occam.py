"""OScaR (arXiv 2605.19660, "The Occam's Razor"; not OSCAR): KIVI with rotated vectors and keys of norm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..format import BITS
from ..ops.reference.hadamard import hadamard
from ..ops.reference.words import PARAM_MAX
from .layers.base import Baseline, need_group_divides, need_powers_of_two
from .layers.minmax import MinMax, PerChannel
from .layers.quantized import QuantizingLayer
from .registry import method


@method("occam")
@dataclass(frozen=True)
class OScaR(Baseline):
    """OScaR as its authors' repository has it: "canalized rotation", then "omni-token scaling" of keys.

    Keys and values are rotated (Hadamard over the channels). All keys of a token in a layer are then divided by their
    common norm, that of all KV heads together, which attention multiplies scores by after the dot product. What is left
    is quantised as in KIVI, keys per channel and values per token, but both as soon as there are ``residual`` tokens.
    No token stays exact for good.

    Not as there: zeros are the smallest element, where the authors' code rounds them to a multiple of the scale, and
    norms have 16 bits, where their kernels have 32. Only an abstract and reviews of the paper were read.

    Args:
        bits: of a code: 2, 4 or 8.
        group: tokens of a key channel, and channels of a value, that share a scale and a zero of 16 bits each. Must
            divide the head dimension.
        residual: new tokens that are gathered before they are quantised, a multiple of ``group``.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        self.need(self.bits in BITS, "bits", "2, 4 or 8")
        self.need(self.group >= 16 and self.group & (self.group - 1) == 0, "group", "a power of two from 16 on")
        self.need(self.residual > 0 and self.residual % self.group == 0, "residual", f"a multiple of {self.group}")

    def layer(self, config: PreTrainedConfig) -> OScaRLayer:
        return OScaRLayer(self)


class UnitKeys:
    """Rotated keys of norm 1, per channel, and their norms, float16 ``[B, 1, groups, group]``."""

    def __init__(self, bits: int, group: int) -> None:
        self.channels = PerChannel(bits, group)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        rotated = hadamard(x.float(), x.shape[3])
        norms = rotated.square().sum((1, 3), keepdim=True).sqrt().clamp_max(PARAM_MAX).half()
        unit = torch.where(norms > 0, rotated / norms.float(), 0.0)
        return *self.channels.encode(unit), norms.flatten(2).unflatten(2, (-1, self.channels.minmax.group))

    def decode(self, codes: Tensor, params: Tensor, norms: Tensor) -> Tensor:
        rotated = self.channels.decode(codes, params) * norms.float().flatten(2)[..., None]
        return hadamard(rotated, rotated.shape[3])


class RotatedValues:
    """Rotated values, per token."""

    def __init__(self, bits: int, group: int) -> None:
        self.minmax = MinMax(bits, group)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.minmax.encode(hadamard(x.float(), x.shape[3]))

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        rotated = self.minmax.decode(codes, params)
        return hadamard(rotated, rotated.shape[3])


class OScaRLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`OScaR`."""

    def __init__(self, settings: OScaR) -> None:
        super().__init__()
        self.settings = settings
        self.key_quantizer = UnitKeys(settings.bits, settings.group)
        self.value_quantizer = RotatedValues(settings.bits, settings.group)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        need_powers_of_two("OScaR", key_states, value_states)
        need_group_divides(self.settings.group, value_states)
        super().lazy_initialization(key_states, value_states)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        packed = tokens // self.settings.residual * self.settings.residual
        return packed, packed
