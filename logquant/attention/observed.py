"""Layers that learn what attends to them, for rules that go by attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops.reference.attend import HIDDEN
from .handle import KVHandle
from .view import Attended, KVView

# Scores of this many query and key pairs are held at once.
_SCORES_AT_ONCE = 1 << 22


class ObservedView(KVView):
    """Plain keys and values, attended to exactly; whoever made them is told what attended.

    Args:
        keys, values: ``[B, H, T, D]``: what attention is to see, the new tokens last.
        observed: called after each attention with queries and mask, or with None where a function other than
            logquant's or SDPA has read the tensors.
    """

    def __init__(self, keys: Tensor, values: Tensor, observed: Callable[[Attended | None], None]) -> None:
        self.window_k, self.window_v, self.observed = keys, values, observed
        self.new, self.parts = 0, None
        self._dense = keys, values

    @property
    def columns(self) -> int:
        return self.window_k.shape[2]

    @property
    def is_prompt(self) -> bool:
        return True

    def check_current(self) -> None:
        """Nothing here goes stale."""

    def check(self, mask: Tensor | None) -> None:
        """Whoever is told looks at the mask."""

    def handles(self) -> tuple[KVHandle, KVHandle]:
        """What a layer's ``update`` returns."""
        return KVHandle(self, 0), KVHandle(self, 1)


def hides(mask: Tensor) -> Tensor:
    """Where a mask hides, bool: boolean masks (True: seen) and additive ones."""
    if mask.dtype == torch.bool:
        return ~mask
    return mask <= max(HIDDEN, torch.finfo(mask.dtype).min / 2)


def attention_weights(attended: Attended, keys: Tensor, new: int) -> Iterator[Tensor]:
    """Attention weights, some queries at a time.

    Args:
        attended: queries ``[B, Hq, L, D]``, mask, scale and softcap. SDPA may have got the query heads of a KV head as
            its query tokens.
        keys: ``[B, H, T, D]``, the newest tokens last.
        new: how many tokens are new; without a mask, each sees those up to itself.

    Yields:
        float32 ``[B, H, n, T]``, n of the queries of each KV head.
    """
    query, mask, scale, softcap = attended
    batch, heads, tokens, _ = keys.shape
    group, length = query.shape[1] // heads, query.shape[2]
    hidden = None
    if mask is not None:
        hidden = hides(mask[..., :tokens]).expand(batch, -1, length, -1)
    elif new > 1:
        hidden = torch.ones(length, tokens, dtype=torch.bool, device=keys.device).triu(tokens - length + 1)[None, None]
    block = max(1, _SCORES_AT_ONCE // (batch * query.shape[1] * tokens))
    for first in range(0, length, block):
        part = query[:, :, first : first + block].float().unflatten(1, (heads, group))
        scores = scale * torch.einsum("bhgld,bhtd->bhglt", part, keys.float())
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if hidden is not None:
            out = hidden[:, :, first : first + block]
            out = out.unflatten(1, (heads, group)) if out.shape[1] > 1 else out.unsqueeze(1)
            scores = scores.masked_fill(out, -math.inf)
        yield scores.softmax(-1).nan_to_num(0.0).flatten(2, 3)
