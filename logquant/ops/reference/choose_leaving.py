"""The choice of the tokens that leave the window, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_leaving(weight: Tensor, first: int, last: int, count: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The slots of least weight, in pages; of equal weights the first leave. A NaN counts as above all.

    They are cut into pages in the order of the slots. Within a page they lie by weight, for the most attended is to be
    quantised first, and errs least: ``ranks`` says where.

    Args:
        weight: float32 ``[R, N]``, of the token in each slot.
        first, last: only slots from ``first`` to below ``last`` may leave.
        count: how many do, a multiple of ``len(ranks)``.
        ranks: for each place of a page, which token of it goes there: 0 is the one of most weight, then 1.

    Returns:
        int32 ``[R, count]``, the slots that leave, and int32 ``[R, N - count]``, the others in their order.
    """
    slots = torch.arange(weight.shape[1], device=weight.device).expand(len(weight), -1)
    order = weight[:, first:last].argsort(dim=1, stable=True) + first
    leaving, middle = order[:, :count].sort(1).values, order[:, count:].sort(1).values
    staying = torch.cat([slots[:, :first], middle, slots[:, last:]], 1)
    return by_rank(leaving, weight.gather(1, leaving), ranks).int(), staying.int()


def by_rank(tokens: Tensor, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """Tokens of pages ``[..., n]``, within each page by falling weight, of equal ones in the order they have.

    Args:
        tokens: whatever stands for them.
        weight: theirs, of the same shape.
        ranks: as for :func:`choose_leaving`.
    """
    pages, weight = (x.unflatten(-1, (-1, len(ranks))) for x in (tokens, weight))
    ranked: Tensor = pages.gather(-1, weight.argsort(dim=-1, descending=True, stable=True))
    return ranked[..., list(ranks)].flatten(-2)
