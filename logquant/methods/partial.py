"""PartialLogQuant of LogQuant's authors: the log rule for keys, only the newest tokens for values."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..format import BITS
from ..rule import evictions, split_positions
from .layers.base import Baseline
from .layers.minmax import MinMax
from .layers.quantized import QuantizingLayer
from .registry import method


@method("partial")
@dataclass(frozen=True)
class Partial(Baseline):
    """The variant in the code beside LogQuant's paper (arXiv 2503.19950), which its text does not name.

    Of keys the log rule keeps 2W to 3W exact (:mod:`logquant.rule`, without sinks), of values at most the newest
    W - 1: they are quantised W at a time. Keys and values are quantised token by token. Their code stores exact keys a
    second time, in 2 bits, and zeros as integers; neither is done here.

    Args:
        bits: of a code: 2, 4 or 8.
        window: W; half the authors' number of reserved tokens, so 64 for 128.
        group: channels that share a scale and a zero; the whole head if that has fewer.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    window: int = 64
    group: int = 64

    def __post_init__(self) -> None:
        self.need(self.bits in BITS, "bits", "2, 4 or 8")
        self.need(self.window > 0, "window", "a positive whole number")
        self.need(self.group > 0 and self.group % 16 == 0, "group", "a positive multiple of 16")

    def layer(self, config: PreTrainedConfig) -> PartialLayer:
        return PartialLayer(self)


@functools.lru_cache(maxsize=4)
def _places(tokens: int, window: int) -> tuple[Tensor, Tensor]:
    """Positions of the quantised keys, in the order they were quantised, and of the exact ones."""
    packed, exact = split_positions(tokens, window)
    return packed.long(), exact.long()


class PartialLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`Partial`; which keys are where follows from how many tokens came."""

    def __init__(self, settings: Partial) -> None:
        super().__init__()
        self.settings = settings

    def _forget(self) -> None:
        super()._forget()
        self._settled = 0  # tokens that the rule has been applied to

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        dims = [states.shape[3] for states in (key_states, value_states)]
        groups = [min(self.settings.group, dim) for dim in dims]
        for dim, group in zip(dims, groups, strict=True):
            if dim % group:
                raise ValueError(f"group must divide the head dimension {dim}, got {group}")
        self.key_quantizer, self.value_quantizer = (MinMax(self.settings.bits, group) for group in groups)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        window = self.settings.window
        return window * evictions(tokens, window), tokens // window * window

    def _exact_places(self) -> Tensor:
        """Positions of the keys held exactly."""
        _, exact = _places(self._settled, self.settings.window)
        return torch.cat([exact, torch.arange(self._settled, self.tokens)])

    def dense(self) -> tuple[Tensor, Tensor]:
        keys, values = super().dense()
        packed, _ = _places(self._settled, self.settings.window)
        order = torch.cat([packed, self._exact_places()]).argsort()
        return keys.index_select(2, order.to(keys.device)), values

    def _pack(self) -> None:
        packed, exact = _places(self.tokens, self.settings.window)
        # Those that leave come first, in the order of the rule, as the layers of this kind expect.
        before = self._exact_places()
        moved = torch.cat([packed[self.packed_keys :], exact])
        slots = torch.searchsorted(before, moved)
        self.keys = self.keys.index_select(2, slots.to(self.keys.device))
        super()._pack()
        self._settled = self.tokens
