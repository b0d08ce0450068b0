"""Half of the pages by their means, the others by their bounds: what is usual, and the needle."""

from __future__ import annotations

from torch import Tensor

from .chooser import Asked, choose, scores_by_bounds, scores_by_means


def both(asked: Asked, counts: Tensor, most: int) -> Tensor:
    """A :class:`logquant.recall.chooser.Chooser`."""
    return choose(asked, counts, most, scores_by_means(asked), scores_by_bounds(asked))
