"""SnapKV (arXiv 2404.14469): what the newest queries of a prompt attend to stays.

Their softmax weights over all tokens, the mean over those queries, pooled along the tokens, the mean over the query
heads of a KV head (as kvpress has it; the authors repeat keys instead, and keep a set for each query head). QPruningKV
(arXiv 2412.12706), which quantises what stays, has ``window=8;kernel=7;pool=max``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompt import Prompt


@dataclass(frozen=True)
class SnapKV:
    """A :class:`logquant.pruning.prompt.Pruner`.

    Args:
        window: the newest so many queries are asked, and their tokens stay.
        kernel: tokens that are pooled, an odd number.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    window: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window of snapkv must be a positive number of queries, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel of snapkv must be an odd number of tokens, got {self.kernel}")
        if self.pool not in ("avg", "max"):
            raise ValueError(f"pool of snapkv must be avg or max, got {self.pool!r}")

    @property
    def queries(self) -> int:
        return self.window

    def scores(self, prompt: Prompt) -> Tensor:
        keys, query = prompt.keys, prompt.query.unflatten(1, (prompt.keys.shape[1], -1))
        out = torch.full(keys.shape[:3], torch.inf, device=keys.device)
        before = max(0, keys.shape[2] - self.window)
        if before:
            # One KV head at a time: the weights of all would be the largest tensor there is.
            for head in range(keys.shape[1]):
                out[:, head, :before] = self._of_head(query[:, head], keys[:, head], before, prompt)
        return out

    def _of_head(self, query: Tensor, keys: Tensor, before: int, prompt: Prompt) -> Tensor:
        """Of the first ``before`` tokens ``[B, before]``; query ``[B, g, L, D]``, keys ``[B, T, D]``."""
        scores = (query.float() @ keys.float().mT[:, None]).mul_(prompt.scale)
        if prompt.softcap:
            scores = prompt.softcap * torch.tanh(scores / prompt.softcap)
        asked, tokens = scores.shape[-2:]
        later = torch.ones(asked, tokens, dtype=torch.bool, device=keys.device).triu(tokens - asked + 1)
        weights = scores.masked_fill_(later, -torch.inf).softmax(-1)[..., :before].mean(2)
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        pooled: Tensor = pool(weights, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.mean(1)
