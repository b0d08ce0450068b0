"""Attention masks of padded batches."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_mask(lengths: list[int], side: str) -> Tensor:
    positions = torch.arange(max(lengths))
    need = torch.tensor(lengths)[:, None]
    return (positions < need if side == "right" else positions >= max(lengths) - need).long()


def causal_mask(padding: Tensor, new: int) -> Tensor:
    """As transformers makes it: bool ``[B, 1, new, positions]``."""
    positions = padding.shape[1]
    seen = torch.ones(positions, positions, dtype=torch.bool).tril()[positions - new :]
    return seen[None, None] & padding.bool()[:, None, None]
