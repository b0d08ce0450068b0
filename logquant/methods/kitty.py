"""Kitty (arXiv 2511.18643): KIVI with sinks, and with 4 bits for the key channels that are largest in a page."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..ops.reference.words import pack_words, unpack_words
from .layers.base import Baseline, need_group_divides
from .layers.minmax import MinMax, PerChannel
from .layers.quantized import QuantizingLayer
from .registry import method


@method("kitty")
@dataclass(frozen=True)
class Kitty(Baseline):
    """Kitty as its authors' repository has it: "dynamic channel-wise precision boost".

    Keys are quantised a page of ``residual`` tokens at a time, each channel with a range of its own. In every page and
    KV head, the channels with the largest mean magnitude have codes of 4 bits, stored as two tensors of 2 bits, the
    others of 2. A page keeps the numbers of its 4-bit channels, a byte each (the authors' kernels: a byte for every
    channel). Values have 2 bits and a range for each token; an older one than the newest ``residual`` is quantised at
    every step, as their simulation has it (their kernels gather another page of them).

    Not verified: of the paper only the abstract was read. The share of channels is that of the authors' cache class;
    their scripts have others, too (0.1, 0.125 and 0.2).

    Args:
        boosted: share of key channels with 4 bits, from 0 to 1.
        residual: tokens of a page of keys, a multiple of 16, and newest values that stay exact.
        group: channels of a value that share a scale and a zero; the whole head if that has fewer.
        sinks: first tokens that stay exact.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    boosted: float = 0.25
    residual: int = 128
    group: int = 128
    sinks: int = 32

    def __post_init__(self) -> None:
        self.need(0 <= self.boosted <= 1, "boosted", "from 0 to 1")
        self.need(self.residual > 0 and self.residual % 16 == 0, "residual", "a positive multiple of 16")
        self.need(self.group > 0 and self.group % 16 == 0, "group", "a positive multiple of 16")
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")

    def layer(self, config: PreTrainedConfig) -> KittyLayer:
        return KittyLayer(self)


class BoostedKeys:
    """Pages of keys with 4 bits for some channels.

    Args:
        boosted: how many.
        page: tokens of a page.
    """

    def __init__(self, boosted: int, page: int) -> None:
        self.boosted = boosted
        self.low, self.high = PerChannel(2, page), PerChannel(4, page)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of pages: lower bits and ranges of all channels, upper bits and numbers of those with 4 bits."""
        magnitude = x.float().abs().unflatten(2, (-1, self.low.minmax.group)).mean(3)
        channels = magnitude.topk(self.boosted, -1).indices.sort(-1).values
        (low, ranges), (codes, fine) = self.low.encode(x), self.high.encode(x)
        codes = unpack_words(_of(channels, codes), 4)
        low = low.scatter(3, _to(channels, low), pack_words(codes & 3, 2))
        ranges = ranges.scatter(3, _to(channels, ranges), _of(channels, fine))
        return low, ranges, pack_words(codes >> 2, 2), channels.to(torch.uint8 if x.shape[3] <= 256 else torch.int16)

    def decode(self, low: Tensor, ranges: Tensor, upper: Tensor, numbers: Tensor) -> Tensor:
        channels = numbers.long()
        codes = unpack_words(low, 2)
        codes = codes.scatter_add(3, _to(channels, codes), 4 * unpack_words(upper, 2))
        scale, zero = ranges.float().split(1, -1)
        out: Tensor = (zero + scale * codes).mT.flatten(2, 3)
        return out


def _to(channels: Tensor, x: Tensor) -> Tensor:
    """Indices of channels, ``[B, H, pages, n]``, along dimension 3 of ``x`` ``[B, H, pages, D, k]``."""
    return channels[..., None].expand(*channels.shape, x.shape[4])


def _of(channels: Tensor, x: Tensor) -> Tensor:
    return x.gather(3, _to(channels, x))


class KittyLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`Kitty`."""

    def __init__(self, settings: Kitty) -> None:
        super().__init__(settings.sinks)
        self.settings = settings

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        settings, group = self.settings, min(self.settings.group, value_states.shape[3])
        need_group_divides(group, value_states)
        self.key_quantizer = BoostedKeys(int(settings.boosted * key_states.shape[3] + 1e-6), settings.residual)
        self.value_quantizer = MinMax(2, group)
        super().lazy_initialization(key_states, value_states)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        residual, after_sinks = self.settings.residual, max(0, tokens - self.settings.sinks)
        return after_sinks // residual * residual, max(0, after_sinks - residual)
