"""``QuantizedCache`` of transformers with the quantiser of HQQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .quanto import Quanto
from .registry import method


@method("hqq")
@dataclass(frozen=True)
class HQQ(Quanto):
    """``QuantizedCache(backend="hqq")``: half-quadratic quantisation of groups of consecutive channels.

    Args:
        bits: of a code: 1, 2, 3, 4 or 8.
        group: elements that share a scale and a zero.
        residual: exact tokens that are gathered before they are quantised.
    """

    backend: ClassVar[str] = "hqq"
    package: ClassVar[str] = "hqq"
    module: ClassVar[str] = "hqq"
    axis: ClassVar[int] = 1
    allowed_bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
