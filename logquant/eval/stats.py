"""Means and their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean of ``values``, one of each text; None for fewer than two."""
    if len(values) < 2:
        return None
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (resamples, len(data)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    low, high = data[picks].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
