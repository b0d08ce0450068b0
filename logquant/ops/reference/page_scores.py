"""How much attention a query would pay to each page, guessed without reading the page's tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import PageFormat
from .quantize import columns_of, unpack_params


def page_scores(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    scale: float,
    key_map: Tensor | None = None,
    means: Tensor | None = None,
    mean_scales: Tensor | None = None,
) -> Tensor:
    """A score of each page for each query: of its mean key, or a bound that the score of no key in it passes.

    The bound is that of Quest (arXiv 2406.10774), from the page's own scales and zeros: no dequantised key lies outside
    of ``zero`` to ``zero + scale * largest code`` of its channel, and a query takes of each channel the end that is
    better for it.

    Args:
        q: queries ``[B, Hq, L, D]``; Hq is a multiple of H.
        pages: int32 ``[B, H, P, words]``; with ``means`` only their number counts.
        fmt: the page format.
        scale: factor of the scores, usually ``D ** -0.5``.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        means: int8 ``[B, H, P, D]``: score the mean key of each page, ``means * mean_scales``, and not its bound.
        mean_scales: float32 ``[B, H, P]``.

    Computed in float32 (float64 if ``q`` is).

    Returns:
        float32 ``[B, Hq, L, P]``. What is not a number counts as the largest there is: a page that holds a NaN is one
        to read, and attention over it gives a NaN.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if means is None:
        columns = columns_of(key_map, fmt, pages.device)[2].unsqueeze(2)
        step, low = (x.to(wide) for x in unpack_params(pages.split(fmt.sections, -1)[1], fmt, columns))
        high = low + step * (2 ** (fmt.key_bits * columns) - 1)
    else:
        assert mean_scales is not None
        low = high = means.to(wide) * mean_scales.to(wide).unsqueeze(-1)
    grouped = scale * q.to(wide).unflatten(1, (low.shape[1], -1))
    best = torch.einsum("bhgld,bhpd->bhglp", grouped.clamp_min(0), high)
    best = best + torch.einsum("bhgld,bhpd->bhglp", grouped.clamp_max(0), low)
    largest = torch.finfo(torch.float32).max
    return best.flatten(1, 2).nan_to_num(largest, largest, -largest).float()
