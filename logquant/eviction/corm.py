"""CORM (arXiv 2404.15949): tokens that none of the newest queries found important are dropped.

A query *names* a token to which it gives at least the uniform share, ``1 / t`` where it is the t-th token. A token that
none of the newest ``window`` queries has named is dropped; of the query heads of a KV head one is enough to keep it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = -1


def last_named(
    query: Tensor, keys: Tensor, first: int, scale: float, softcap: float, lse: Tensor | None = None
) -> Tensor:
    """Of each token the last query that names it, by the number of the query's token.

    Args:
        query: ``[B, Hq, L, D]``, the queries of the newest L tokens; each sees the tokens up to its own.
        keys: ``[B, H, N, D]``, in order.
        first: the number of the first query's token, from 0.
        scale, softcap: of the scores.
        lse: ``[B, Hq, L]``, the logarithm of the sum of a query's exponentiated scores, where it has also seen other
            tokens; None if these are all.

    Returns:
        int32 ``[B, H, N]``; :data:`NEVER` if no query does.
    """
    heads, queries, tokens = keys.shape[1], query.shape[2], keys.shape[2]
    number = torch.arange(first, first + queries, dtype=torch.int32, device=keys.device)
    later = torch.ones(queries, tokens, dtype=torch.bool, device=keys.device).triu(tokens - queries + 1)
    grouped = query.unflatten(1, (heads, -1))
    out = []
    # One KV head at a time: the weights of all would be the largest tensor there is.
    for head in range(keys.shape[1]):
        scores = (grouped[:, head].float() @ keys[:, head, None].float().mT).mul_(scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill_(later, -torch.inf)
        total = scores.logsumexp(-1) if lse is None else lse.unflatten(1, (heads, -1))[:, head].float()
        named = (scores.sub_(total.unsqueeze(-1)).exp_() * (number + 1)[:, None] >= 1).any(1)
        out.append(torch.where(named, number[:, None], NEVER).amax(1))
    return torch.stack(out, 1)


def choose(named: Tensor, tokens: int, window: int, page_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the tokens that leave are packed, for each KV head in whole pages.

    Those that one of the newest ``window`` queries has named, and to fill the last page those that were named last, the
    newest first.

    Args:
        named: int32 ``[B, H, N]``, :func:`last_named` of the tokens that leave, in order.
        tokens: tokens that have come.
        window: queries that are asked.
        page_tokens: tokens of a page, which divide N.

    Returns:
        Indices int64 ``[B, H, P * page_tokens]`` of the tokens, in order, P being the most pages of a head: of one with
        fewer the first are meant; pages of each head, int64 ``[B, H]``; and how many tokens the rule keeps, the same.
    """
    count = named.shape[2]
    kept = (named >= tokens - window).sum(-1)
    pages = (kept + page_tokens - 1) // page_tokens
    order = torch.arange(count, device=named.device)
    best = (named.long() * count + order).argsort(-1, descending=True)
    rank = torch.empty_like(best).scatter_(-1, best, order.expand_as(best))
    chosen = torch.where(rank < (pages * page_tokens)[..., None], order, order + count).argsort(-1)
    return chosen[..., : int(pages.max()) * page_tokens], pages, kept
