"""Which channels get columns: against plain loops that say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant import ops
from logquant.format import BITS, PageFormat
from logquant.ops import reference
from logquant.quantizer import columns
from tests.helpers.strategies import column_map, seeds


def greedy(score: list[float], count: int, distortions: tuple[float, ...]) -> list[int]:
    """One column after the other to the channel where it takes off most."""
    given = [0] * len(score)
    for _ in range(count):
        gains = [
            s * (distortions[n] - distortions[n + 1]) if n + 1 < len(distortions) else -1.0
            for s, n in zip(score, given, strict=True)
        ]
        given[gains.index(max(gains))] += 1
    return given


@given(seed=seeds, columns_of_16=st.integers(1, 12))
def test_columns_go_where_they_gain_most(seed, columns_of_16):
    fmt = PageFormat(64, key_columns=16 * columns_of_16)
    score = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(seed)).mul(3).exp()
    entries = columns.allocate(score, fmt)
    assert entries.dtype == torch.int16 and entries.shape == (1, 2, fmt.key_columns)
    for head in range(2):
        row = entries[0, head].tolist()
        assert row == sorted(set(row))
        want = greedy((score[0, head] / score[0, head].max()).tolist(), fmt.key_columns, columns.DISTORTIONS[2])
        assert [sum(e >> 2 == c for e in row) for c in range(64)] == want
        assert all(e & 3 == 0 or e - 1 in row for e in row), "digits of a channel count from 0"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("score", [0.0, torch.nan, torch.inf, 1.0])
def test_any_score_gives_a_map_that_the_operators_take(bits, score):
    for per_dim in (1, 8 // bits):
        fmt = PageFormat(16, key_bits=bits, key_columns=16 * per_dim, key_param_bits=8)
        scores = torch.full((1, 1, 16), score)
        scores[..., 3] = 2.0
        k = torch.randn(1, 1, 64, 16)
        for key_map in (columns.allocate(scores, fmt), columns.default_map(fmt, 1, 1, k.device)):
            pages = ops.quantize(k, k, fmt, key_map=key_map)
            assert torch.equal(pages, reference.quantize(k, k, fmt, key_map=key_map))


def test_variances_are_those_within_spans():
    keys = torch.randn(1, 2, 150, 16) + torch.arange(150).view(1, 1, -1, 1) // 64 * 100
    want = torch.stack([keys[:, :, s : s + 64].var(2, correction=0) for s in (0, 64)]).mean(0)
    assert torch.allclose(columns.variances(keys, 64), want)
    assert torch.allclose(columns.variances(keys[:, :, :50], 64), keys[:, :, :50].var(2, correction=0))


def test_columns_lower_the_error_of_scores():
    """What they are for: channels that queries look at hold a spread of values, and get the bits."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 256, 64) * torch.linspace(-3, 3, 64).exp2()
    q = torch.randn(1, 1, 100, 64) * torch.linspace(-2, 1, 64).exp2()
    fmt = PageFormat(64, key_columns=64, key_param_bits=8)
    score = columns.variances(k, 64) * q.square().mean(2)
    errors = []
    for key_map in (columns.allocate(score, fmt), None, column_map(fmt, 1, batch=1, heads=1)):
        restored, _ = reference.dequantize(reference.quantize(k, k, fmt, key_map=key_map), fmt, key_map=key_map)
        errors.append(((restored - k) @ q.mT).square().mean().item())
    assert errors[0] < 0.5 * errors[1] < errors[2]
