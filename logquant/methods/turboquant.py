"""TurboQuant (arXiv 2504.19874): a random rotation, then a fixed codebook for every coordinate."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..ops.reference.words import pack_words, unpack_words
from ..rule import evictions
from .layers.base import Baseline
from .layers.quantized import QuantizingLayer
from .registry import method


@method("turboquant")
@dataclass(frozen=True)
class TurboQuant(Baseline):
    """TurboQuant's Algorithm 1 (the one for squared error) for keys and values, besides exact tokens as ``recent`` has.

    A vector is divided by its norm, which is kept in 16 bits, and rotated at random; its coordinates then have a known
    distribution, for which the Lloyd-Max codebook is optimal. Neither rotation nor codebook depends on data: both are
    constants, and no part of a cache. The paper's Algorithm 2, which spends one of the bits on signs of a projected
    residual, and its extra bits for outlier channels (section 4.3) are not here.

    Args:
        bits: of a coordinate: 1, 2, 4 or 8.
        window: W: between 2W and 3W of the newest tokens stay exact.
        sinks: first tokens that stay exact.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    bits: int = 2
    window: int = 64
    sinks: int = 4

    def __post_init__(self) -> None:
        self.need(self.bits in (1, 2, 4, 8), "bits", "1, 2, 4 or 8")
        self.need(self.window > 0, "window", "a positive whole number")
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")

    def layer(self, config: PreTrainedConfig) -> TurboQuantLayer:
        return TurboQuantLayer(self)


@functools.cache
def rotation(dim: int) -> Tensor:
    """A random orthogonal matrix, float32 ``[dim, dim]``, always the same (section 3.1: QR of a Gaussian matrix)."""
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Uniformly distributed only with the signs of R's diagonal made positive.
    out: Tensor = (q * r.diagonal().sign()).float()
    return out


@functools.cache
def codebook(dim: int, bits: int) -> Tensor:
    """The Lloyd-Max codebook of a coordinate of a random unit vector, float32 ``[2^bits]``, ascending.

    The coordinate's density is proportional to ``(1 - x^2)^((dim - 3) / 2)`` (Lemma 1); on a fine grid, centroids and
    the boundaries halfway between them are found in turn until they stay (equation 4).

    Args:
        dim: of the vector, at least 3.
        bits: of a code.
    """
    x = torch.linspace(-1, 1, 40_001, dtype=torch.float64)
    weight = (1 - x * x).clamp_min(0) ** ((dim - 3) / 2)
    # From quantiles, so that no cell is empty.
    cumulative = weight.cumsum(0) / weight.sum()
    middles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    centroids = x[torch.searchsorted(cumulative, middles)]
    for _ in range(10_000):
        cell = torch.bucketize(x, (centroids[1:] + centroids[:-1]) / 2)
        mass = torch.zeros_like(centroids).index_add_(0, cell, weight)
        moved = torch.zeros_like(centroids).index_add_(0, cell, weight * x) / mass.clamp_min(1e-300)
        if (moved - centroids).abs().max() < 1e-9:
            break
        centroids = moved
    return centroids.float()


class RandomCodebook:
    """Norms and codes of rotated directions.

    Args:
        dim: of a vector.
        bits: of a coordinate.
        device: where vectors are.
    """

    def __init__(self, dim: int, bits: int, device: torch.device) -> None:
        self.bits = bits
        self._rotation, self._codebook = rotation(dim).to(device), codebook(dim, bits).to(device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int32 ``[B, H, n, D * bits / 32]``, and norms, float16 ``[B, H, n, 1]``."""
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True)
        rotated = x / norm.clamp_min(torch.finfo(torch.float32).tiny) @ self._rotation
        codes = torch.bucketize(rotated, (self._codebook[1:] + self._codebook[:-1]) / 2)
        return pack_words(codes.int(), self.bits), norm.half()

    def decode(self, codes: Tensor, norm: Tensor) -> Tensor:
        return self._codebook[unpack_words(codes, self.bits)] @ self._rotation.mT * norm.float()


class TurboQuantLayer(QuantizingLayer):
    """Keys and values of one layer under :class:`TurboQuant`."""

    def __init__(self, settings: TurboQuant) -> None:
        super().__init__(settings.sinks)
        self.settings = settings

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.key_quantizer = RandomCodebook(key_states.shape[3], self.settings.bits, self.device)
        self.value_quantizer = RandomCodebook(value_states.shape[3], self.settings.bits, self.device)

    def packed_tokens(self, tokens: int) -> tuple[int, int]:
        window = self.settings.window
        packed = window * evictions(tokens, window, self.settings.sinks)
        return packed, packed
