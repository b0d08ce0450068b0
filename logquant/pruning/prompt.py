"""What a pruner is asked, and the choice that follows from what it says."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """Sequences that have just come, without padding.

    Attributes:
        query: ``[B, Hq, L, D]``, the newest L queries.
        keys: ``[B, H, T, D]``, those of all tokens, in order.
        scale: factor of scores.
        softcap: 0, or their cap.
    """

    query: Tensor
    keys: Tensor
    scale: float
    softcap: float


class Pruner(Protocol):
    """What tokens of a prompt are worth. A frozen dataclass, whose fields are its settings."""

    @property
    def queries(self) -> int:
        """How many of the newest queries it asks for."""
        ...

    def scores(self, prompt: Prompt) -> Tensor:
        """What each token is worth to each KV head, float32 ``[B, H, T]``; inf: it must stay."""
        ...


def choose(pruner: Pruner, prompt: Prompt, leaving: Tensor, count: int) -> Tensor:
    """The tokens that stay, of those that leave the window.

    Args:
        pruner: who says what they are worth.
        prompt: the sequences.
        leaving: ``[1 or B, N]``, indices of tokens.
        count: how many stay, up to N.

    Returns:
        int64 ``[B, H, count]``: places among those that leave, ascending.
    """
    scores = pruner.scores(prompt)
    index = leaving.long()[:, None].expand(*scores.shape[:2], -1)
    best = scores.gather(2, index).topk(count, -1).indices
    return torch.sort(best, -1).values
