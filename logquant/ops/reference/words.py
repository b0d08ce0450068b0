"""Codes and parameters as the 32-bit words of a page (csrc/format.h), and scales as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

PARAM_MAX = 65504.0


def _element_shifts(bits: int, device: torch.device) -> Tensor:
    element = torch.arange(32 // bits, dtype=torch.int32, device=device)
    return bits * (element // 2) + 16 * (element % 2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., n]`` (integers, n a multiple of 32/bits) into int32 words ``[..., n*bits/32]``."""
    shifts = _element_shifts(bits, codes.device).long()
    words: Tensor = (codes.long().unflatten(-1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_words`, as int32."""
    shifts = _element_shifts(bits, words.device)
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def pack_half(x: Tensor) -> Tensor:
    return x.to(torch.float16).contiguous().view(torch.int32)


def unpack_half(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float16).float()


def pack_bytes(x: Tensor) -> Tensor:
    return x.to(torch.int8).contiguous().view(torch.int32)


def unpack_bytes(words: Tensor, signed: bool) -> Tensor:
    return words.contiguous().view(torch.int8 if signed else torch.uint8).int()


# A scale byte e stands for 2^((e - 160) / 8). These are the fraction bits of fp32 numbers: of 2^(i / 8), and of
# 2^((i + 1/2) / 8), above which a scale is rounded up. All arithmetic on scales is on integers, hence exact.
SCALE_EIGHTHS = (0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167)
SCALE_MIDDLES = (371395, 1164243, 2028850, 2971711, 3999908, 5121164, 6343903, 7677309)
SCALE_EXPONENT = 107  # of scale byte 0, biased as in fp32: 2^-20
SCALE_MAX = 254
POISON = 255  # the scale byte of a group that holds a NaN or an infinity


def scale_byte(x: Tensor, borders: tuple[int, ...]) -> Tensor:
    """The byte of scales ``x`` (float32, not negative), int32: nearest (SCALE_MIDDLES) or not below (SCALE_EIGHTHS)."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    steps = sum(((bits & 0x7FFFFF) > border).int() for border in borders)
    return (8 * ((bits >> 23) - SCALE_EXPONENT) + steps).clamp(0, SCALE_MAX)


def byte_scale(byte: Tensor) -> Tensor:
    """The scale that a byte (int32, up to SCALE_MAX) stands for, float32."""
    fraction = torch.tensor(SCALE_EIGHTHS, dtype=torch.int32, device=byte.device)[(byte & 7).long()]
    return (((byte >> 3) + SCALE_EXPONENT << 23) | fraction).view(torch.float32)
