"""Pages made of clusters: the tokens of a page have keys that are alike, so that its mean says more of them.

The tokens of a prompt are halved again and again, each half alike, until a half is a page: clusters of equal size, for
which all keys are looked at a few times for each doubling of the number of pages. ClusterKV (arXiv 2412.03213), whose
clusters are of any size, reads single tokens; here pages are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are worked on at once, in float32: copies of all keys of a long prompt would raise the peak.
_AT_ONCE = 1 << 22
# How often halves are made anew along the line between their means.
_ROUNDS = 4
# The longest key, in usual lengths.
_LONGEST = 16.0


def clusters(keys: Tensor, tokens: Tensor, page_tokens: int) -> Tensor:
    """The order of tokens in which each page's have keys that are alike.

    Args:
        keys: ``[B, H, T, D]``, floating point.
        tokens: int64 ``[B, H, n]``, which of them are meant; n is a multiple of ``page_tokens``.
        page_tokens: tokens of a page.

    Returns:
        int64 ``[B, H, n]``: these tokens, page after page; within a page they follow one another as they did.
    """
    count, dim = tokens.shape[2], keys.shape[3]
    if not count:
        return tokens
    heads = max(1, _AT_ONCE // (count * dim))
    made = torch.empty_like(tokens)
    # Each row by itself, so that sums are added up as they are where it is alone.
    for rows in zip(keys, tokens, made, strict=True):
        for own, index, into in zip(*(x.split(heads) for x in rows), strict=True):
            x = own.gather(1, index.unsqueeze(-1).expand(-1, -1, dim)).float()
            into.copy_(index.gather(1, _halved(_tamed(x), page_tokens)))
    return made


def _tamed(keys: Tensor) -> Tensor:
    """Keys ``[R, n, D]``, those that are out of all proportion made shorter: they would have all others look alike."""
    keys = keys.nan_to_num()
    length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    factor: Tensor = _LONGEST * length.median(1, keepdim=True).values / length
    return keys * factor.clamp(0, 1).nan_to_num()


def _halved(keys: Tensor, page_tokens: int) -> Tensor:
    """Places of keys ``[R, n, D]``, int64 ``[R, n]``: page after page, ascending within a page."""
    rows, tokens, dim = keys.shape
    flat, row = keys.reshape(-1, dim), tokens * torch.arange(rows, device=keys.device)[:, None, None]
    order = torch.arange(tokens, device=keys.device).expand(rows, -1).contiguous()
    parts = {0: tokens // page_tokens}  # where each part begins: its pages, which differ by one at most
    while max(parts.values()) > 1:
        after: dict[int, int] = {}
        for pages in sorted(set(parts.values())):
            begins = [begin for begin, own in parts.items() if own == pages]
            if pages == 1:
                after |= dict.fromkeys(begins, 1)
                continue
            half = pages // 2
            after |= dict.fromkeys(begins, half)
            after |= dict.fromkeys([begin + half * page_tokens for begin in begins], pages - half)
            within = torch.arange(pages * page_tokens, device=keys.device)
            places = torch.tensor(begins, device=keys.device)[:, None] + within
            own = order[:, places]
            x = flat.index_select(0, (row + own).flatten()).view(*own.shape, dim)
            order[:, places] = own.gather(2, _by_side(x, half * page_tokens))
        parts = after
    by_page: Tensor = order.unflatten(1, (-1, page_tokens)).sort(-1).values
    return by_page.flatten(1)


def _by_side(keys: Tensor, first: int) -> Tensor:
    """The order of ``[R, S, n, D]`` in which the first ``first`` tokens are alike, and so are the others."""
    keys = keys - keys.mean(2, keepdim=True)
    far = torch.linalg.vector_norm(keys, dim=-1).argmax(-1)
    axis = keys.gather(2, far[..., None, None].expand(-1, -1, 1, keys.shape[-1])).squeeze(2)
    for _ in range(_ROUNDS):
        order: Tensor = (keys @ axis.unsqueeze(-1)).squeeze(-1).argsort(dim=2, stable=True)
        side = torch.zeros_like(order, dtype=keys.dtype).scatter_(2, order[..., first:], 1.0)
        # The sums of both sides are opposite: one tells the axis between their means.
        axis = (side.unsqueeze(2) @ keys).squeeze(2)
    return order
