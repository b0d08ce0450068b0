"""What a chooser is, and what choosers share: the vote of the query heads of a KV head."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..format import PageFormat
from .index import PageIndex


class Asked(NamedTuple):
    """Queries, and the pages that they choose from.

    Attributes:
        query: ``[B, Hq, L, D]``.
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        scale: factor of the scores.
        key_map: the bit allocation of keys, or None.
        page_index: of the pages, for choosers that go by it.
        used: int ``[B]``, how many of the pages each row has; None if all rows have all of them.
    """

    query: Tensor
    pages: Tensor
    fmt: PageFormat
    scale: float
    key_map: Tensor | None
    page_index: PageIndex | None
    used: Tensor | None


class Chooser(Protocol):
    """Chooses pages."""

    def __call__(self, asked: Asked, counts: Tensor, most: int) -> Tensor:
        """The pages that each KV head reads for each query, best first.

        Args:
            asked: the queries and the pages.
            counts: int64 ``[1 or B, 1, 1 or L, 1]``, how many.
            most: the largest of these.

        Returns:
            int64 ``[B, H, L, most]``, different ones; of a row with fewer, those after its own mean nothing.
        """
        ...


def votes_by_bounds(asked: Asked) -> Tensor:
    """:func:`vote`, by the bounds of the pages' keys: no memory."""
    return vote(ops.page_scores(asked.query, asked.pages, asked.fmt, scale=asked.scale, key_map=asked.key_map), asked)


def votes_by_means(asked: Asked) -> Tensor:
    """:func:`vote`, by the mean keys of the pages."""
    assert asked.page_index is not None
    means, scales = (x[:, :, : asked.pages.shape[2]] for x in asked.page_index)
    scores = ops.page_scores(
        asked.query,
        asked.pages,
        asked.fmt,
        scale=asked.scale,
        key_map=asked.key_map,
        means=means,
        mean_scales=scales,
    )
    return vote(scores, asked)


def vote(scores: Tensor, asked: Asked) -> Tensor:
    """What share of its attention a KV head's query heads would give each page on average, as a logarithm.

    Args:
        scores: ``[B, Hq, L, P]``.
        asked: whose they are.

    Returns:
        ``[B, H, L, P]``, up to a constant; -inf for pages that a row does not have.
    """
    if asked.used is not None:
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= asked.used[:, None, None, None]
        scores = scores.masked_fill(beyond, -torch.inf)
    shares: Tensor = scores.log_softmax(-1).unflatten(1, (asked.pages.shape[1], -1))
    return shares.squeeze(2) if shares.shape[2] == 1 else shares.logsumexp(2)
