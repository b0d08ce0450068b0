"""What masks say: which positions they hide, and with that which positions hold a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.reference.attend import HIDDEN


def _hidden_up_to(mask: Tensor) -> float:
    """An additive mask hides where it is this or less; in 16 bits models write less than HIDDEN, too."""
    return max(HIDDEN, torch.finfo(mask.dtype).min / 2)


def hides(mask: Tensor) -> Tensor:
    """Where a mask hides, bool: boolean masks (True: seen) and additive ones."""
    return ~mask if mask.dtype == torch.bool else mask <= _hidden_up_to(mask)


def seen_by_some(mask: Tensor, first: int, last: int, batch: int) -> Tensor:
    """Which of the positions from ``first`` to before ``last`` some query sees.

    Args:
        mask: ``[1 or batch, heads, queries, positions]``, boolean (True: seen), additive, or an integer (not 0: seen).
        first, last: positions.
        batch: rows.

    Returns:
        bool ``[batch, last - first]`` on the CPU.

    Raises:
        ValueError: a mask of too few positions.
    """
    if mask.dim() != 4 or mask.shape[-1] < last:
        raise ValueError(
            f"attention_mask must be [batch, heads, queries, positions] with {last} positions or more, "
            f"got {list(mask.shape)}"
        )
    hidden = _hidden_up_to(mask) if mask.dtype.is_floating_point else 0
    return (mask[..., first:last] > hidden).flatten(1, 2).any(1).cpu().expand(batch, -1)
