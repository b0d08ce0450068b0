"""Asymmetric min-max quantisation with 16-bit parameters, as KIVI and others have it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.reference.words import PARAM_MAX, pack_words, unpack_words


class MinMax(NamedTuple):
    """Groups along the last dimension share a scale and a zero.

    ``zero = fp16(min)``, ``scale = fp16((max - min) / levels)``, ``code = round((x - zero) / scale)``.

    Args:
        bits: of a code: 2, 4 or 8.
        group: elements of a group; a multiple of ``32 / bits``.
    """

    bits: int
    group: int

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, int32 ``[..., n * bits / 32]``, and parameters, float16 ``[..., n / group, 2]``, of ``[..., n]``."""
        groups = x.float().unflatten(-1, (-1, self.group))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        levels = 2**self.bits - 1
        params = torch.cat([(high - low) / levels, low], -1).clamp(-PARAM_MAX, PARAM_MAX).half()
        scale, zero = params.float().split(1, -1)
        codes = torch.where(scale > 0, (groups - zero) / scale, 0.0).round().clamp(0, levels)
        return pack_words(codes.flatten(-2).int(), self.bits), params

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        """What codes and parameters stand for, float32 ``[..., n]``."""
        scale, zero = params.float().split(1, -1)
        groups = unpack_words(codes, self.bits).unflatten(-1, (-1, self.group))
        out: Tensor = (zero + scale * groups).flatten(-2)
        return out


class PerChannel:
    """Groups of ``group`` consecutive tokens of a channel."""

    def __init__(self, bits: int, group: int) -> None:
        self.minmax = MinMax(bits, group)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``[B, H, n, D]``, n a multiple of the group: along dimension 2 are groups of tokens."""
        codes, params = self.minmax.encode(x.unflatten(2, (-1, self.minmax.group)).transpose(3, 4))
        return codes, params.squeeze(-2)

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        return self.minmax.decode(codes, params.unsqueeze(-2)).transpose(3, 4).flatten(2, 3)
