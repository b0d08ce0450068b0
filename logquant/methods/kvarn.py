"""KVarN (arXiv 2606.03458): Hadamard, then scales of tokens and of channels that make their variances equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..format import BITS
from ..ops.reference.hadamard import hadamard
from ..ops.reference.words import PARAM_MAX
from .layers.base import Baseline, need_powers_of_two
from .layers.minmax import MinMax
from .layers.quantized import QuantizingLayer
from .registry import method


@method("kvarn")
@dataclass(frozen=True)
class KVarN(Baseline):
    """KVarN as its authors' repository has it (README, reference of the store kernel), which ships K 4 V 2.

    Tokens are quantised in tiles, each as soon as it is full; the first ones and a tile that is not full are exact. A
    tile is rotated (Hadamard over the channels) and divided by a scale for each token and one for each channel, which
    are found in turn (:func:`balance`). Then keys have a range for each channel, values one for each token, which takes
    in the scale of that channel or token. So a key takes 16 bits for its scale and a value 32, and a tile 32 bits for
    each channel of its keys and 16 for each of its values.

    Read in an abstract alone, not in the paper: whether its experiments have other exact tokens. ``sinks`` and ``tile``
    are those of the repository; ``iterations`` those of its reference (its kernels have 8, "lossless").

    Args:
        key_bits, value_bits: of a code: 2, 4 or 8.
        tile: tokens of a tile, a multiple of 16.
        sinks: first tokens that stay exact.
        iterations: of finding scales.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    key_bits: int = 4
    value_bits: int = 2
    tile: int = 128
    sinks: int = 128
    iterations: int = 16

    def __post_init__(self) -> None:
        for field in ("key_bits", "value_bits"):
            self.need(getattr(self, field) in BITS, field, "2, 4 or 8")
        self.need(self.tile > 0 and self.tile % 16 == 0, "tile", "a positive multiple of 16")
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")
        self.need(self.iterations >= 0, "iterations", "a whole number, 0 or more")

    def layer(self, config: PreTrainedConfig) -> KVarNLayer:
        return KVarNLayer(self)


def balance(tiles: Tensor, iterations: int) -> Tensor:
    """Scales of the columns of tiles, so that with others of the rows all standard deviations become alike.

    Column and row scales are multiplied in turn by the standard deviations that are left, as logarithms from -0.3 to
    10. The iteration counts after which the largest and the smallest are closest, in columns and rows together.

    Args:
        tiles: float32 ``[..., R, C]``.
        iterations: how often columns and rows are scaled.

    Returns:
        float32 ``[..., 1, C]``. The scales of the rows are not needed: a range of each row takes them in.
    """

    def deviation(x: Tensor, dim: int) -> Tensor:
        return x.std(dim, keepdim=True)

    def imbalance(x: Tensor) -> Tensor:
        ratios = [(s.amax((-1, -2)) / s.amin((-1, -2)).clamp_min(1e-8)) for s in (deviation(x, -2), deviation(x, -1))]
        return (ratios[0] + ratios[1])[..., None, None]

    logs = [torch.zeros_like(deviation(tiles, dim)) for dim in (-2, -1)]
    best, least, left = logs[0], imbalance(tiles), tiles
    for _ in range(iterations):
        for i, dim in enumerate((-2, -1)):
            logs[i] = (logs[i] + deviation(left, dim).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
            left = tiles / logs[0].exp() / logs[1].exp()
        now = imbalance(left)
        best, least = torch.where(now <= least, logs[0], best), torch.where(now <= least, now, least)
    return best.exp()


class Tiles:
    """Tiles whose rows have a range each and whose columns have a scale each: channels and tokens, or vice versa.

    Args:
        bits: of a code.
        tile: tokens of a tile.
        by_channel: whether rows are channels.
        iterations: of :func:`balance`.
    """

    def __init__(self, bits: int, tile: int, by_channel: bool, iterations: int) -> None:
        self.bits, self.tile, self.by_channel, self.iterations = bits, tile, by_channel, iterations

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, ranges ``[B, H, tiles, R, 1, 2]`` and column scales ``[B, H, tiles, 1, C]``, both float16."""
        tiles = hadamard(x.float(), x.shape[3]).unflatten(2, (-1, self.tile))
        tiles = tiles.mT if self.by_channel else tiles
        columns = balance(tiles, self.iterations).clamp_max(PARAM_MAX).half()
        return *MinMax(self.bits, tiles.shape[-1]).encode(tiles / columns.float()), columns

    def decode(self, codes: Tensor, ranges: Tensor, columns: Tensor) -> Tensor:
        tiles = MinMax(self.bits, columns.shape[-1]).decode(codes, ranges) * columns.float()
        rotated = (tiles.mT if self.by_channel else tiles).flatten(2, 3)
        return hadamard(rotated, rotated.shape[3])


class KVarNLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`KVarN`."""

    def __init__(self, settings: KVarN) -> None:
        super().__init__(settings.sinks)
        self.settings = settings
        tile, iterations = settings.tile, settings.iterations
        self.key_quantizer = Tiles(settings.key_bits, tile, True, iterations)
        self.value_quantizer = Tiles(settings.value_bits, tile, False, iterations)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        need_powers_of_two("KVarN", key_states, value_states)
        super().lazy_initialization(key_states, value_states)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        packed = max(0, tokens - self.settings.sinks) // self.settings.tile * self.settings.tile
        return packed, packed
