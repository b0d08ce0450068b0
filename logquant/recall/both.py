"""Half of the pages by their means, the others by their bounds: what is usual, and the needle."""

from __future__ import annotations

import torch
from torch import Tensor

from .chooser import Asked, votes_by_bounds, votes_by_means


def both(asked: Asked, counts: Tensor, most: int) -> Tensor:
    """A :class:`logquant.recall.chooser.Chooser`."""
    usual = votes_by_means(asked).topk((most + 1) // 2, -1).indices
    is_usual = torch.arange(usual.shape[-1], device=usual.device) < (counts + 1) // 2
    votes = votes_by_bounds(asked)
    # Those that are chosen already come first.
    first = torch.where(is_usual, torch.inf, votes.gather(-1, usual))
    return votes.scatter(-1, usual, first).topk(most, -1).indices
