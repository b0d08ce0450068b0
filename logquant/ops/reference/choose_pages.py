"""The choice of pages from their scores, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def vote(scores: Tensor, heads: int, used: Tensor | None = None) -> Tensor:
    """What share of its attention a KV head's query heads give each page on average, as a logarithm.

    Args:
        scores: ``[B, Hq, L, P]``.
        heads: KV heads; Hq is a multiple.
        used: int ``[B]``, pages that each row has; all without it.

    Returns:
        ``[B, heads, L, P]``, up to a constant; -inf for pages that a row does not have.
    """
    if used is not None:
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= used[:, None, None, None]
        scores = scores.masked_fill(beyond, -torch.inf)
    shares: Tensor = scores.log_softmax(-1).unflatten(1, (heads, -1))
    return shares.squeeze(2) if shares.shape[2] == 1 else shares.logsumexp(2)


def choose_pages(
    scores: Tensor,
    counts: Tensor,
    heads: int,
    most: int,
    others: Tensor | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """The pages with the highest :func:`vote`: one choice for each KV head and query.

    Args:
        scores: float32 ``[B, Hq, L, P]``, as from :func:`logquant.ops.reference.page_scores`.
        counts: int32 ``[1 or B, 1 or L]``, how many pages.
        heads: KV heads; Hq is a multiple.
        most: entries of the result, at least as many as the largest count.
        others: scores of another kind: they choose the second half, among the pages that ``scores`` have left; of an
            odd number ``scores`` choose one more.
        used: int32 ``[B]``, pages that each row has; all without it. A row never gets more.

    Returns:
        int32 ``[B, heads, L, most]``, different pages in ascending order, then P - 1.
    """
    pages, own = scores.shape[-1], counts[:, None, :, None].long()
    if used is not None:
        own = own.minimum(used[:, None, None, None])
    rank = torch.arange(most, device=scores.device)
    if others is None:
        table = vote(scores, heads, used).topk(most, -1).indices
    else:
        first = vote(scores, heads, used).topk((most + 1) // 2, -1).indices
        votes = vote(others, heads, used)
        # What is chosen already comes first.
        is_chosen = rank[: first.shape[-1]] < (own + 1) // 2
        votes = votes.scatter(-1, first, torch.where(is_chosen, torch.inf, votes.gather(-1, first)))
        table = votes.topk(most, -1).indices
    return table.masked_fill(rank >= own, pages).sort(-1).values.clamp(max=pages - 1).int()
