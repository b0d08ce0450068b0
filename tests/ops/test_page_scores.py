"""Scores of pages on every backend against the reference; who may not ask for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant import ops
from logquant.format import PageFormat
from logquant.ops import reference
from logquant.recall.index import PageIndex
from tests.helpers.backends import BACKENDS, on
from tests.helpers.memo import by_content
from tests.helpers.problems import Problem
from tests.helpers.strategies import dtypes, formats, seeds

backends = pytest.mark.parametrize("backend", BACKENDS)
page_scores = by_content(reference.page_scores)
LARGEST = torch.finfo(torch.float32).max


def index_of(problem: Problem) -> PageIndex:
    keys, _ = ops.dequantize(problem.pages, problem.fmt, key_map=problem.key_map)
    return PageIndex.of(keys, problem.fmt.page_tokens)


def run(backend: str, problem: Problem, index: PageIndex | None = None) -> Tensor:
    means = {} if index is None else {"means": index.means, "mean_scales": index.scales}
    with on(backend):
        return ops.page_scores(problem.q, problem.pages, problem.fmt, scale=0.2, key_map=problem.key_map, **means)


@backends
@given(
    fmt=formats(),
    dtype=dtypes,
    seed=seeds,
    batch=st.integers(1, 2),
    group=st.integers(1, 9),
    queries=st.integers(1, 3),
    pages=st.sampled_from((1, 5, 67)),
    means=st.booleans(),
)
def test_page_scores(backend, fmt, dtype, seed, batch, group, queries, pages, means):
    pages = pages if fmt.head_dim < 80 else min(pages, 5)
    problem = Problem(
        fmt,
        packed=pages * fmt.page_tokens,
        exact=1,
        batch=batch,
        group=group,
        queries=queries,
        dtype=dtype,
        seed=seed,
    )
    index = index_of(problem) if means else None
    got = run(backend, problem, index)
    options = (index.means, index.scales) if index else ()
    want = page_scores(problem.q, problem.pages, fmt, 0.2, problem.key_map, *options)
    assert got.dtype == torch.float32 and got.shape == want.shape == (*problem.q.shape[:3], pages)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@backends
@pytest.mark.parametrize("means", [False, True])
def test_views_and_pages_with_room_to_spare(backend, means):
    """As a cache has them: the first pages of a larger store, means likewise, queries that are no copy."""
    problem = Problem(PageFormat(64, key_param_bits=8, value_param_bits=8), packed=640, exact=1, batch=2, queries=3)
    index = index_of(problem)
    want = run(backend, problem, index if means else None)[..., :7]
    problem.pages = problem.pages[:, :, :7]
    problem.q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    got = run(backend, problem, PageIndex(*(x[:, :, :7] for x in index)) if means else None)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("param_bits", [8, 16])
def test_what_is_no_number_scores_as_the_largest(backend, param_bits):
    fmt = PageFormat(64, key_param_bits=param_bits, value_param_bits=param_bits)
    k = torch.randn(1, 1, 192, 64, generator=torch.Generator().manual_seed(0))
    k[0, 0, 70, 3], k[0, 0, 190, 5] = torch.nan, torch.inf
    q = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    index = PageIndex.of(k, 64)
    with on(backend):
        pages = ops.quantize(k, k.nan_to_num(0.0, 0.0), fmt)
        for means in ({}, {"means": index.means, "mean_scales": index.scales}):
            scores = ops.page_scores(q, pages, fmt, scale=1.0, **means)
            assert (scores[..., 1:] == LARGEST).all() and (scores[..., 0].abs() < 1e3).all()


@backends
def test_scores_beyond_the_largest_number_stay_finite(backend):
    problem = Problem(PageFormat(64), packed=128, exact=1, seed=3)
    problem.q = problem.q.sign() * 3e38
    scores = run(backend, problem)
    assert scores.isfinite().all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(1, 4, 1, 32)}, "q must have shape"),
        ({"q": torch.randn(1, 3, 1, 64)}, "q must have a multiple of the pages' 2 heads"),
        ({"q": torch.randn(2, 4, 1, 64)}, "pages must have q's batch size 2, got 1"),
        ({"q": torch.randn(1, 4, 1, 64).double()}, "q must be float32, float16 or bfloat16"),
        ({"pages": torch.zeros(1, 2, 2, 5, dtype=torch.int32)}, "pages must have shape"),
        ({"scale": torch.inf}, "scale must be finite, got inf"),
        ({"means": torch.zeros(1, 2, 2, 64, dtype=torch.int8)}, "means and mean_scales must be given together"),
        (
            {"means": torch.zeros(1, 2, 3, 64, dtype=torch.int8), "mean_scales": torch.zeros(1, 2, 2)},
            r"means must have shape \[1, 2, 2, 64\], got \[1, 2, 3, 64\]",
        ),
        (
            {"means": torch.zeros(1, 2, 2, 64), "mean_scales": torch.zeros(1, 2, 2)},
            "means must be Char, got Float",
        ),
        (
            {"means": torch.zeros(1, 2, 2, 64, dtype=torch.int8), "mean_scales": torch.zeros(1, 2, 2).half()},
            "mean_scales must be Float, got Half",
        ),
    ],
)
def test_bad_arguments(backend, changes, message):
    fmt = PageFormat(64)
    arguments = {
        "q": torch.randn(1, 4, 1, 64),
        "pages": torch.zeros(1, 2, 2, fmt.words, dtype=torch.int32),
        "scale": 1.0,
    }
    with on(backend), pytest.raises(RuntimeError, match=message):
        ops.page_scores(**arguments | changes, fmt=fmt)


def test_nothing_in_nothing_out():
    fmt = PageFormat(64)
    for batch, queries, pages in ((0, 1, 2), (1, 0, 2), (1, 1, 0)):
        q = torch.randn(batch, 4, queries, 64)
        empty = torch.zeros(batch, 2, pages, fmt.words, dtype=torch.int32)
        assert ops.page_scores(q, empty, fmt, scale=1.0).shape == (batch, 4, queries, pages)
