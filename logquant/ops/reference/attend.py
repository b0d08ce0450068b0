"""Attention over pages and exact tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import PageFormat
from .quantize import dequantize

# An additive mask value at or below this hides a slot, as False does; models write finfo.min and -inf.
HIDDEN = -1e30


def visible_scores(
    scores: Tensor,
    fmt: PageFormat,
    packed: int,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``scores`` ``[B, Hq, L, slots]`` with additive masks added, and -inf where a query does not see a slot.

    The first ``packed`` slots are those of pages; the other arguments are those of :func:`attend`.
    """
    slot = torch.arange(scores.shape[-1], device=scores.device)
    seen = torch.ones_like(slot, dtype=torch.bool).view(1, 1, 1, -1)
    if lengths is not None:
        used = lengths.long()[:, :, None, None, None].unbind(1)  # pages, window tokens: [b, 1, 1, 1]
        in_pages, in_window = slot < used[0] * fmt.page_tokens, slot - packed < used[1]
        seen = seen & torch.where(slot < packed, in_pages, in_window)
    position = (slot[None] if positions is None else positions.long())[:, None, None]  # [b, 1, 1, slots]
    seen = seen & (position >= 0)
    if query_positions is not None:
        seen = seen & (position <= query_positions[:, None, :, None])
    if mask is not None:
        seen = seen & (position < mask.shape[-1])
        at = position.clamp(0, max(mask.shape[-1] - 1, 0))
        shape = torch.broadcast_shapes(mask.shape[:-1], at.shape[:-1])
        looked_up = mask.expand(*shape, -1).gather(-1, at.expand(*shape, -1))
        if mask.dtype == torch.bool:
            seen = seen & looked_up
        else:
            seen = seen & (looked_up > HIDDEN)
            scores = scores + looked_up.to(scores.dtype)
    return scores.masked_fill(~seen, -torch.inf)


def attend(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fmt: PageFormat,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    attention: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode attention over packed and exact tokens: one softmax over both (LogQuant section 4).

    A *slot* is a place of a token: first the pages' tokens (``page * G + t``), then the window's. Attention does not
    care about the order of slots; ``positions`` says which token a slot holds.

    Args:
        q: queries ``[B, Hq, L, D]``; Hq is a multiple of H (grouped-query attention: query head h reads KV head
            ``h // (Hq / H)``).
        pages: int32 ``[B, H, P, words]``, or ``[blocks, H, words]`` with a ``page_table``.
        window_k: ``[B, H, N, D]``, dtype of ``q``.
        window_v: ``[B, H, N, Dv]``, dtype of ``q``.
        fmt: the page format.
        scale: factor of the scores, usually ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        positions: int32 ``[1 or B, P*G + N]``, the position of each slot's token; the slot's number without it. A slot
            with a negative position is empty: no query sees it.
        mask: ``[1 or B, 1 or Hq, 1 or L, T]``, looked up by position: boolean (True: seen) or an additive float
            (:data:`HIDDEN` or less: not seen). Positions from T on are not seen.
        query_positions: int32 ``[1 or B, L]``: a query sees positions up to its own (causal attention).
        sinks: float ``[Hq]``, a logit a head that only adds to the softmax's denominator (gpt-oss).
        page_table: int32 ``[B, P]``, the block of each page.
        lengths: int32 ``[1 or B, 2]``: pages and window tokens in use; all without it.
        attention: float32 ``[B, H, M]``, M <= N: what each of the first M window slots has been given before this call.

    Computed in float32 (float64 if ``q`` is). A slot that a query does not see has no influence on it, not even if it
    holds a NaN.

    Returns:
        The output ``[B, Hq, L, Dv]`` in q's dtype, 0 for a query that sees nothing; the log-sum-exp of its scores
        (natural logarithm, sinks included), float32 ``[B, Hq, L]``; and, with ``attention``, what each window slot has
        been given after this call, float32 ``[B, H, N]``: without it, ``[0]``. A query gives the slots of the window
        the squares of the softmax of its scores over those alone: without pages and sinks.
    """
    batch, _, queries, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if page_table is not None:
        pages = pages[page_table.long()].transpose(1, 2)
    packed_k, packed_v = dequantize(pages, fmt, key_map=key_map)
    keys = torch.cat([packed_k.to(wide), window_k.to(wide)], 2)
    values = torch.cat([packed_v.to(wide), window_v.to(wide)], 2)

    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = (scale * torch.einsum("bhgld,bhtd->bhglt", grouped, keys)).flatten(1, 2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = visible_scores(
        scores,
        fmt,
        packed_k.shape[2],
        positions=positions,
        mask=mask,
        query_positions=query_positions,
        lengths=lengths,
    )
    seen = scores != -torch.inf
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(wide)[None, :, None, None].expand(batch, -1, queries, 1)], -1)
    lse = logits.logsumexp(-1)
    # Where a query sees nothing, lse is -inf and exp(-inf + inf) would be NaN.
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    # 0 * NaN is NaN, so a token that a query does not see is kept out of the sum and one that it sees is put back.
    finite = values.isfinite()
    out = torch.einsum("bhglt,bhtd->bhgld", weights.unflatten(1, (keys.shape[1], -1)), values.where(finite, 0.0))
    if not finite.all():
        grouped_seen = seen.unflatten(1, (keys.shape[1], -1)).to(wide)
        out[torch.einsum("bhglt,bhtd->bhgld", grouped_seen, (~finite).to(wide)) > 0] = torch.nan
    given = scores.new_empty(0, dtype=torch.float32)
    if attention is not None:
        given = attention_given(scores[..., packed_k.shape[2] :], attention)
    return out.flatten(1, 2).to(q.dtype), lse, given


def attention_given(scores: Tensor, before: Tensor) -> Tensor:
    """``before`` ``[B, H, M]`` and what queries with ``scores`` ``[B, Hq, L, N]`` give each of N slots: ``[B, H, N]``.

    Float32; their softmax squared, summed over the query heads of each KV head and over the queries.
    """
    lse = scores.logsumexp(-1, keepdim=True)
    shares = (scores - lse).exp().masked_fill(scores == -torch.inf, 0.0)
    given: Tensor = shares.square().unflatten(1, (before.shape[1], -1)).sum((2, 3))
    given[..., : before.shape[2]] += before
    return given.float()
