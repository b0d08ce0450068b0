"""ThinK (arXiv 2407.21018): which key channels are kept, for packed tokens, where queries hardly use the others.

Once for each sequence, layer and KV head, when its first page is made: a channel scores the mean over the newest 32
queries of q_c^2, of all query heads that share the KV head, times the mean over its tokens so far of k_c^2. Exact
tokens keep all channels. Of a dropped channel a page still has the zero, so that its keys are there what they are at
the middle of the page's range, and not 0 as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import PageFormat
from .queries import RecentQueries

QUERIES = 32
# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_AT_ONCE = 2048


def scores(keys: Tensor, queries: RecentQueries | None) -> Tensor:
    """What channels are worth.

    Args:
        keys: ``[B, H, T, D]`` of all tokens so far.
        queries: the newest; None if they are not known: the keys say it alone then.

    Returns:
        float32 ``[B, H, D]``, but for a factor for each sequence.
    """
    squares = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    for part in keys.split(_AT_ONCE, 2):
        squares += part.float().square().sum(2)
    if queries is None:
        return squares
    asked = queries.query.float().square()
    if queries.real is not None:
        asked *= queries.real[:, None, :, None]
    out: Tensor = squares * asked.sum(2).unflatten(1, (keys.shape[1], -1)).sum(2)
    return out


def column_map(scores: Tensor, fmt: PageFormat) -> Tensor:
    """One column for each of the best channels; ``scores`` ``[..., D]``, NaNs are worth nothing.

    Returns:
        int16 ``[..., C]``, as :func:`logquant.quantizer.columns.allocate`.
    """
    kept = scores.nan_to_num(0.0).topk(fmt.key_columns, -1).indices.sort(-1).values
    return (4 * kept).to(torch.int16)
