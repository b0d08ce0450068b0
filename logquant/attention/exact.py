"""Plain attention over exact keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import AttentionCall

# Scores held at once by the plain-torch path for models with a softcap or attention sinks.
_SCORES_AT_ONCE = 1 << 24


def exact_attention(call: AttentionCall, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention over exact ``k`` ``[B, H, T, D]`` and ``v`` ``[B, H, T, Dv]``: ``[B, Hq, L, Dv]``.

    Uses ``F.scaled_dot_product_attention`` where that can; with a softcap or sinks it computes blocks of queries in
    float32, so that the scores of a long prompt are never held at once.
    """
    q, mask, scale, softcap, sinks, causal, _ = call
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    group = heads // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    block = max(1, _SCORES_AT_ONCE // max(1, batch * heads * tokens))
    out = q.new_empty(batch, heads, queries, v.shape[-1])
    for first in range(0, queries, block):
        rows = slice(first, min(first + block, queries))
        scores = scale * (q[:, :, rows].float() @ keys.mT)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            part = part[..., :tokens]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        elif causal:
            seen = (
                torch.arange(tokens, device=q.device) <= torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            )
            scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1).nan_to_num(0.0) if mask is not None else scores.softmax(-1)
        out[:, :, rows] = (weights @ values).to(q.dtype)
    return out
