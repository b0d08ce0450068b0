"""KeyDiff (arXiv 2504.15364): keys that are unlike the others stay; no query is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompt import Prompt

# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_AT_ONCE = 2048


@dataclass(frozen=True)
class KeyDiff:
    """A :class:`logquant.pruning.prompt.Pruner`: minus the cosine between a key and the mean of the normalised keys."""

    @property
    def queries(self) -> int:
        return 0

    def scores(self, prompt: Prompt) -> Tensor:
        keys = prompt.keys
        out = keys.new_empty(keys.shape[:3], dtype=torch.float32)
        mean = keys.new_zeros(*keys.shape[:2], 1, keys.shape[3], dtype=torch.float32)
        for part in keys.split(_AT_ONCE, 2):
            mean += F.normalize(part.float(), dim=-1).sum(2, keepdim=True)
        mean /= keys.shape[2]
        for into, part in zip(out.split(_AT_ONCE, 2), keys.split(_AT_ONCE, 2), strict=True):
            into.copy_(-F.cosine_similarity(part.float(), mean, dim=-1))
        return out
