"""Pages made of clusters: the tokens of a page have keys that are alike, so that its mean says more of them.

The tokens of a prompt are halved again and again, each half alike, until a half is a page: clusters of equal size, in
time n log n. ClusterKV (arXiv 2412.03213), whose clusters are of any size, reads single tokens; here pages are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Float32 elements that are worked on at once: copies of all keys of a long prompt would raise the peak.
_AT_ONCE = 1 << 22
_ROUNDS = 4


def clusters(keys: Tensor, page_tokens: int) -> Tensor:
    """The order of tokens in which each page's have keys that are alike.

    Args:
        keys: ``[B, H, n, D]``, floating point; n is a multiple of ``page_tokens``.
        page_tokens: tokens of a page.

    Returns:
        int64 ``[B, H, n]``: places of tokens, page after page, ascending within a page.
    """
    batch, heads, tokens, dim = keys.shape
    if not tokens:
        return keys.new_empty(batch, heads, 0, dtype=torch.int64)
    # Each row by itself, so that sums are added up as they are where it is alone.
    parts = (part for row in keys for part in row.split(max(1, _AT_ONCE // (tokens * dim))))
    made = [_halved(part.float().nan_to_num(), page_tokens) for part in parts]
    return torch.cat(made).view(batch, heads, tokens)


def _halved(keys: Tensor, page_tokens: int) -> Tensor:
    """The same of keys ``[R, n, D]``."""
    rows, tokens, dim = keys.shape
    order = torch.arange(tokens, device=keys.device).expand(rows, -1).contiguous()
    parts = {0: tokens // page_tokens}  # where each part begins, and how many pages it has: n and n + 1 at most
    while max(parts.values()) > 1:
        after: dict[int, int] = {}
        for pages in sorted(set(parts.values())):
            begins = [begin for begin, own in parts.items() if own == pages]
            half = pages // 2
            after |= dict.fromkeys(begins, max(1, half))
            if not half:
                continue
            after |= dict.fromkeys([begin + half * page_tokens for begin in begins], pages - half)
            within = torch.arange(pages * page_tokens, device=keys.device)
            places = torch.tensor(begins, device=keys.device)[:, None] + within
            own = order[:, places]
            x = keys.gather(1, own.flatten(1)[..., None].expand(-1, -1, dim)).view(*own.shape, dim)
            order[:, places] = own.gather(2, _by_side(x, half * page_tokens))
        parts = after
    by_page: Tensor = order.unflatten(1, (-1, page_tokens)).sort(-1).values
    return by_page.flatten(1)


def _by_side(keys: Tensor, first: int) -> Tensor:
    """The order of ``[R, S, n, D]`` in which the first ``first`` tokens are alike, and so are the others."""
    keys = keys - keys.mean(2, keepdim=True)
    far = keys.square().sum(-1).argmax(-1)
    axis = keys.gather(2, far[..., None, None].expand(-1, -1, 1, keys.shape[-1])).squeeze(2)
    order = far
    for _ in range(_ROUNDS):
        order = (keys @ axis.unsqueeze(-1)).squeeze(-1).argsort(dim=2, stable=True)
        side = torch.zeros_like(order, dtype=keys.dtype).scatter_(2, order[..., first:], 1.0)
        # The sums of both sides are opposite: one tells the axis between their means.
        axis = (side.unsqueeze(2) @ keys).squeeze(2)
    return order
