"""KIVI (arXiv 2402.02750): keys per channel, values per token, a residual of exact tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from ..format import BITS
from .layers.base import Baseline, need_group_divides
from .layers.minmax import MinMax, PerChannel
from .layers.quantized import QuantizingLayer
from .registry import method


@method("kivi")
@dataclass(frozen=True)
class KIVI(Baseline):
    """KIVI as its section 3.3 and Algorithm 1 have it, not what transformers calls ``QuantizedCache``.

    New keys stay exact until there are ``residual`` of them, which are then quantised together, so 0 to
    ``residual - 1`` are exact. The newest ``residual`` values are exact, an older one is quantised at every step.

    Args:
        bits: of a code: 2, 4 or 8.
        group: tokens of a key channel, and channels of a value, that share a scale and a zero of 16 bits each. Must
            divide the head dimension.
        residual: R, a multiple of ``group``.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        self.need(self.bits in BITS, "bits", "2, 4 or 8")
        self.need(self.group > 0 and self.group % 16 == 0, "group", "a positive multiple of 16")
        self.need(self.residual > 0 and self.residual % self.group == 0, "residual", f"a multiple of {self.group}")

    def layer(self, config: PreTrainedConfig) -> KIVILayer:
        return KIVILayer(self)


class KIVILayer(QuantizingLayer):
    """Keys and values of one layer under :class:`KIVI`."""

    def __init__(self, settings: KIVI) -> None:
        super().__init__()
        self.settings = settings
        self.key_quantizer = PerChannel(settings.bits, settings.group)
        self.value_quantizer = MinMax(settings.bits, settings.group)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        need_group_divides(self.settings.group, value_states)
        super().lazy_initialization(key_states, value_states)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        residual = self.settings.residual
        return tokens // residual * residual, max(0, tokens - residual)
