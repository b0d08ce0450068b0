"""Attention weights of a call, for rules that go by attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .call import AttentionCall
from .masks import hides

# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_TOKENS_AT_ONCE = 2048
# So many of the newest queries of a prompt or chunk say what they attend to: as many as come between two evictions, by
# default.
HEARD = 64
# Scores of this many query and key pairs are held at once.
_SCORES_AT_ONCE = 1 << 22


def given(query: Tensor, keys: Tensor, scale: float, softcap: float, visible: Tensor | None = None) -> Tensor:
    """What queries give to each token: the sum of their squared attention weights, over the query heads of a KV head.

    That is what an independent error of each token costs in attention's outputs. The weights are those of a softmax
    over these tokens alone.

    Args:
        query: ``[B, Hq, L, D]``.
        keys: ``[B, H, T, D]``.
        scale: factor of the scores.
        softcap: 0, or their cap.
        visible: bool ``[B, L, T]``; without it the queries are those of the last L tokens, and see those up to their
            own.

    Returns:
        float32 ``[B, H, T]``.
    """
    heads, tokens, queries = keys.shape[1], keys.shape[2], query.shape[2]
    if not tokens or not queries:
        return keys.new_zeros(len(keys), heads, tokens, dtype=torch.float32)
    asks = torch.arange(tokens - queries, tokens, device=keys.device)[None, :, None]
    query = query.float().unflatten(1, (heads, -1)).flatten(2, 3)

    def scores(part: slice) -> Tensor:
        out = (query @ keys[:, :, part].float().mT).mul_(scale)
        if softcap:
            out = softcap * torch.tanh(out / softcap)
        if visible is None:
            hidden = torch.arange(part.start, min(part.stop, tokens), device=keys.device) > asks
        else:
            hidden = ~visible[:, :, part]
        masked: Tensor = out.unflatten(2, (-1, queries)).masked_fill_(hidden[:, None, None], -math.inf)
        return masked

    parts = [slice(first, first + _TOKENS_AT_ONCE) for first in range(0, tokens, _TOKENS_AT_ONCE)]
    known = scores(parts[0]) if len(parts) == 1 else None
    lse = torch.full(query.shape[:3], -math.inf, device=keys.device).unflatten(2, (-1, queries))
    for part in parts:
        lse = torch.logaddexp(lse, (scores(part) if known is None else known).logsumexp(-1))
    lse = lse.unsqueeze(-1)
    # A query that sees nothing gives nothing.
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    out = keys.new_empty(len(keys), heads, tokens, dtype=torch.float32)
    for part in parts:
        weights = (scores(part) if known is None else known).sub_(lse).exp_()
        torch.sum(weights.square_(), (2, 3), out=out[:, :, part])
    return out


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
