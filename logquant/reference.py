"""The operators in plain torch: short, obviously right, and the definition of correct.

Every backend is tested against this file: codes and parameters bit for bit, attention within twice the error of a
low-precision torch computation. The page is described in csrc/format.h, which :class:`PageFormat` mirrors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .hadamard import hadamard

FORMAT_VERSION = 1
PARAM_BITS = (8, 16)
PARAM_MAX = 65504.0
MAX_HADAMARD = 64
MAX_HEAD_DIM = 1024
MAX_CODE_BITS = 8
BITS = (2, 4, 8)
PAGE_TOKENS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def largest_block(dim: int) -> int:
    """The largest power of two up to :data:`MAX_HADAMARD` that divides ``dim``."""
    return min(dim & -dim, MAX_HADAMARD)


def default_value_group(value_dim: int, step: int = 16) -> int:
    """The multiple of ``step`` that divides ``value_dim`` and lies nearest to 64 (by ratio; the larger of two)."""
    groups = [g for g in range(step, value_dim + 1, step) if value_dim % g == 0]
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
            default the one nearest to 64 (with ``value_param_bits`` 8: that the largest Hadamard block divides).
        key_param_bits: 16 (plain: fp16 scale and zero) or 8 (fitted: logarithmic scale, zero in eighths of it).
        value_param_bits: 16 (plain) or 8 (fitted: Hadamard-rotated values, a logarithmic scale, no zero).

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
    key_param_bits: int = 16
    value_param_bits: int = 16

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {what}, got {getattr(self, field)!r}")

        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        for field in ("head_dim", "value_dim"):
            dim = getattr(self, field)
            need(16 <= dim <= MAX_HEAD_DIM and dim % 16 == 0, field, f"a multiple of 16 up to {MAX_HEAD_DIM}")
        object.__setattr__(self, "key_columns", self.key_columns or self.head_dim)
        need(self.key_param_bits in PARAM_BITS, "key_param_bits", "8 or 16")
        need(self.value_param_bits in PARAM_BITS, "value_param_bits", "8 or 16")
        step = 16 if self.value_param_bits == 16 else largest_block(self.value_dim)
        object.__setattr__(self, "value_group", self.value_group or default_value_group(self.value_dim, step))
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
    def has_map(self) -> bool:
        """Whether pages need a column map."""
        return self.key_columns != self.head_dim

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
    def is_fitted(self) -> bool:
        """Whether parameters of keys or values are searched, not the range of the elements."""
        return self.key_param_bits == 8 or self.value_param_bits == 8

    @property
    def hadamard_block(self) -> int:
        """Channels of a value that are rotated together; 1 where values are stored as they are."""
        return largest_block(self.value_group) if self.value_param_bits == 8 else 1

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Words of the four parts of a page: key codes, key params, value codes, value params."""
        return (
            self.page_tokens * self.key_code_words,
            self.head_dim * self.key_param_bits // 16,
            self.value_code_rows * self.value_dim,
            self.value_groups * self.page_tokens // (4 if self.value_param_bits == 8 else 1),
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
            self.key_param_bits,
            self.value_param_bits,
        ]

    @classmethod
    def from_fields(cls, fields: list[int]) -> PageFormat:
        """The inverse of :meth:`fields`."""
        if len(fields) != 10:
            raise ValueError(f"format must have 10 fields, got {len(fields)}")
        version, *own = fields
        if version != FORMAT_VERSION:
            raise ValueError(f"format version must be {FORMAT_VERSION}, got {version}")
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


def _pack_bytes(x: Tensor) -> Tensor:
    return x.to(torch.int8).contiguous().view(torch.int32)


def _unpack_bytes(words: Tensor, signed: bool) -> Tensor:
    return words.contiguous().view(torch.int8 if signed else torch.uint8).int()


# A scale byte e stands for 2^((e - 160) / 8). These are the fraction bits of fp32 numbers: of 2^(i / 8), and of
# 2^((i + 1/2) / 8), above which a scale is rounded up. All arithmetic on scales is on integers, hence exact.
SCALE_EIGHTHS = (0, 759234, 1587184, 2490071, 3474675, 4548394, 5719293, 6996167)
SCALE_MIDDLES = (371395, 1164243, 2028850, 2971711, 3999908, 5121164, 6343903, 7677309)
SCALE_EXPONENT = 107  # of scale byte 0, biased as in fp32: 2^-20
SCALE_MAX = 254
POISON = 255  # the scale byte of a group that holds a NaN or an infinity


def scale_byte(x: Tensor, borders: tuple[int, ...]) -> Tensor:
    """The byte of scales ``x`` (float32, not negative), int32: nearest (SCALE_MIDDLES) or not below (SCALE_EIGHTHS)."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    steps = sum(((bits & 0x7FFFFF) > border).int() for border in borders)
    return (8 * ((bits >> 23) - SCALE_EXPONENT) + steps).clamp(0, SCALE_MAX)


def byte_scale(byte: Tensor) -> Tensor:
    """The scale that a byte (int32, up to SCALE_MAX) stands for, float32."""
    fraction = torch.tensor(SCALE_EIGHTHS, dtype=torch.int32, device=byte.device)[(byte & 7).long()]
    return (((byte >> 3) + SCALE_EXPONENT << 23) | fraction).view(torch.float32)


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


# The fitted quantiser. Groups lie along dim 0. Everything is one fp32 operation after the other, in the order written
# (no fused multiply-add), and sums have one order, so that every backend finds the same parameters.
SHRINKS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the whole range, about its middle
MOVES = (0.15, 0.07, -0.07, -0.15, 0.15, 0.07, -0.07, -0.15)  # of one end of the range, in parts of it
REFITS = 2
FEEDBACK_MAX = 4.0  # a larger factor counts as 0


def _sum(x: Tensor) -> Tensor:
    """Sum over dim 0, whose size is a multiple of 4: elements i, i + 4, ... one by one, then the four sums."""
    parts = x.unflatten(0, (-1, 4))
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return (total[0] + total[1]) + (total[2] + total[3])


def _fitted_code(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    code = ((x - zero) * (1.0 / scale)).round().clamp_min(0)
    return torch.minimum(code, levels)


def _fitted_error(x: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Tensor:
    difference = (zero + scale * _fitted_code(x, scale, zero, levels)) - x
    return _sum((weights * difference) * difference)


def fit_keys(x: Tensor, weights: Tensor, levels: Tensor, lift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale bytes, zero bytes (int32) and codes (float32) of groups of key elements, by weighted squared error.

    Both ends of the range are searched, beginning with those of the elements; then scale and zero are refitted to the
    codes by least squares. Every candidate is rounded to what can be stored before it is tried. A group without levels
    keeps its weighted mean.

    Args:
        x: ``[n, ...]`` float32, n a multiple of 4.
        weights: ``[n, ...]`` (or broadcastable) float32, positive.
        levels: ``[...]`` float32, the largest code; 0 for a channel without columns.
        lift: ``[...]`` float32, the stored scale (that of the two highest bits) in units of the codes' scale.
    """
    finite = x.isfinite().all(0)
    x = x.where(finite, 0.0).clamp(-PARAM_MAX, PARAM_MAX)
    weights = weights.expand_as(x)
    drop, most = 1.0 / lift, levels.clamp_min(1)
    total = _sum(weights)
    mean = _sum(weights * x) / total
    low = torch.where(levels > 0, x.amin(0) + 0.0, mean)
    high = torch.where(levels > 0, x.amax(0) + 0.0, mean)

    best_byte = best_zero_byte = torch.zeros_like(low, dtype=torch.int32)
    scale, zero, error = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)

    def offer(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal best_byte, best_zero_byte, scale, zero, error
        # The scale is large enough for the zero to be stored.
        byte = torch.maximum(
            scale_byte(new_scale * lift, SCALE_MIDDLES), scale_byte(new_zero.abs() * (8 / 127), SCALE_EIGHTHS)
        )
        top = byte_scale(byte)
        unit = top * 0.125
        zero_byte = (new_zero / unit).round().clamp(-127, 127)
        new_scale, new_zero = top * drop, zero_byte * unit
        new_error = _fitted_error(x, weights, new_scale, new_zero, levels)
        better = new_error < error
        best_byte, best_zero_byte = best_byte.where(~better, byte), best_zero_byte.where(~better, zero_byte.int())
        scale, zero, error = (
            scale.where(~better, new_scale),
            zero.where(~better, new_zero),
            error.where(~better, new_error),
        )

    offer((high - low) / most, low)
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    for part in SHRINKS:
        new_low, new_high = middle - half * part, middle + half * part
        offer((new_high - new_low) / most, new_low)
    for part in MOVES:
        span = levels * scale
        new_low = zero + span * part
        offer(((zero + span) - new_low) / most, new_low)
        span = levels * scale
        offer((span * (1.0 - part)) / most, zero)
    for _ in range(REFITS):
        code = _fitted_code(x, scale, zero, levels)
        mean_code = _sum(weights * code) / total
        off = code - mean_code
        weighted = weights * off
        variance, covariance = _sum(weighted * off), _sum(weighted * (x - mean))
        good = (variance > 1e-9) & (covariance > 0)
        new_scale = torch.where(good, covariance / torch.where(good, variance, 1.0), scale)
        offer(new_scale, mean - new_scale * mean_code)
    code = torch.where(finite, _fitted_code(x, scale, zero, levels), 0.0)
    return torch.where(finite, best_byte, POISON), torch.where(finite, best_zero_byte, 0), code


def fit_values(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale bytes (int32) and codes (float32) of groups of value elements: code c stands for scale * (c - levels / 2).

    Args:
        x: ``[n, ...]`` float32, n a multiple of 4.
        levels: the largest code.
    """
    ones, most = torch.ones_like(x), torch.full_like(x[0], levels)
    high = x.abs().amax(0)
    best = torch.zeros_like(high, dtype=torch.int32)
    scale, zero, error = torch.ones_like(high), torch.zeros_like(high), torch.full_like(high, torch.inf)

    def offer(new_scale: Tensor) -> None:
        nonlocal best, scale, zero, error
        byte = scale_byte(new_scale, SCALE_MIDDLES)
        new_scale = byte_scale(byte)
        new_zero = new_scale * (-0.5 * levels)
        new_error = _fitted_error(x, ones, new_scale, new_zero, most)
        better = new_error < error
        best = best.where(~better, byte)
        scale, zero, error = (
            scale.where(~better, new_scale),
            zero.where(~better, new_zero),
            error.where(~better, new_error),
        )

    for part in (1.0, 1.07, *SHRINKS):
        offer((high * part) / (most * 0.5))
    for _ in range(REFITS):
        off = _fitted_code(x, scale, zero, most) - 0.5 * levels
        along = _sum(off * x)
        offer(torch.where(along > 0, along / _sum(off * off), 0.0))
    return best, _fitted_code(x, scale, zero, most)


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
        scale_bytes, zero_bytes, codes = fit_keys(x, w, levels.squeeze(-2).expand(shape), lift)
        params = torch.cat([_pack_bytes(scale_bytes), _pack_bytes(zero_bytes)], -1)
        return codes.permute(1, 2, 3, 0, 4).int(), params
    scale, zero = _scale_and_zero(k, levels.clamp_min(1), dim=-2)
    mean = (_page_mean(k) + 0.0).clamp(-PARAM_MAX, PARAM_MAX).half().float()
    has_columns = levels > 0
    scale = torch.where(has_columns, scale, 0.0)
    zero = torch.where(has_columns | zero.isnan(), zero, mean)
    params = torch.cat([_pack_half(scale.squeeze(-2)), _pack_half(zero.squeeze(-2))], -1)
    return _codes(k, scale, zero, levels), params


def _fed_back(x: Tensor, scale: Tensor, levels: int, feedback: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Values after each has taken off what the errors of those before it in its page come to, and their codes.

    Args:
        x: ``[B, H, P, G, groups, Gv]`` float32, rotated.
        scale: ``[B, H, P, G, groups]``.
        levels: the largest code.
        feedback: ``[b, h, P, G, G]``, as for :func:`quantize`.
        counts: which groups have an error that counts, bool like ``scale``.
    """
    x, codes = x.clone(), torch.empty_like(x)
    factors = feedback.where(feedback.abs() <= FEEDBACK_MAX, 0.0)[..., None, None]
    scale = scale.unsqueeze(-1)
    zero, most = scale * (-0.5 * levels), torch.full_like(scale, levels)
    for t in range(x.shape[3]):
        own = x[:, :, :, t]
        code = _fitted_code(own, scale[:, :, :, t], zero[:, :, :, t], most[:, :, :, t])
        codes[:, :, :, t] = code = code.nan_to_num(0.0)  # large factors make numbers of any size, and more
        error = own - (zero[:, :, :, t] + scale[:, :, :, t] * code)
        error = error.where(counts[:, :, :, t].unsqueeze(-1), 0.0)
        x[:, :, :, t + 1 :] -= factors[:, :, :, t, t + 1 :] * error.unsqueeze(3)
    return x, codes


def _quantize_values(v: Tensor, fmt: PageFormat, feedback: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes ``[B, H, P, G, Dv]`` (int32) and packed parameters of values ``[B, H, P, G, groups, Gv]`` (float32)."""
    levels = 2**fmt.value_bits - 1
    if fmt.value_param_bits == 8:
        finite = v.isfinite().all(-1)
        x = hadamard(v.where(finite.unsqueeze(-1), 0.0).clamp(-PARAM_MAX, PARAM_MAX), fmt.hadamard_block)
        scale_bytes, codes = fit_values(x.movedim(-1, 0), levels)
        codes = codes.movedim(0, -1)
        if feedback is not None:
            # The scales that fit the values are not those that fit what becomes of them.
            factors = feedback.expand(*v.shape[:2], -1, -1).unflatten(2, (-1, fmt.page_tokens))
            corrected, _ = _fed_back(x, byte_scale(scale_bytes), levels, factors, finite)
            scale_bytes, _ = fit_values(corrected.movedim(-1, 0), levels)
            _, codes = _fed_back(x, byte_scale(scale_bytes), levels, factors, finite)
        scale_bytes = torch.where(finite, scale_bytes, POISON)
        codes = torch.where(finite.unsqueeze(-1), codes, 0.0)
        return codes.flatten(-2).int(), _pack_bytes(scale_bytes.transpose(-1, -2).flatten(-2))
    scale, zero = _scale_and_zero(v, levels, dim=-1)
    params = [_pack_half(p.squeeze(-1).transpose(-1, -2).flatten(-2)) for p in (scale, zero)]
    return _codes(v, scale, zero, levels).flatten(-2), torch.cat(params, -1)


def quantize(
    k: Tensor,
    v: Tensor,
    fmt: PageFormat,
    *,
    index: Tensor | None = None,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> Tensor:
    """Quantise tokens into pages (LogQuant section 4, in the page format of csrc/format.h).

    With 16-bit parameters, in fp32 from the exact input: ``zero = fp16(min)``, ``scale = fp16((max - min) / levels)``,
    ``code = clamp(round((x - zero) * (1 / scale)), 0, levels)``; keys per channel over a page's tokens, values per
    token over ``value_group`` channels. With 8-bit parameters :func:`fit_keys` and :func:`fit_values` search them, and
    values are rotated (:func:`logquant.hadamard.hadamard`). A group with a non-finite element becomes NaN.

    Args:
        k: keys ``[B, H, T, D]``, float32, float16 or bfloat16.
        v: values ``[B, H, T, Dv]``, same dtype.
        fmt: the page format.
        index: int32 ``[1 or B, N]``, the tokens to take, in order; all T without it. N is a multiple of G.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        key_weights: float32 ``[1 or B, 1 or H, N]``, how much an error of each token's key counts where parameters are
            fitted; a weight outside 2^-10 .. 2^10 counts as 1, as all do without it.
        value_feedback: float32 ``[1 or B, 1 or H, N, G]``, for values with 8-bit parameters: how much of a token's
            error each later token of its page takes off before it is rounded (logquant/feedback.py). Factors of
            earlier tokens are not read; one beyond +-4 counts as 0, as all do without it.

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
    code, key_params = _quantize_keys(k, fmt, columns, levels, key_weights)
    code = code.gather(-1, channel.unsqueeze(-2).expand(*code.shape[:-1], -1))
    code = (code >> (fmt.key_bits * digit.unsqueeze(-2)).int()) & (2**fmt.key_bits - 1)
    key_codes = pack_words(code, fmt.key_bits)

    code, value_params = _quantize_values(v, fmt, value_feedback)
    value_codes = pack_words(code.transpose(-1, -2), fmt.value_bits).transpose(-1, -2)  # [B, H, P, G*b/32, Dv]
    return torch.cat([key_codes.flatten(-2), key_params, value_codes.flatten(-2), value_params], -1)


def _unpack_params(words: Tensor, fmt: PageFormat, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero of keys (with the columns of each channel) or of values, float32, flat along the last dim."""
    if (fmt.value_param_bits if columns is None else fmt.key_param_bits) == 16:
        scale, zero = _unpack_half(words).unflatten(-1, (2, -1)).unbind(-2)
        return scale, zero
    if columns is None:
        byte = _unpack_bytes(words, signed=False)
        zero_steps: Tensor | float = -0.5 * (2**fmt.value_bits - 1)
    else:
        byte = _unpack_bytes(words[..., : words.shape[-1] // 2], signed=False)
        zero_steps = _unpack_bytes(words[..., words.shape[-1] // 2 :], signed=True).float()
    top = byte_scale(byte.clamp(max=SCALE_MAX))
    zero = zero_steps * (top if columns is None else top * 0.125)
    scale = top if columns is None else top * (1.0 / _lift(fmt, columns))
    return torch.where(byte == POISON, 0.0, scale), torch.where(byte == POISON, torch.nan, zero)


def dequantize(
    pages: Tensor, fmt: PageFormat, *, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
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
    channel, digit, columns = (t.unsqueeze(2).unsqueeze(2) for t in _columns(key_map, fmt, pages.device))
    key_codes, key_params, value_codes, value_params = pages.split(fmt.sections, -1)

    digits = unpack_words(key_codes.unflatten(-1, (fmt.page_tokens, -1)), fmt.key_bits)
    weighted = (digits << (fmt.key_bits * digit).int()).float()
    code = torch.zeros(*weighted.shape[:-1], fmt.head_dim, device=pages.device)
    code.scatter_add_(-1, channel.expand_as(weighted), weighted)
    scale, zero = (p.unsqueeze(3) for p in _unpack_params(key_params, fmt, columns.squeeze(2)))  # [B, H, P, 1, D]
    keys = (zero + scale * code).flatten(2, 3)

    rows = value_codes.unflatten(-1, (-1, fmt.value_dim)).transpose(-1, -2)  # [B, H, P, Dv, G*b/32]
    code = unpack_words(rows, fmt.value_bits).transpose(-1, -2).unflatten(-1, (-1, fmt.value_group)).float()
    params = (p.unflatten(-1, (-1, fmt.page_tokens)) for p in _unpack_params(value_params, fmt, None))
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
    *,
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
