"""Which key channels get how many columns.

At 2 bits nearly all the loss comes from keys, and from few of their channels (docs/design.md). So columns of codes go
where they lower the expected squared error of attention most: what a channel without any would cost
(:meth:`logquant.quantizer.feedback.Attention.key_scores`) times what a further column takes off its distortion. That is
reverse water-filling, once for each layer, head and sequence, or once for all sequences
(:mod:`logquant.quantizer.calibration`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import MAX_CODE_BITS, PageFormat

# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_AT_ONCE = 2048

# Mean squared error of a channel with 0, 1, 2, ... columns of 2 bits, in parts of its variance within a page.
DISTORTIONS = {2: (1.0, 0.13, 0.012, 0.0008), 4: (1.0, 0.012, 0.00005), 8: (1.0, 0.00005)}


def allocate(score: Tensor, fmt: PageFormat) -> Tensor:
    """The column map for channels of these scores: the ``key_columns`` columns that gain most.

    Args:
        score: ``[..., D]``, what a channel without columns would cost; zeros and NaNs count as next to nothing.
        fmt: the page format.

    Returns:
        int16 ``[..., C]``, entries ``4 * channel + digit`` in ascending order (csrc/format.h).
    """
    score = score.float().nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
    score = (score / score.amax(-1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-20)
    distortions = score.new_tensor(DISTORTIONS[fmt.key_bits])
    most = MAX_CODE_BITS // fmt.key_bits
    if fmt.key_columns > fmt.head_dim * (len(distortions) - 1):
        distortions = torch.cat([distortions, distortions[-1:] / 16])
    gains = (distortions[:-1] - distortions[1:])[:most]
    chosen = (score[..., None] * gains).flatten(-2).topk(fmt.key_columns, -1).indices.sort(-1).values
    return (4 * chosen.div(len(gains), rounding_mode="floor") + chosen % len(gains)).to(torch.int16)


def default_map(fmt: PageFormat, batch: int, heads: int, device: torch.device) -> Tensor:
    """A valid map ``[batch, heads, C]`` that spreads columns evenly: for layers that have not chosen theirs yet."""
    column = torch.arange(fmt.key_columns, device=device)
    entries = 4 * (column % fmt.head_dim) + column.div(fmt.head_dim, rounding_mode="floor")
    return entries.sort().values.to(torch.int16).expand(batch, heads, -1)


def variances(keys: Tensor, span: int) -> Tensor:
    """``var(k_c)`` within spans of consecutive tokens: what channels cost where nothing is known of queries.

    Args:
        keys: ``[B, H, T, D]`` in order; of fewer than ``span`` tokens the variance is that of all.
        span: tokens of a span, about the stretch of text that a page covers.

    Returns:
        float32 ``[B, H, D]``.
    """
    span = min(span, keys.shape[2])
    spans = keys[:, :, : keys.shape[2] // span * span].unflatten(2, (-1, span))
    # Some at a time, into one small tensor: results kept between them would split the memory that they give back.
    variance = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    for part in spans.split(max(1, _AT_ONCE // span), 2):
        variance += part.float().var(3, correction=0).sum(2)
    variance /= spans.shape[2]
    return variance
