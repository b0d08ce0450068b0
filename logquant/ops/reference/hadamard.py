"""The Walsh-Hadamard transform that values are stored under (csrc/format.h), in one fixed order of operations."""

from __future__ import annotations

from torch import Tensor


def hadamard(x: Tensor, block: int) -> Tensor:
    """``x`` ``[..., n]`` with every ``block`` elements (a power of two that divides n) replaced by their transform.

    Orthonormal, and its own inverse. Neighbours at distance 1, 2, 4, ... become sum and difference, the results are
    multiplied by ``block ** -0.5``: the compiled kernels do the same in float32, so results compare equal.
    """
    shape = x.shape
    step = 1
    while step < block:
        low, high = x.reshape(*shape[:-1], shape[-1] // (2 * step), 2, step).unbind(-2)
        x = (low + high).new_empty(*low.shape[:-1], 2, step)
        x[..., 0, :], x[..., 1, :] = low + high, low - high
        step *= 2
    out: Tensor = x.reshape(shape) * block**-0.5
    return out
