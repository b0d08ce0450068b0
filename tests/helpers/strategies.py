"""Hypothesis strategies and random inputs that the tests share."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from logquant.format import BITS, DTYPES, PAGE_TOKENS, PARAM_BITS, PageFormat

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)
COMMON_DIMS = (16, 48, 64, 80, 96, 112, 128, 192, 256)


@st.composite
def formats(draw: st.DrawFn, searched: bool = True) -> PageFormat:
    """Any valid page format with head dimensions up to 256, with and without key columns; plain unless ``searched``."""
    head_dim, value_dim = draw(st.sampled_from(COMMON_DIMS)), draw(st.sampled_from(COMMON_DIMS))
    key_bits = draw(st.sampled_from(BITS))
    columns = head_dim
    if draw(st.booleans()):
        columns = 16 * draw(st.integers(1, head_dim * (8 // key_bits) // 16))
    groups = [g for g in range(16, value_dim + 1, 16) if value_dim % g == 0]
    param_bits = st.sampled_from(PARAM_BITS)
    fmt = PageFormat(
        head_dim,
        value_dim,
        draw(st.sampled_from(PAGE_TOKENS)),
        key_bits,
        draw(st.sampled_from(BITS)),
        columns,
        draw(st.sampled_from(groups)),
        draw(param_bits) if searched else 16,
        draw(param_bits) if searched else 16,
    )
    if searched and value_dim % 32 == 0 and draw(st.integers(0, 3)) == 3:
        group = fmt.value_group if fmt.value_group % 32 == 0 else 0
        fine_values = draw(st.sampled_from([4, 8])) if value_dim % 64 == 0 else 8
        return replace(
            fmt, page_tokens=64, value_bits=2, value_group=group, value_param_bits=8, fine_values=fine_values
        )
    return fmt


def tokens(
    fmt: PageFormat, seed: int, *, batch: int, heads: int, count: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys ``[batch, heads, count, D]`` with outlier channels, and values ``[batch, heads, count, Dv]``."""
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, heads, count, fmt.head_dim, generator=random)
    k = k * torch.rand(batch, heads, 1, fmt.head_dim, generator=random).mul(6).exp2() / 8
    k = k + torch.randn(batch, heads, 1, fmt.head_dim, generator=random)
    v = torch.randn(batch, heads, count, fmt.value_dim, generator=random)
    return k.to(dtype), v.to(dtype)


def key_weights(seed: int, *, batch: int, heads: int, count: int) -> Tensor | None:
    """Weights of key errors ``[batch, heads, count]``, now and then none, or some that are not valid."""
    random = torch.Generator().manual_seed(seed)
    if seed % 4 == 0:
        return None
    weights = torch.randn(batch if seed % 3 else 1, heads, count, generator=random).mul(2).exp()
    if seed % 4 == 1:
        weights[..., ::7], weights[..., 1::11] = torch.nan, 0.0
    return weights


def value_feedback(fmt: PageFormat, seed: int, *, batch: int, heads: int, count: int) -> Tensor | None:
    """Factors ``[batch, heads, count, G]``, now and then none, or some that are not valid; none for plain formats."""
    if fmt.value_param_bits == 16 or seed % 4 == 2:
        return None
    random = torch.Generator().manual_seed(seed)
    factors = torch.randn(batch if seed % 3 else 1, heads, count, fmt.page_tokens, generator=random) * 0.2
    if seed % 4 == 1:
        factors[..., ::7, :], factors[..., ::11], factors[..., 1::13] = torch.nan, 5.0, -torch.inf
    return factors


def column_map(fmt: PageFormat, seed: int, *, batch: int, heads: int) -> Tensor:
    """A random column map ``[batch, heads, C]``: every channel gets 0 or more columns, in random order."""
    random = torch.Generator().manual_seed(seed)
    most = 8 // fmt.key_bits
    rows = []
    for _ in range(batch * heads):
        # Each of most * D possible columns is a place; the first C of a shuffle are taken.
        places = torch.randperm(fmt.head_dim * most, generator=random)[: fmt.key_columns] % fmt.head_dim
        seen = [0] * fmt.head_dim
        entries = []
        for channel in places.tolist():
            entries.append(4 * channel + seen[channel])
            seen[channel] += 1
        rows.append(torch.tensor(entries, dtype=torch.int16))
    return torch.stack(rows).view(batch, heads, -1)
