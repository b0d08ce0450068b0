"""The operators in plain torch: short, obviously right, and the definition of correct.

Every backend is tested against this file: codes and parameters bit for bit, attention within twice the error of a
low-precision torch computation. The page is described in csrc/format.h, which :class:`PageFormat` mirrors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT_VERSION = 1
PARAM_BITS = 16
PARAM_MAX = 65504.0
MAX_HEAD_DIM = 1024
MAX_CODE_BITS = 8
BITS = (2, 4, 8)
PAGE_TOKENS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def default_value_group(value_dim: int) -> int:
    """The multiple of 16 that divides ``value_dim`` and lies nearest to 64 (by ratio; the larger of two as near)."""
    groups = [g for g in range(16, value_dim + 1, 16) if value_dim % g == 0]
    return min(groups, key=lambda g: (max(g / 64, 64 / g), -g))


@dataclass(frozen=True)
class PageFormat:
    """The layout of one page: ``page_tokens`` tokens of one KV head (csrc/format.h).

    Args:
        head_dim: D, channels of a key; a multiple of 16 up to 1024.
        value_dim: Dv, channels of a value; a multiple of 16 up to 1024.
        page_tokens: G, tokens of a page: 32, 64 or 128.
        key_bits, value_bits: bits of a code: 2, 4 or 8.
        key_columns: C, columns of key codes; a multiple of 16, by default ``head_dim``.
        value_group: Gv, channels of a value that share a scale; a multiple of 16 that divides ``value_dim``, by
            default the one nearest to 64.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    head_dim: int
    value_dim: int = 0
    page_tokens: int = 64
    key_bits: int = 2
    value_bits: int = 2
    key_columns: int = 0
    value_group: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")

        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        for field in ("head_dim", "value_dim"):
            dim = getattr(self, field)
            need(16 <= dim <= MAX_HEAD_DIM and dim % 16 == 0, field, f"a multiple of 16 up to {MAX_HEAD_DIM}")
        object.__setattr__(self, "key_columns", self.key_columns or self.head_dim)
        object.__setattr__(self, "value_group", self.value_group or default_value_group(self.value_dim))
        need(self.page_tokens in PAGE_TOKENS, "page_tokens", "32, 64 or 128")
        need(self.key_bits in BITS, "key_bits", "2, 4 or 8")
        need(self.value_bits in BITS, "value_bits", "2, 4 or 8")
        most = self.head_dim * (MAX_CODE_BITS // self.key_bits)
        need(
            16 <= self.key_columns <= most and self.key_columns % 16 == 0,
            "key_columns",
            f"a multiple of 16 up to {most}",
        )
        need(
            self.value_group >= 16 and self.value_group % 16 == 0 and self.value_dim % self.value_group == 0,
            "value_group",
            f"a multiple of 16 that divides value_dim ({self.value_dim})",
        )

    @property
    def key_code_words(self) -> int:
        return self.key_columns * self.key_bits // 32

    @property
    def value_code_rows(self) -> int:
        return self.page_tokens * self.value_bits // 32

    @property
    def value_groups(self) -> int:
        return self.value_dim // self.value_group

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Words of the four parts of a page: key codes, key params, value codes, value params."""
        return (
            self.page_tokens * self.key_code_words,
            self.head_dim,
            self.value_code_rows * self.value_dim,
            self.value_groups * self.page_tokens,
        )

    @property
    def words(self) -> int:
        """32-bit words of one page."""
        return sum(self.sections)

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return 4 * self.words

    @property
    def bits_per_element(self) -> float:
        """Bits per cached key or value element, codes and parameters."""
        return 32 * self.words / (self.page_tokens * (self.head_dim + self.value_dim))

    def fields(self) -> list[int]:
        """The ten integers that describe a format in operator schemas and files (csrc/format.h)."""
        # Not dataclasses.astuple, which copies: every operator call of every layer comes by here.
        return [
            FORMAT_VERSION,
            self.head_dim,
            self.value_dim,
            self.page_tokens,
            self.key_bits,
            self.value_bits,
            self.key_columns,
            self.value_group,
            PARAM_BITS,
            PARAM_BITS,
        ]

    @classmethod
    def from_fields(cls, fields: list[int]) -> PageFormat:
        """The inverse of :meth:`fields`."""
        if len(fields) != 10:
            raise ValueError(f"format must have 10 fields, got {len(fields)}")
        version, *own, key_param_bits, value_param_bits = fields
        if version != FORMAT_VERSION:
            raise ValueError(f"format version must be {FORMAT_VERSION}, got {version}")
        if (key_param_bits, value_param_bits) != (PARAM_BITS, PARAM_BITS):
            raise ValueError(f"parameter bits must be {PARAM_BITS}, got {key_param_bits} and {value_param_bits}")
        return cls(*own)


# ---------------------------------------------------------------------------------------------- words and parameters
def _element_shifts(bits: int, device: torch.device) -> Tensor:
    element = torch.arange(32 // bits, dtype=torch.int32, device=device)
    return bits * (element // 2) + 16 * (element % 2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., n]`` (integers, n a multiple of 32/bits) into int32 words ``[..., n*bits/32]``."""
    shifts = _element_shifts(bits, codes.device).long()
    words: Tensor = (codes.long().unflatten(-1, (-1, 32 // bits)) << shifts).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_words`, as int32."""
    shifts = _element_shifts(bits, words.device)
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def _pack_half(x: Tensor) -> Tensor:
    return x.to(torch.float16).contiguous().view(torch.int32)


def _unpack_half(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float16).float()


def identity_map(fmt: PageFormat, device: torch.device | None = None) -> Tensor:
    """The column map of plain LogQuant, ``[1, 1, C]`` int16: column c is channel c."""
    return (4 * torch.arange(fmt.head_dim, dtype=torch.int16, device=device)).view(1, 1, -1)


def _columns(key_map: Tensor | None, fmt: PageFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of a column map: channel and digit of every column ``[b, h, C]``, and columns of every channel ``[b, h, D]``."""
    if key_map is None:
        if fmt.key_columns != fmt.head_dim:
            raise ValueError(f"key_map is needed: {fmt.key_columns} key columns for {fmt.head_dim} channels")
        key_map = identity_map(fmt, device)
    entries = key_map.long()
    channel, digit = entries >> 2, entries & 3
    columns = torch.zeros(*entries.shape[:-1], fmt.head_dim, dtype=torch.long, device=device)
    columns.scatter_add_(-1, channel, torch.ones_like(channel))
    return channel, digit, columns


# ----------------------------------------------------------------------------------------------------- quantisation
def _scale_and_zero(x: Tensor, levels: Tensor | int, dim: int) -> tuple[Tensor, Tensor]:
    """fp16 scale and zero (as float32) of groups of ``x`` along ``dim``, kept; ``levels`` is the largest code."""
    finite = x.isfinite().all(dim, keepdim=True)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    # + 0.0 turns -0.0 into 0.0: which of the two a minimum or maximum gives differs between processors.
    zero = (low + 0.0).clamp(-PARAM_MAX, PARAM_MAX).half().float()
    scale = ((high - low + 0.0) / levels).clamp(max=PARAM_MAX).half().float()
    return torch.where(finite, scale, 0.0), torch.where(finite, zero, torch.nan)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor | int) -> Tensor:
    code = ((x - zero) * (1.0 / scale)).round()
    code = torch.minimum(code.clamp_min(0), torch.as_tensor(levels, dtype=code.dtype, device=code.device))
    return torch.where(scale > 0, code, 0.0).int()


def _page_mean(x: Tensor) -> Tensor:
    """Mean over dim -2, added up token by token so that every backend gets the same bits."""
    total = torch.zeros_like(x[..., 0, :])
    for t in range(x.shape[-2]):
        total = total + x[..., t, :]
    return total.div(x.shape[-2]).unsqueeze(-2)


def quantize(
    k: Tensor, v: Tensor, fmt: PageFormat, *, index: Tensor | None = None, key_map: Tensor | None = None
) -> Tensor:
    """Quantise tokens into pages (LogQuant section 4, in the page format of csrc/format.h).

    In fp32 from the exact input: ``zero = fp16(min)``, ``scale = fp16((max - min) / levels)``,
    ``code = clamp(round((x - zero) * (1 / scale)), 0, levels)``; keys per channel over a page's tokens, values per
    token over ``value_group`` channels. A group with a non-finite element gets a NaN zero.

    Args:
        k: keys ``[B, H, T, D]``, float32, float16 or bfloat16.
        v: values ``[B, H, T, Dv]``, same dtype.
        fmt: the page format.
        index: int32 ``[1 or B, N]``, the tokens to take, in order; all T without it. N is a multiple of G.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.

    Returns:
        Pages, int32 ``[B, H, N/G, words]``.
    """
    if index is not None:
        rows = index.long().expand(k.shape[0], -1)[:, None, :, None]
        k = k.gather(2, rows.expand(-1, k.shape[1], -1, k.shape[3]))
        v = v.gather(2, rows.expand(-1, v.shape[1], -1, v.shape[3]))
    channel, digit, columns = (t.unsqueeze(2) for t in _columns(key_map, fmt, k.device))
    k = k.float().unflatten(2, (-1, fmt.page_tokens))  # [B, H, P, G, D]
    v = v.float().unflatten(2, (-1, fmt.page_tokens)).unflatten(-1, (-1, fmt.value_group))  # [B, H, P, G, groups, Gv]

    levels = (2 ** (fmt.key_bits * columns) - 1).float().unsqueeze(-2)  # [b, h, 1, 1, D]
    scale, zero = _scale_and_zero(k, levels.clamp_min(1), dim=-2)
    mean = (_page_mean(k) + 0.0).clamp(-PARAM_MAX, PARAM_MAX).half().float()
    has_columns = levels > 0
    scale = torch.where(has_columns, scale, 0.0)
    zero = torch.where(has_columns | zero.isnan(), zero, mean)
    code = _codes(k, scale, zero, levels)
    batch_shape = code.shape[:-1]
    code = code.gather(-1, channel.unsqueeze(-2).expand(*batch_shape, -1))
    code = (code >> (fmt.key_bits * digit.unsqueeze(-2)).int()) & (2**fmt.key_bits - 1)
    key_codes = pack_words(code, fmt.key_bits)
    key_params = torch.cat([_pack_half(scale.squeeze(-2)), _pack_half(zero.squeeze(-2))], -1)

    value_levels = 2**fmt.value_bits - 1
    scale, zero = _scale_and_zero(v, value_levels, dim=-1)
    code = _codes(v, scale, zero, value_levels).flatten(-2)  # [B, H, P, G, Dv]
    value_codes = pack_words(code.transpose(-1, -2), fmt.value_bits).transpose(-1, -2)  # [B, H, P, G*b/32, Dv]
    value_params = torch.cat([_pack_half(p.squeeze(-1).transpose(-1, -2).flatten(-2)) for p in (scale, zero)], -1)
    return torch.cat([key_codes.flatten(-2), key_params, value_codes.flatten(-2), value_params], -1)


def dequantize(
    pages: Tensor, fmt: PageFormat, *, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that pages stand for: ``zero + scale * code``, in fp32, then rounded to ``dtype``.

    Args:
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        dtype: float32, float16 or bfloat16.
        key_map: the column map the pages were made with.

    Returns:
        Keys ``[B, H, P*G, D]`` and values ``[B, H, P*G, Dv]``.
    """
    channel, digit, _ = (t.unsqueeze(2).unsqueeze(2) for t in _columns(key_map, fmt, pages.device))
    key_codes, key_params, value_codes, value_params = pages.split(fmt.sections, -1)

    digits = unpack_words(key_codes.unflatten(-1, (fmt.page_tokens, -1)), fmt.key_bits)
    weighted = (digits << (fmt.key_bits * digit).int()).float()
    code = torch.zeros(*weighted.shape[:-1], fmt.head_dim, device=pages.device)
    code.scatter_add_(-1, channel.expand_as(weighted), weighted)
    scale, zero = _unpack_half(key_params).unflatten(-1, (2, 1, -1)).unbind(-3)  # [B, H, P, 1, D]
    keys = (zero + scale * code).flatten(2, 3)

    rows = value_codes.unflatten(-1, (-1, fmt.value_dim)).transpose(-1, -2)  # [B, H, P, Dv, G*b/32]
    code = unpack_words(rows, fmt.value_bits).transpose(-1, -2).unflatten(-1, (-1, fmt.value_group)).float()
    params = _unpack_half(value_params).unflatten(-1, (2, fmt.value_groups, fmt.page_tokens))
    scale, zero = params.transpose(-1, -2).unsqueeze(-1).unbind(-4)  # [B, H, P, G, groups, 1]
    values = (zero + scale * code).flatten(-2).flatten(2, 3)
    return keys.to(dtype), values.to(dtype)


def evict_(
    window_k: Tensor,
    window_v: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    *,
    page: int,
    tokens: int,
    start: int,
    step: int,
    count: int,
    key_map: Tensor | None = None,
) -> None:
    """Move tokens from the window into pages, in place: quantise every ``step``-th slot, close the gaps.

    Slots ``start, start + step, ...`` (``count`` of them, a multiple of G; :func:`logquant.window.evicted_slots`)
    become ``pages[:, :, page : page + count/G]``. The others move up, in order, to the first ``tokens - count`` slots;
    what later slots hold is unspecified.

    Args:
        window_k: ``[B, H, capacity, D]``, changed in place.
        window_v: ``[B, H, capacity, Dv]``, changed in place.
        pages: int32 ``[B, H, P, words]``, changed in place.
        fmt: the page format.
        page: the first page to write.
        tokens: how many slots of the window hold tokens.
        start, step, count: the slots to evict.
        key_map: the column map, as for :func:`quantize`.
    """
    gone = torch.arange(start, start + step * count, step, device=window_k.device)
    stays = torch.ones(tokens, dtype=torch.bool, device=window_k.device).index_fill_(0, gone, False)
    pages[:, :, page : page + count // fmt.page_tokens] = quantize(
        window_k, window_v, fmt, index=gone.int()[None], key_map=key_map
    )
    for window in (window_k, window_v):
        window[:, :, : tokens - count] = window[:, :, :tokens][:, :, stays]


# -------------------------------------------------------------------------------------------------------- attention
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
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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

    Computed in float32 (float64 if ``q`` is). A slot that a query does not see has no influence on it, not even if it
    holds a NaN.

    Returns:
        The output ``[B, Hq, L, Dv]`` in q's dtype, 0 for a query that sees nothing, and the log-sum-exp of its scores
        (natural logarithm, sinks included), float32 ``[B, Hq, L]``.
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
    return out.flatten(1, 2).to(q.dtype), lse
