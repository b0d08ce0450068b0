"""The choice of pages on every backend: that of sorted lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant import ops
from tests.helpers.backends import BACKENDS, on
from tests.helpers.strategies import seeds

backends = pytest.mark.parametrize("backend", BACKENDS)


def votes(rows: list[list[float]]) -> list[float]:
    """The logarithm of each page's mean share, in exact enough arithmetic: shares may be as small as they like."""
    shares = []
    for row in rows:
        top = max(row)
        total = top + math.log(math.fsum(math.exp(x - top) for x in row))
        shares.append([x - total for x in row])
    found = []
    for page in zip(*shares, strict=True):
        top = max(page)
        found.append(top + math.log(math.fsum(math.exp(x - top) for x in page)))
    return found


def best(votes: list[float], count: int, among: list[int]) -> list[int] | None:
    """The ``count`` pages with the most votes ``among`` some; None if that is a matter of rounding errors."""
    ranked = sorted(among, key=lambda page: -votes[page])
    if 0 < count < len(ranked) and votes[ranked[count - 1]] - votes[ranked[count]] < 1e-3:
        return None
    return ranked[:count]


@backends
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 5),
    queries=st.integers(1, 3),
    pages=st.integers(1, 70),
    two=st.booleans(),
    sharpness=st.sampled_from((1.0, 300.0)),
)
def test_pages_with_the_highest_votes(backend, seed, batch, heads, group, queries, pages, two, sharpness):
    random = torch.Generator().manual_seed(seed)
    scores, others = (sharpness * torch.randn(batch, heads * group, queries, pages, generator=random) for _ in range(2))
    used = torch.randint(1, pages + 1, (batch,), generator=random, dtype=torch.int32) if seed % 2 else None
    own = torch.full((batch,), pages) if used is None else used
    shape = batch if seed % 3 else 1, queries if seed % 5 else 1
    counts = torch.randint(0, pages + 1, shape, generator=random, dtype=torch.int32)
    most = int(counts.max())
    options = {"others": others if two else None, "used": used}
    with on(backend):
        got = ops.choose_pages(scores, counts, heads, most, **options)
    assert got.dtype == torch.int32 and got.shape == (batch, heads, queries, most)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                count = min(int(counts.expand(batch, queries)[b, i]), int(own[b]))
                of_head = slice(h * group, h * group + group)
                every = list(range(int(own[b])))
                want = best(
                    votes(scores[b, of_head, i, : own[b]].double().tolist()), (count + 1) // 2 if two else count, every
                )
                if two and want is not None:
                    left = [page for page in every if page not in want]
                    second = best(votes(others[b, of_head, i, : own[b]].double().tolist()), count // 2, left)
                    want = None if second is None else want + second
                if want is not None:
                    assert got[b, h, i].tolist() == sorted(want) + [pages - 1] * (most - count)


@backends
def test_a_page_of_the_largest_score_is_chosen(backend):
    """As page_scores gives where there is a NaN, in any of the query heads."""
    scores = torch.randn(1, 4, 1, 9, generator=torch.Generator().manual_seed(0))
    scores[0, 1, 0, 7] = torch.finfo(torch.float32).max
    with on(backend):
        for others in (None, scores):
            got = ops.choose_pages(scores, torch.tensor([[2]], dtype=torch.int32), 2, 2, others=others)
            assert 7 in got[0, 0, 0]


@backends
def test_scores_as_far_apart_as_can_be(backend):
    """Differences of scores may overflow: a page of the least score in every query head is still the last one."""
    scores = torch.randn(1, 2, 1, 21, generator=torch.Generator().manual_seed(0))
    largest = torch.finfo(torch.float32).max
    scores[:, :, :, 3], scores[0, 1, 0, 7] = -largest, largest
    with on(backend):
        got = ops.choose_pages(scores, torch.tensor([[20]], dtype=torch.int32), 1, 20)
    assert got.flatten().tolist() == [page for page in range(21) if page != 3]


@backends
def test_of_equal_pages_as_many_as_are_wanted(backend):
    scores = torch.zeros(1, 4, 1, 37)
    with on(backend):
        got = ops.choose_pages(scores, torch.tensor([[11]], dtype=torch.int32), 2, 11, others=scores)
    for row in got.flatten(0, 2).tolist():
        assert len(set(row)) == 11
        assert not backend.startswith("cpu-") or row == list(range(11))  # torch does not say which


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.randn(4, 1, 9)}, "scores must have shape"),
        ({"scores": torch.randn(1, 4, 1, 9).double()}, "scores must be Float, got Double"),
        ({"heads": 3}, "scores must be of a multiple of 3 query heads, got 4"),
        ({"scores": torch.randn(1, 0, 1, 9)}, "scores must be of a multiple of 2 query heads, got 0"),
        ({"most": 10}, "most must be at most 9 pages, got 10"),
        ({"counts": torch.tensor([[2]])}, "counts must be Int, got Long"),
        ({"counts": torch.tensor([[2, 2]], dtype=torch.int32)}, "counts must have shape"),
        ({"others": torch.randn(1, 4, 1, 8)}, r"others must have shape \[1, 4, 1, 9\], got \[1, 4, 1, 8\]"),
        ({"used": torch.tensor([1, 2], dtype=torch.int32)}, r"used must have shape \[1\], got \[2\]"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "scores": torch.randn(1, 4, 1, 9),
        "counts": torch.tensor([[2]], dtype=torch.int32),
        "heads": 2,
        "most": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.choose_pages(**arguments | changes)
