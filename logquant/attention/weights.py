"""Attention weights of a call, for rules that go by attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .call import AttentionCall
from .masks import hides

# Scores of this many query and key pairs are held at once.
_SCORES_AT_ONCE = 1 << 22


def attention_weights(call: AttentionCall, keys: Tensor, new: int) -> Iterator[Tensor]:
    """Attention weights, some queries at a time.

    Args:
        call: what attended; its sinks are left out. SDPA may have got the query heads of a KV head as
            its query tokens.
        keys: ``[B, H, T, D]``, the newest tokens last.
        new: how many tokens are new; without a mask, each sees those up to itself.

    Yields:
        float32 ``[B, H, n, T]``, n of the queries of each KV head.
    """
    query, mask, scale, softcap, *_ = call
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
