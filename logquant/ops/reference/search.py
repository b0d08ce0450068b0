"""Parameters with the least squared error, found by a search: what 8-bit parameters are (csrc/candidates.h).

Groups lie along dim 0. Everything is one fp32 operation after the other, in the order written (no fused multiply-add),
and sums have one order, so that every backend finds the same parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .words import PARAM_MAX, POISON, SCALE_EIGHTHS, SCALE_MIDDLES, byte_scale, scale_byte

SHRINKS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the whole range, about its middle
MOVES = (0.15, 0.07, -0.07, -0.15, 0.15, 0.07, -0.07, -0.15)  # of one end of the range, in parts of it
REFITS = 2


def _sum(x: Tensor) -> Tensor:
    """Sum over dim 0, whose size is a multiple of 4: elements i, i + 4, ... one by one, then the four sums."""
    parts = x.unflatten(0, (-1, 4))
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return (total[0] + total[1]) + (total[2] + total[3])


def nearest_code(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    code = ((x - zero) * (1.0 / scale)).round().clamp_min(0)
    return torch.minimum(code, levels)


def _error(x: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    difference = (zero + scale * nearest_code(x, scale, zero, levels)) - x
    return _sum((weights * difference) * difference)


def search_keys(x: Tensor, weights: Tensor, levels: Tensor, lift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale bytes, zero bytes (int32) and codes (float32) of groups of key elements, by weighted squared error.

    Both ends of the range are searched, beginning with those of the elements; then scale and zero are refitted to the
    codes by least squares. Every candidate is rounded to what can be stored before it is tried. A group without levels
    keeps its weighted mean.

    Args:
        x: ``[n, ...]`` float32, n a multiple of 4.
        weights: ``[n, ...]`` (or broadcastable) float32, positive.
        levels: ``[...]`` float32, the largest code; 0 for a channel without columns.
        lift: ``[...]`` float32, the stored scale (that of the two highest bits) in units of the codes' scale.
    """
    finite = x.isfinite().all(0)
    x = x.where(finite, 0.0).clamp(-PARAM_MAX, PARAM_MAX)
    weights = weights.expand_as(x)
    drop, most = 1.0 / lift, levels.clamp_min(1)
    total = _sum(weights)
    mean = _sum(weights * x) / total
    low = torch.where(levels > 0, x.amin(0) + 0.0, mean)
    high = torch.where(levels > 0, x.amax(0) + 0.0, mean)

    best_byte = best_zero_byte = torch.zeros_like(low, dtype=torch.int32)
    scale, zero, error = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)

    def offer(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal best_byte, best_zero_byte, scale, zero, error
        # The scale is large enough for the zero to be stored.
        byte = torch.maximum(
            scale_byte(new_scale * lift, SCALE_MIDDLES), scale_byte(new_zero.abs() * (8 / 127), SCALE_EIGHTHS)
        )
        top = byte_scale(byte)
        unit = top * 0.125
        zero_byte = (new_zero / unit).round().clamp(-127, 127)
        new_scale, new_zero = top * drop, zero_byte * unit
        new_error = _error(x, weights, new_scale, new_zero, levels)
        better = new_error < error
        best_byte, best_zero_byte = best_byte.where(~better, byte), best_zero_byte.where(~better, zero_byte.int())
        scale, zero, error = (
            scale.where(~better, new_scale),
            zero.where(~better, new_zero),
            error.where(~better, new_error),
        )

    offer((high - low) / most, low)
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    for part in SHRINKS:
        new_low, new_high = middle - half * part, middle + half * part
        offer((new_high - new_low) / most, new_low)
    for part in MOVES:
        span = levels * scale
        new_low = zero + span * part
        offer(((zero + span) - new_low) / most, new_low)
        span = levels * scale
        offer((span * (1.0 - part)) / most, zero)
    for _ in range(REFITS):
        code = nearest_code(x, scale, zero, levels)
        mean_code = _sum(weights * code) / total
        off = code - mean_code
        weighted = weights * off
        variance, covariance = _sum(weighted * off), _sum(weighted * (x - mean))
        good = (variance > 1e-9) & (covariance > 0)
        new_scale = torch.where(good, covariance / torch.where(good, variance, 1.0), scale)
        offer(new_scale, mean - new_scale * mean_code)
    code = torch.where(finite, nearest_code(x, scale, zero, levels), 0.0)
    return torch.where(finite, best_byte, POISON), torch.where(finite, best_zero_byte, 0), code


def search_values(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale bytes (int32) and codes (float32) of groups of value elements: code c stands for scale * (c - levels / 2).

    Args:
        x: ``[n, ...]`` float32, n a multiple of 4.
        levels: ``[...]`` (or broadcastable) float32, the largest code.
    """
    ones, most = torch.ones_like(x), levels.expand_as(x[0])
    high = x.abs().amax(0)
    best = torch.zeros_like(high, dtype=torch.int32)
    scale, zero, error = torch.ones_like(high), torch.zeros_like(high), torch.full_like(high, torch.inf)

    def offer(new_scale: Tensor) -> None:
        nonlocal best, scale, zero, error
        byte = scale_byte(new_scale, SCALE_MIDDLES)
        new_scale = byte_scale(byte)
        new_zero = new_scale * (-0.5 * most)
        new_error = _error(x, ones, new_scale, new_zero, most)
        better = new_error < error
        best = best.where(~better, byte)
        scale, zero, error = (
            scale.where(~better, new_scale),
            zero.where(~better, new_zero),
            error.where(~better, new_error),
        )

    for part in (1.0, 1.07, *SHRINKS):
        offer((high * part) / (most * 0.5))
    for _ in range(REFITS):
        off = nearest_code(x, scale, zero, most) - 0.5 * most
        along = _sum(off * x)
        offer(torch.where(along > 0, along / _sum(off * off), 0.0))
    return best, nearest_code(x, scale, zero, most)
