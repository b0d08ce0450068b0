"""The units in which a layer holds keys and values: powers of two, 1 for all but very large or very small ones.

A scale byte reaches from 2^-20 to 2^11.75 (csrc/format.h), and the fp16 scales of pages from 2^-24 to 65504. A model
whose keys or values lie elsewhere loses nothing by a power of two: codes are the same, and scores and outputs take it
back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Largest elements between these are held as they are: binary exponents.
_USUAL = range(-9, 10)


class Units(NamedTuple):
    """Binary exponents: what is held, times ``2**key`` or ``2**value``, is what came."""

    key: int = 0
    value: int = 0

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> Units:
        """Those for tokens like these; waits for a GPU to say how large they are."""
        largest = torch.stack([_largest(keys), _largest(values)]).tolist()
        if not all(map(math.isfinite, largest)):
            finite = [_largest(x.detach().nan_to_num(0.0, 0.0, 0.0)) for x in (keys, values)]
            largest = torch.stack(finite).tolist()
        return Units(*map(_exponent, largest))

    def scale(self, scale: float) -> float:
        """The factor of scores with keys as they are held."""
        return scale * 2.0**self.key if self.key else scale

    def inside(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are held."""
        return scaled(keys, -self.key), scaled(values, -self.value)

    def outside(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they came."""
        return scaled(keys, self.key), scaled(values, self.value)


AS_THEY_ARE = Units()


def scaled(x: Tensor, exponent: int) -> Tensor:
    """``x * 2**exponent``; what its dtype cannot hold becomes the largest that it can."""
    if exponent == 0:
        return x
    # In two steps: float32 holds neither 2**200 nor 2**-200.
    half = exponent // 2
    wide = x.float() * 2.0**half * 2.0 ** (exponent - half)
    if exponent > 0:
        most = torch.finfo(x.dtype).max
        wide = torch.where(x.isfinite(), wide.clamp(-most, most), wide)
    return wide.to(x.dtype)


def _largest(x: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high).float()


def _exponent(largest: float) -> int:
    exponent = math.frexp(largest)[1] if largest else 0
    return 0 if exponent in _USUAL else exponent
