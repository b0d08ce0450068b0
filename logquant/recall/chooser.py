"""What a chooser is, and what choosers share: scores of pages."""

from __future__ import annotations

from typing import NamedTuple, Protocol

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
        used: int32 ``[B]``, how many of the pages each row has; None if all rows have all of them.
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
        """The pages that each KV head reads for each query.

        Args:
            asked: the queries and the pages.
            counts: int32 ``[1 or B, 1 or L]``, how many.
            most: the largest of these.

        Returns:
            int32 ``[B, H, L, most]``, different ones in ascending order; those after a query's own count mean nothing.
        """
        ...


def scores_by_bounds(asked: Asked) -> Tensor:
    """Bounds of what the pages' keys score, ``[B, Hq, L, P]``: from the pages themselves, so they take no memory."""
    return ops.page_scores(asked.query, asked.pages, asked.fmt, scale=asked.scale, key_map=asked.key_map)


def scores_by_means(asked: Asked) -> Tensor:
    """What the pages' mean keys score, ``[B, Hq, L, P]``."""
    assert asked.page_index is not None
    means, scales = (x[:, :, : asked.pages.shape[2]] for x in asked.page_index)
    return ops.page_scores(
        asked.query,
        asked.pages,
        asked.fmt,
        scale=asked.scale,
        key_map=asked.key_map,
        means=means,
        mean_scales=scales,
    )


def choose(asked: Asked, counts: Tensor, most: int, scores: Tensor, others: Tensor | None = None) -> Tensor:
    """What a :class:`Chooser` that goes by ``scores``, for half of the pages by ``others``, returns."""
    return ops.choose_pages(scores, counts, asked.pages.shape[1], most, others=others, used=asked.used)
