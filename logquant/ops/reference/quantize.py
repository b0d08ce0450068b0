"""Pages from tokens and tokens from pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import PageFormat
from .hadamard import hadamard
from .search import nearest_code, search_keys, search_values
from .words import (
    PARAM_MAX,
    POISON,
    SCALE_MAX,
    byte_scale,
    pack_bytes,
    pack_half,
    pack_words,
    unpack_bytes,
    unpack_half,
    unpack_words,
)

FEEDBACK_MAX = 4.0  # a larger factor counts as 0


def _identity_map(fmt: PageFormat, device: torch.device | None = None) -> Tensor:
    """The column map where each channel has one column, ``[1, 1, C]`` int16: column c is channel c."""
    return (4 * torch.arange(fmt.head_dim, dtype=torch.int16, device=device)).view(1, 1, -1)


def columns_of(key_map: Tensor | None, fmt: PageFormat, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of a column map: channel and digit of every column ``[b, h, C]``, and columns of every channel ``[b, h, D]``."""
    if key_map is None:
        if fmt.key_columns != fmt.head_dim:
            raise ValueError(f"key_map is needed: {fmt.key_columns} key columns for {fmt.head_dim} channels")
        key_map = _identity_map(fmt, device)
    entries = key_map.long()
    channel, digit = entries >> 2, entries & 3
    columns = torch.zeros(*entries.shape[:-1], fmt.head_dim, dtype=torch.long, device=device)
    columns.scatter_add_(-1, channel, torch.ones_like(channel))
    return channel, digit, columns


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


def _lift(fmt: PageFormat, columns: Tensor) -> Tensor:
    """What 8-bit parameters hold, the scale of a channel's two highest bits, over that of its codes; float32."""
    return torch.exp2((fmt.key_bits * columns - 2).clamp_min(0).float())


def _quantize_keys(
    k: Tensor, fmt: PageFormat, columns: Tensor, levels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes ``[B, H, P, G, D]`` (int32) and packed parameters of keys ``[B, H, P, G, D]`` (float32)."""
    if fmt.key_param_bits == 8:
        x = k.permute(3, 0, 1, 2, 4)
        if weights is None:
            w = torch.ones_like(x[..., :1])
        else:
            w = weights.float().expand(*k.shape[:2], -1).unflatten(2, (-1, fmt.page_tokens))
            w = w.where((w >= 2**-10) & (w <= 2**10), 1.0).permute(3, 0, 1, 2).unsqueeze(-1)
        shape = x.shape[1:]
        lift = _lift(fmt, columns).expand(shape)
        scale_bytes, zero_bytes, codes = search_keys(x, w, levels.squeeze(-2).expand(shape), lift)
        params = torch.cat([pack_bytes(scale_bytes), pack_bytes(zero_bytes)], -1)
        return codes.permute(1, 2, 3, 0, 4).int(), params
    scale, zero = _scale_and_zero(k, levels.clamp_min(1), dim=-2)
    mean = (_page_mean(k) + 0.0).clamp(-PARAM_MAX, PARAM_MAX).half().float()
    has_columns = levels > 0
    scale = torch.where(has_columns, scale, 0.0)
    zero = torch.where(has_columns | zero.isnan(), zero, mean)
    params = torch.cat([pack_half(scale.squeeze(-2)), pack_half(zero.squeeze(-2))], -1)
    return _codes(k, scale, zero, levels), params


def _value_levels(fmt: PageFormat, device: torch.device) -> Tensor:
    """The largest code of each token of a page, ``[G]`` float32."""
    levels = torch.full((fmt.page_tokens,), 2.0**fmt.value_bits - 1, device=device)
    levels[list(fmt.fine_tokens)] = 4.0**fmt.value_bits - 1
    return levels


def _fed_back(x: Tensor, scale: Tensor, levels: Tensor, feedback: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Values after each has taken off what the errors of those before it in its page come to, and their codes.

    Args:
        x: ``[B, H, P, G, groups, Gv]`` float32, rotated.
        scale: ``[B, H, P, G, groups]``.
        levels: ``[G, 1]``, the largest code.
        feedback: ``[b, h, P, G, G]``, as for :func:`quantize`.
        counts: which groups have an error that counts, bool like ``scale``.
    """
    x, codes = x.clone(), torch.empty_like(x)
    factors = feedback.where(feedback.abs() <= FEEDBACK_MAX, 0.0)[..., None, None]
    scale = scale.unsqueeze(-1)
    most = levels.unsqueeze(-1).expand_as(scale)
    zero = scale * (-0.5 * most)
    for t in range(x.shape[3]):
        own = x[:, :, :, t]
        code = nearest_code(own, scale[:, :, :, t], zero[:, :, :, t], most[:, :, :, t])
        codes[:, :, :, t] = code = code.nan_to_num(0.0)  # large factors make numbers of any size, and more
        error = own - (zero[:, :, :, t] + scale[:, :, :, t] * code)
        error = error.where(counts[:, :, :, t].unsqueeze(-1), 0.0)
        x[:, :, :, t + 1 :] -= factors[:, :, :, t, t + 1 :] * error.unsqueeze(3)
    return x, codes


def _quantize_values(v: Tensor, fmt: PageFormat, feedback: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes ``[B, H, P, G, Dv]`` (int32) and packed parameters of values ``[B, H, P, G, groups, Gv]`` (float32)."""
    levels = 2**fmt.value_bits - 1
    if fmt.value_param_bits == 8:
        searched_levels = _value_levels(fmt, v.device).unsqueeze(-1)
        finite = v.isfinite().all(-1)
        x = hadamard(v.where(finite.unsqueeze(-1), 0.0).clamp(-PARAM_MAX, PARAM_MAX), fmt.hadamard_block)
        scale_bytes, codes = search_values(x.movedim(-1, 0), searched_levels)
        codes = codes.movedim(0, -1)
        if feedback is not None:
            # The scales that fit the values are not those that fit what becomes of them.
            factors = feedback.expand(*v.shape[:2], -1, -1).unflatten(2, (-1, fmt.page_tokens))
            corrected, _ = _fed_back(x, byte_scale(scale_bytes), searched_levels, factors, finite)
            scale_bytes, _ = search_values(corrected.movedim(-1, 0), searched_levels)
            _, codes = _fed_back(x, byte_scale(scale_bytes), searched_levels, factors, finite)
        scale_bytes = torch.where(finite, scale_bytes, POISON)
        codes = torch.where(finite.unsqueeze(-1), codes, 0.0)
        return codes.flatten(-2).int(), pack_bytes(scale_bytes.transpose(-1, -2).flatten(-2))
    scale, zero = _scale_and_zero(v, levels, dim=-1)
    params = [pack_half(p.squeeze(-1).transpose(-1, -2).flatten(-2)) for p in (scale, zero)]
    return _codes(v, scale, zero, levels).flatten(-2), torch.cat(params, -1)


def quantize(
    k: Tensor,
    v: Tensor,
    fmt: PageFormat,
    index: Tensor | None = None,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> Tensor:
    """Quantise tokens into pages (LogQuant section 4, in the page format of csrc/format.h).

    With 16-bit parameters, in fp32 from the exact input: ``zero = fp16(min)``, ``scale = fp16((max - min) / levels)``,
    ``code = clamp(round((x - zero) * (1 / scale)), 0, levels)``; keys per channel over a page's tokens, values per
    token over ``value_group`` channels. With 8-bit parameters :func:`search_keys` and :func:`search_values` find
    them, and values are rotated (:func:`.hadamard.hadamard`). A group with a non-finite element becomes NaN.

    Args:
        k: keys ``[B, H, T, D]``, float32, float16 or bfloat16.
        v: values ``[B, H, T, Dv]``, same dtype.
        fmt: the page format.
        index: int32 ``[1 or B, N]``, the tokens to take, in order; all T without it. N is a multiple of G.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        key_weights: float32 ``[1 or B, 1 or H, N]``, how much an error of each token's key counts where parameters are
            searched; a weight outside 2^-10 .. 2^10 counts as 1, as all do without it.
        value_feedback: float32 ``[1 or B, 1 or H, N, G]``, for values with 8-bit parameters: how much of a token's
            error each later token of its page takes off before it is rounded (logquant/quantizer/feedback.py).
            Factors of earlier tokens are not read; one beyond +-4 counts as 0, as all do without it.

    Returns:
        Pages, int32 ``[B, H, N/G, words]``.
    """
    if index is not None:
        rows = index.long().expand(k.shape[0], -1)[:, None, :, None]
        k = k.gather(2, rows.expand(-1, k.shape[1], -1, k.shape[3]))
        v = v.gather(2, rows.expand(-1, v.shape[1], -1, v.shape[3]))
    channel, digit, columns = (t.unsqueeze(2) for t in columns_of(key_map, fmt, k.device))
    k = k.float().unflatten(2, (-1, fmt.page_tokens))  # [B, H, P, G, D]
    v = v.float().unflatten(2, (-1, fmt.page_tokens)).unflatten(-1, (-1, fmt.value_group))  # [B, H, P, G, groups, Gv]

    levels = (2 ** (fmt.key_bits * columns) - 1).float().unsqueeze(-2)  # [b, h, 1, 1, D]
    code, key_params = _quantize_keys(k, fmt, columns, levels, key_weights)
    code = code.gather(-1, channel.unsqueeze(-2).expand(*code.shape[:-1], -1))
    code = (code >> (fmt.key_bits * digit.unsqueeze(-2)).int()) & (2**fmt.key_bits - 1)
    key_codes = pack_words(code, fmt.key_bits)

    code, value_params = _quantize_values(v, fmt, value_feedback)
    by_channel = code.transpose(-1, -2)
    low_digits = by_channel & (2**fmt.value_bits - 1)
    value_codes = pack_words(low_digits, fmt.value_bits).transpose(-1, -2)  # [B, H, P, G*b/32, Dv]
    fine_digits = _pack_fine(by_channel[..., list(fmt.fine_tokens)] >> fmt.value_bits, fmt)
    return torch.cat([key_codes.flatten(-2), key_params, value_codes.flatten(-2), value_params, fine_digits], -1)


def _pack_fine(digits: Tensor, fmt: PageFormat) -> Tensor:
    """High digits ``[..., Dv, fine_values]`` as words ``[..., words]``: a word has those of channels c, c + 16, ..."""
    if not fmt.fine_values:
        return digits.flatten(-2)
    positions = _fine_positions(fmt, digits.device)
    placed = digits.unflatten(-2, (-1, len(positions), 16)) << positions  # [..., words/16, n, 16, fine_values]
    words: Tensor = placed.sum((-1, -3), dtype=torch.int32).flatten(-2)
    return words


def _unpack_fine(words: Tensor, fmt: PageFormat) -> Tensor:
    """The inverse of :func:`_pack_fine`."""
    placed: Tensor = words.unflatten(-1, (-1, 1, 16, 1)) >> _fine_positions(fmt, words.device)
    return (placed & 3).flatten(-4, -2)


def _fine_positions(fmt: PageFormat, device: torch.device) -> Tensor:
    """Where in their words fine digits lie, ``[n, 1, fine_values]`` int32, of n channels and each fine token."""
    channels = torch.arange(16 // fmt.fine_values, dtype=torch.int32, device=device)
    tokens = torch.tensor(fmt.fine_tokens, dtype=torch.int32, device=device)
    of_second = 16 * (tokens % 2) if fmt.fine_values == 8 else 0
    return (8 * channels[:, None] + 2 * (tokens // 16) + of_second).unsqueeze(1)


def unpack_params(words: Tensor, fmt: PageFormat, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero of keys (with the columns of each channel) or of values, float32, flat along the last dim."""
    if (fmt.value_param_bits if columns is None else fmt.key_param_bits) == 16:
        scale, zero = unpack_half(words).unflatten(-1, (2, -1)).unbind(-2)
        return scale, zero
    if columns is None:
        byte = unpack_bytes(words, signed=False)
        zero_steps = -0.5 * _value_levels(fmt, words.device).repeat(fmt.value_groups)
    else:
        byte = unpack_bytes(words[..., : words.shape[-1] // 2], signed=False)
        zero_steps = unpack_bytes(words[..., words.shape[-1] // 2 :], signed=True).float()
    top = byte_scale(byte.clamp(max=SCALE_MAX))
    zero = zero_steps * (top if columns is None else top * 0.125)
    scale = top if columns is None else top * (1.0 / _lift(fmt, columns))
    return torch.where(byte == POISON, 0.0, scale), torch.where(byte == POISON, torch.nan, zero)


def dequantize(
    pages: Tensor, fmt: PageFormat, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that pages stand for: ``zero + scale * code``, in fp32, then rounded to ``dtype``.

    Rotated values are rotated back before they are rounded.

    Args:
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        dtype: float32, float16 or bfloat16.
        key_map: the column map the pages were made with.

    Returns:
        Keys ``[B, H, P*G, D]`` and values ``[B, H, P*G, Dv]``.
    """
    channel, digit, columns = (t.unsqueeze(2).unsqueeze(2) for t in columns_of(key_map, fmt, pages.device))
    key_codes, key_params, value_codes, value_params, fine_digits = pages.split(fmt.sections, -1)

    digits = unpack_words(key_codes.unflatten(-1, (fmt.page_tokens, -1)), fmt.key_bits)
    weighted = (digits << (fmt.key_bits * digit).int()).float()
    code = torch.zeros(*weighted.shape[:-1], fmt.head_dim, device=pages.device)
    code.scatter_add_(-1, channel.expand_as(weighted), weighted)
    scale, zero = (p.unsqueeze(3) for p in unpack_params(key_params, fmt, columns.squeeze(2)))  # [B, H, P, 1, D]
    keys = (zero + scale * code).flatten(2, 3)

    rows = value_codes.unflatten(-1, (-1, fmt.value_dim)).transpose(-1, -2)  # [B, H, P, Dv, G*b/32]
    by_channel = unpack_words(rows, fmt.value_bits)
    if fmt.fine_values:
        by_channel[..., list(fmt.fine_tokens)] += _unpack_fine(fine_digits, fmt) << fmt.value_bits
    code = by_channel.transpose(-1, -2).unflatten(-1, (-1, fmt.value_group)).float()
    params = (p.unflatten(-1, (-1, fmt.page_tokens)) for p in unpack_params(value_params, fmt, None))
    scale, zero = (p.transpose(-1, -2).unsqueeze(-1) for p in params)  # [B, H, P, G, groups, 1]
    values = (zero + scale * code).flatten(-2).flatten(2, 3)
    if fmt.hadamard_block > 1:
        values = hadamard(values, fmt.hadamard_block)
    return keys.to(dtype), values.to(dtype)


def evict_(
    window_k: Tensor,
    window_v: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    page: int,
    tokens: int,
    start: int,
    step: int,
    count: int,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> None:
    """Move tokens from the window into pages, in place: quantise every ``step``-th slot, close the gaps.

    Slots ``start, start + step, ...`` (``count`` of them, a multiple of G; :func:`logquant.rule.evicted_slots`)
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
        key_map, key_weights, value_feedback: as for :func:`quantize`.
    """
    gone = torch.arange(start, start + step * count, step, device=window_k.device)
    stays = torch.ones(tokens, dtype=torch.bool, device=window_k.device).index_fill_(0, gone, False)
    pages[:, :, page : page + count // fmt.page_tokens] = quantize(
        window_k,
        window_v,
        fmt,
        index=gone.int()[None],
        key_map=key_map,
        key_weights=key_weights,
        value_feedback=value_feedback,
    )
    for window in (window_k, window_v):
        window[:, :, : tokens - count] = window[:, :, :tokens][:, :, stays]
