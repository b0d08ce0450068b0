"""How many channels each layer keeps: one share for all, or LoRC's progressive ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A page's dimensions are multiples of it (logquant/format.py).
STEP = 16
# The same for all layers, or of the first and of the last.
Share = float | tuple[float, float]


def check_share(name: str, share: Share) -> None:
    """Refuse (ValueError, naming it) what is no share, or no pair of shares of which the first is the larger."""
    both = share if isinstance(share, tuple) else (share, share)
    numbers = len(both) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in both)
    if not (numbers and 0 < both[1] <= both[0] <= 1):
        raise ValueError(
            f"{name} must be a share of the channels above 0, up to 1, or a pair of them, that of the first layer and "
            f"a smaller one of the last; got {share!r}"
        )


def condition(weight: Tensor) -> float:
    """The condition number of a matrix."""
    found = torch.linalg.svdvals(weight.double())
    ratio: float = (found[0] / found[-1].clamp_min(1e-12)).item()
    return ratio


def cumulated(weights: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Of each layer the sum of the logarithms of the condition numbers of its and all deeper layers' projections.

    Args:
        weights: of each layer the projections of keys and of values, ``[H * D, hidden]``.
    """
    logs = torch.tensor([condition(k) * condition(v) for k, v in weights], dtype=torch.float64).log()
    return logs.flip(0).cumsum(0).flip(0).tolist()


def layer_ranks(share: Share, dim: int, step: int, conditions: Sequence[float]) -> list[int]:
    """Channels that each layer keeps, multiples of ``step``, at least one step.

    A pair of shares is LoRC's: layer ``l`` keeps ``d_max * (1 - (max k - k_l) / (max k - min k) * (1 - d_min /
    d_max))``, k being ``conditions``, so that the first layer keeps ``d_max`` and the last ``d_min``.

    Args:
        share: what to keep of ``dim``.
        dim: all channels, a multiple of ``step``.
        step: what a cache can hold.
        conditions: of each layer, see :func:`cumulated`.
    """
    first, last = share if isinstance(share, tuple) else (share, share)
    high, low = max(conditions), min(conditions)
    wanted = [dim * (first - (high - k) / ((high - low) or 1.0) * (first - last)) for k in conditions]
    return [min(dim, max(step, round(x / step) * step)) for x in wanted]
