"""Pages whose mean key the query likes best: they hold most of what is usual."""

from __future__ import annotations

from torch import Tensor

from .chooser import Asked, choose, scores_by_means


def means(asked: Asked, counts: Tensor, most: int) -> Tensor:
    """A :class:`logquant.recall.chooser.Chooser`."""
    return choose(asked, counts, most, scores_by_means(asked))
