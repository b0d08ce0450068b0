"""``QuantizedCache`` of transformers, as it is, with the quantiser of optimum-quanto."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedConfig, QuantizedCache
from transformers.cache_utils import Cache

from .layers.base import Settings
from .registry import method


@method("quanto")
@dataclass(frozen=True)
class Quanto(Settings):
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
        self.need(self.bits in self.allowed_bits, "bits", f"one of {', '.join(map(str, self.allowed_bits))}")
        for field in ("group", "residual"):
            self.need(getattr(self, field) >= 1, field, "a positive whole number")

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
