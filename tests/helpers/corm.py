"""CORM (2404.15949) as its paper states it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from logquant import ops
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.cache.ragged import Ragged


def named(weights: Tensor, heads: int) -> Tensor:
    """Of each token the last query that gave it the uniform share or more, int64 ``[B, H, T]``, -1 if none did.

    weights: ``[B, Hq, L, T]`` of the newest L of T tokens' queries, 0 where they do not see.
    """
    tokens, asked = weights.shape[-1], weights.shape[-2]
    number = torch.arange(tokens - asked, tokens)
    by_heads = (weights >= 1 / (number + 1)[:, None]).unflatten(1, (heads, -1)).any(2)
    return torch.where(by_heads, number[:, None], -1).amax(2)


def softmax(queries: Tensor, keys: Tensor, asked: int, scale: float) -> Tensor:
    """Weights of the newest ``asked`` queries, ``[B, Hq, asked, T]``."""
    heads, tokens = keys.shape[1], keys.shape[2]
    query = queries[:, :, -asked:].unflatten(1, (heads, -1))
    scores = torch.einsum("bhgld,bhtd->bhglt", query, keys) * scale
    later = torch.arange(tokens) > torch.arange(tokens - asked, tokens)[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1).flatten(1, 2)


def held_tokens(view: KVView, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a KV head has: those of its own pages, then exact and new ones; all rows alike."""
    ragged = view.ragged
    assert isinstance(ragged, Ragged)
    flat = row * ragged.counts.shape[1] + head
    first, count = int(ragged.counts.flatten()[:flat].sum()), int(ragged.counts[row, head])
    own_map = None if view.key_map is None else view.key_map[row : row + 1, head : head + 1]
    packed = ops.dequantize(ragged.pool[None, None, first : first + count], view.fmt, key_map=own_map)
    return tuple(torch.cat([p[0, 0], x[row, head]]) for p, x in zip(packed, (view.keys, view.values), strict=True))


def attention(view: KVView, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What queries make of what is held, ``[B, Hq, L, Dv]``, and their weights on exact and new tokens."""
    batch, query_heads, asked, _ = call.query.shape
    heads, slots = view.keys.shape[1:3]
    outs, weights = [], []
    for row in range(batch):
        for query_head in range(query_heads):
            keys, values = held_tokens(view, row, query_head // (query_heads // heads))
            scores = call.query[row, query_head] @ keys.T * call.scale
            later = torch.arange(len(keys)) > torch.arange(len(keys) - asked, len(keys))[:, None]
            share = scores.masked_fill(later, -torch.inf).softmax(-1)
            outs.append(share @ values)
            weights.append(share[:, -slots:])
    shape = batch, query_heads
    return torch.stack(outs).unflatten(0, shape), torch.stack(weights).unflatten(0, shape)
