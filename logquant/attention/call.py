"""What one call of attention asks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionCall(NamedTuple):
    """Queries, and how they attend.

    Attributes:
        query: ``[B, Hq, L, D]``: those of the last L positions.
        mask: ``[1 or B, 1 or Hq, 1 or L, T]`` by position, boolean (True: seen) or an additive float; None without.
        scale: factor of the scores.
        softcap: 0, or the cap of the scores.
        sinks: ``[Hq]``, a logit a head that only adds to the softmax's denominator; None without.
        causal: whether a query sees only positions up to its own; goes without a mask.
        lse: ``[B, Hq, L]``, what attention has found: the log-sum-exp of each query's scores; None if nobody has asked.
    """

    query: Tensor
    mask: Tensor | None
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    causal: bool = False
    lse: Tensor | None = None
