"""Pages whose mean key the query likes best: they hold most of what is usual."""

from __future__ import annotations

from torch import Tensor

from .chooser import Asked, votes_by_means


def means(asked: Asked, counts: Tensor, most: int) -> Tensor:
    """A :class:`logquant.recall.chooser.Chooser`."""
    return votes_by_means(asked).topk(most, -1).indices
