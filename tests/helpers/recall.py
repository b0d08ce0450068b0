"""Recall as its papers state it, in plain torch: which pages, and attention over those alone."""

from __future__ import annotations

import torch
from torch import Tensor

from logquant import ops
from logquant.attention.call import AttentionCall
from logquant.attention.view import KVView
from logquant.format import PageFormat
from logquant.recall.index import PageIndex
from logquant.recall_spec import RecallSpec


def ranges(pages: Tensor, fmt: PageFormat, key_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the largest key that a page can stand for, ``[B, H, P, D]`` each: all codes 0, and all ones."""
    found = []
    for word in (0, -1):
        filled = pages.clone()
        filled[..., : fmt.sections[0]] = word
        found.append(ops.dequantize(filled, fmt, key_map=key_map)[0][:, :, :: fmt.page_tokens])
    return found[0], found[1]


def page_ranges(low: Tensor, high: Tensor, q: Tensor) -> Tensor:
    """Quest (2406.10774): no key within ``[low, high]`` scores higher. ``[B, H, g, L, P]``, unscaled."""
    q = q.unflatten(1, (low.shape[1], -1))
    scores = torch.einsum("bhgld,bhpd->bhglp", q.clamp_min(0), high)
    return scores + torch.einsum("bhgld,bhpd->bhglp", q.clamp_max(0), low)


def top_pages(scores: Tensor, pages: int) -> Tensor:
    """Pages a KV head reads for each query: the highest mean softmax over its query heads. bool ``[B, H, L, P]``."""
    shares = scores.double().softmax(-1).mean(2)
    return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, shares.topk(pages, -1).indices, True)


def means_of(index: PageIndex, pages: int) -> Tensor:
    return (index.means * index.scales.unsqueeze(-1))[:, :, :pages]


def chosen_pages(spec: RecallSpec, view: KVView, q: Tensor, scale: float) -> Tensor:
    """Bool ``[B, H, L, P]``, where all rows have all pages."""
    count = spec.count(view.pages.shape[2], view.fmt.page_tokens)
    bounds = scale * page_ranges(*ranges(view.pages, view.fmt, view.key_map), q)
    if spec.chooser == "bounds":
        return top_pages(bounds, count)
    assert view.recall is not None and view.recall.page_index is not None
    mean = means_of(view.recall.page_index, view.pages.shape[2])
    means = scale * page_ranges(mean, mean, q)
    if spec.chooser == "means":
        return top_pages(means, count)
    half = top_pages(means, (count + 1) // 2)
    shares = bounds.double().softmax(-1).mean(2).masked_fill(half, -1)
    return half.scatter(-1, shares.topk(count - (count + 1) // 2, -1).indices, True)


def attention(view: KVView, call: AttentionCall, chosen: Tensor) -> Tensor:
    """Attention to the exact tokens and those pages, ``[B, Hq, L, Dv]`` in double."""
    packed = ops.dequantize(view.pages, view.fmt, key_map=view.key_map)
    keys, values = (torch.cat(x, 2).double() for x in zip(packed, (view.keys, view.values), strict=True))
    q = call.query.double().unflatten(1, (keys.shape[1], -1))
    scores = call.scale * torch.einsum("bhgld,bhtd->bhglt", q, keys)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    exact = torch.ones(view.keys.shape[2], dtype=torch.bool).expand(*chosen.shape[:3], -1)
    seen = torch.cat([chosen.repeat_interleave(view.fmt.page_tokens, -1), exact], -1)
    positions = view.rows.positions(torch.device("cpu"), view.new)[:, None, None]
    last = view.length - call.query.shape[2] + torch.arange(call.query.shape[2])
    seen = seen & (positions >= 0) & (positions <= last[:, None])
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.double().view(1, keys.shape[1], -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return torch.einsum("bhglt,bhtd->bhgld", weights, values).flatten(1, 2)
