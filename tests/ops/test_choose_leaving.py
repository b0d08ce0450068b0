"""The choice of the tokens that leave, on every backend: that of sorted lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant import LogQuantConfig, ops
from tests.helpers import emulated
from tests.helpers.backends import BACKENDS, EMULATED, on
from tests.helpers.strategies import seeds

backends = pytest.mark.parametrize("backend", BACKENDS)


def chosen(weight: list[float], first: int, last: int, count: int, ranks: list[int]) -> tuple[list[int], list[int]]:
    """What leaves and what stays of one row. Not-a-numbers are above all, and equal to each other."""

    def order(slot: int) -> tuple[bool, float]:
        is_nan = math.isnan(weight[slot])
        return is_nan, 0.0 if is_nan else weight[slot]

    out = sorted(sorted(range(first, last), key=order)[:count])
    leaving = []
    for page in range(0, count, len(ranks)):
        falling = sorted(out[page : page + len(ranks)], key=order, reverse=True)
        # A sort that is reversed keeps the order of equal ones.
        leaving += [falling[rank] for rank in ranks]
    return leaving, [slot for slot in range(len(weight)) if slot not in set(out)]


def weights(kind: str, rows: int, slots: int, random: torch.Generator) -> torch.Tensor:
    if kind == "ties":
        return torch.randint(0, 3, (rows, slots), generator=random).float()
    x = torch.randn(rows, slots, generator=random)
    if kind == "bits":  # of any float: denormal, infinite, not a number, either zero
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1e-45, 3e38])
        return torch.where(x > 0.5, x, special[torch.randint(0, len(special), (rows, slots), generator=random)])
    return x


@backends
@given(
    seed=seeds,
    rows=st.integers(0, 3),
    pages=st.integers(0, 3),
    page_tokens=st.sampled_from((1, 32, 64, 128)),
    before=st.integers(0, 5),
    others=st.integers(0, 300),
    after=st.integers(0, 70),
    kind=st.sampled_from(("different", "ties", "bits")),
)
def test_the_least_leave_in_pages(backend, seed, rows, pages, page_tokens, before, others, after, kind):
    random = torch.Generator().manual_seed(seed)
    count = pages * page_tokens
    last = before + count + others
    weight = weights(kind, rows, last + after, random)
    ranks = torch.randperm(page_tokens, generator=random).tolist()
    with on(backend):
        leaving, staying = ops.choose_leaving(weight, before, last, count, ranks)
    assert leaving.dtype == staying.dtype == torch.int32
    assert leaving.shape == (rows, count) and staying.shape == (rows, last + after - count)
    for row, left, stayed in zip(weight.tolist(), leaving.tolist(), staying.tolist(), strict=True):
        assert (left, stayed) == chosen(row, before, last, count, ranks)


@backends
def test_a_prompt_of_many_tokens(backend):
    weight = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    ranks = LogQuantConfig(fine_values=8).ranks
    with on(backend):
        leaving, staying = ops.choose_leaving(weight, 4, 2900, 2752, ranks)
    for row, left, stayed in zip(weight.tolist(), leaving.tolist(), staying.tolist(), strict=True):
        assert (left, stayed) == chosen(row, 4, 2900, 2752, list(ranks))


@backends
def test_rows_that_do_not_lie_side_by_side(backend):
    wide = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    with on(backend):
        got = ops.choose_leaving(wide.T, 4, 136, 64, range(64))
        want = ops.choose_leaving(wide.T.contiguous(), 4, 136, 64, range(64))
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(not EMULATED, reason="the emulated kernels need CUDA's headers")
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_whatever_order_threads_run_in(order):
    weight = weights("ties", 3, 700, torch.Generator().manual_seed(0))
    with emulated.machine(order=order):
        got = emulated.choose_leaving(weight, 4, 600, 128, range(64))
    assert all(map(torch.equal, got, ops.choose_leaving(weight, 4, 600, 128, range(64))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.randn(200)}, r"weight must have shape \[rows, slots\], got \[200\]"),
        ({"weight": torch.randn(2, 200).double()}, "weight must be Float, got Double"),
        ({"first": -1}, "first and last must be in order and between 0 and 200, got -1 and 136"),
        ({"first": 137}, "first and last must be in order and between 0 and 200, got 137 and 136"),
        ({"last": 201}, "first and last must be in order and between 0 and 200, got 4 and 201"),
        ({"count": 192}, "count must be a multiple of 64 of at most 132 slots, got 192"),
        ({"count": 65}, "count must be a multiple of 64 of at most 132 slots, got 65"),
        ({"count": -64}, "count must be a multiple of 64 of at most 132 slots, got -64"),
        ({"ranks": []}, "ranks must be of 1 to 128 tokens of a page, got 0"),
        ({"ranks": range(129), "count": 129}, "ranks must be of 1 to 128 tokens of a page, got 129"),
        ({"ranks": [0, 1, 1, 2]}, "ranks must hold each number below 4 once, got 1 in place 2"),
        ({"ranks": [0, 1, 2, 4]}, "ranks must hold each number below 4 once, got 4 in place 3"),
        ({"ranks": [0, 1, 2, -1]}, "ranks must hold each number below 4 once, got -1 in place 3"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"weight": torch.randn(2, 200), "first": 4, "last": 136, "count": 64, "ranks": range(64)}
    with pytest.raises(RuntimeError, match=message):
        ops.choose_leaving(**arguments | changes)
