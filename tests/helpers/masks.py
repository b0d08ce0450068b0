"""Attention masks of padded batches."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_mask(lengths: list[int], side: str) -> Tensor:
    columns = torch.arange(max(lengths))
    need = torch.tensor(lengths)[:, None]
    return (columns < need if side == "right" else columns >= max(lengths) - need).long()


def causal_mask(padding: Tensor, new: int) -> Tensor:
    """As transformers makes it: bool ``[B, 1, new, columns]``."""
    columns = padding.shape[1]
    seen = torch.ones(columns, columns, dtype=torch.bool).tril()[columns - new :]
    return seen[None, None] & padding.bool()[:, None, None]
