"""Pages in which some key may be what the query looks for, a needle among others: Quest (arXiv 2406.10774).

Bounds of keys are the page's own scales and zeros, so this takes no memory.
"""

from __future__ import annotations

from torch import Tensor

from .chooser import Asked, choose, scores_by_bounds


def bounds(asked: Asked, counts: Tensor, most: int) -> Tensor:
    """A :class:`logquant.recall.chooser.Chooser`."""
    return choose(asked, counts, most, scores_by_bounds(asked))
