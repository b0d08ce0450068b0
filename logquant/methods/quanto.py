"""``QuantizedCache`` of transformers, as it is, with its two libraries of quantisers: quanto and HQQ."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, QuantizedCache
from transformers.cache_utils import Cache, QuantizedLayer

from ..cache.sizes import tensors_in
from .layers.base import Packed


@dataclass(frozen=True)
class Quanto:
    """``QuantizedCache(backend="quanto")``: what LogQuant's paper compares itself with under the name of KiVi.

    The whole prompt is quantised at once, and the residual whenever it is full, together with all that was quantised
    before. Groups are consecutive channels, of keys as well.

    Args:
        bits: of a code: 2 or 4.
        group: elements that share a scale and a zero.
        residual: exact tokens that are gathered before they are quantised.

    Raises:
        ImportError: the package that quantises is not installed.
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    group: int = 64
    residual: int = 128
    backend: ClassVar[str] = "quanto"
    package: ClassVar[str] = "optimum-quanto"
    module: ClassVar[str] = "optimum.quanto"
    axis: ClassVar[int] = 0
    allowed_bits: ClassVar[tuple[int, ...]] = (2, 4)

    def __post_init__(self) -> None:
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ImportError(
                f"cache {self.backend!r} needs the package {self.package}: pip install 'logquant[baselines]'"
            )
        if self.bits not in self.allowed_bits:
            raise ValueError(f"bits must be one of {', '.join(map(str, self.allowed_bits))}, got {self.bits!r}")
        for field in ("group", "residual"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be a positive whole number, got {getattr(self, field)!r}")

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache.

        Raises:
            ValueError: a model that has layers without full attention.
        """
        return QuantizedCache(
            self.backend,
            config,
            nbits=self.bits,
            axis_key=self.axis,
            axis_value=self.axis,
            q_group_size=self.group,
            residual_length=self.residual,
        )


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


def packed_of(layer: QuantizedLayer) -> list[Packed]:
    """What a layer of transformers' holds quantised."""
    exact = layer.keys
    tokens = layer.get_seq_length() - (0 if exact is None or exact.dim() < 4 else exact.shape[-2])
    parts = []
    for quantized in (layer._quantized_keys, layer._quantized_values):
        if quantized is not None:
            elements = layer._dequantize(quantized).numel()
            parts.append(Packed(sum(t.nbytes for t in tensors_in(quantized)), elements, tokens))
    return parts
