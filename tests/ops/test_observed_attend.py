"""What the window's slots are given (``ops.observed_attend``), on every backend, against a plain statement of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant import ops
from logquant.format import DTYPES, PageFormat
from logquant.ops import reference
from tests.helpers import emulated
from tests.helpers.backends import BACKENDS, CPU_SETS, EMULATED, on
from tests.helpers.memo import by_content
from tests.helpers.problems import TENSOR_FORMATS, Problem, name_of, problem_of
from tests.helpers.strategies import dtypes, formats, seeds

backends = pytest.mark.parametrize("backend", BACKENDS)
# Kernels on tensor cores know a window's sum of weights rounded to the model's dtype.
ROUNDED = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@by_content
def plain(
    q: Tensor,
    window_k: Tensor,
    scale: float,
    packed: int,
    attention: Tensor,
    softcap: float = 0.0,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Each query's softmax over the window's slots that it sees, squared, and what was there before."""
    batch, heads, queries, _ = q.shape
    kv_heads, slots = window_k.shape[1:3]
    total = torch.zeros(batch, kv_heads, slots, dtype=torch.float64)
    total[..., : attention.shape[2]] = attention
    for b, head, i in product(range(batch), range(heads), range(queries)):
        kv_head = head // (heads // kv_heads)

        def of_row(x: Tensor, b: int = b) -> Tensor:
            return x[b % x.shape[0]]

        position = torch.arange(packed, packed + slots) if positions is None else of_row(positions)[packed:].long()
        seen = position >= 0
        if lengths is not None:
            seen = seen & (torch.arange(slots) < of_row(lengths)[1])
        if query_positions is not None:
            seen = seen & (position <= of_row(query_positions)[i])
        score = scale * (window_k[b, kv_head].double() @ q[b, head, i].double())
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            row = mask.expand(batch, heads, queries, -1)[b, head, i]
            seen = seen & (position < len(row))
            value = row[position.clamp(0, len(row) - 1)]
            seen = seen & (value if mask.dtype == torch.bool else value > -1e30)
            score = score if mask.dtype == torch.bool else score + value.double()
        total[b, kv_head, seen] += score[seen].softmax(0).square()
    return total


def check(problem: Problem, backend: str, slots: int, **options: Any) -> Tensor:
    """``slots``: of the window that something has been given before. Returns what they have been given."""
    batch, heads, exact, _ = problem.window_k.shape
    attention = torch.rand(batch, heads, slots, generator=torch.Generator().manual_seed(slots))
    before = attention.clone()
    with on(backend):
        out, lse, now = problem.call(ops.observed_attend, problem.q, attention=attention, **options)
    assert torch.equal(attention, before)
    for got, want in zip((out, lse), problem.run(backend, **options), strict=True):
        assert torch.equal(got, want), "the same bits as without"
    assert now.shape == (batch, heads, exact) and now.dtype == torch.float32
    options.pop("sinks", None)
    packed = problem.slots - exact
    want = plain(problem.q, problem.window_k, problem.scale, packed, attention, **options)
    tolerance = ROUNDED[problem.dtype] if backend in ("emulated", "cuda") else 1e-3
    torch.testing.assert_close(now.double(), want, rtol=tolerance, atol=1e-6)
    return now


def options_of(problem: Problem, seed: int) -> dict[str, Any]:
    """Some of what hides slots or changes scores."""
    random = torch.Generator().manual_seed(seed)
    batch, heads, queries, _ = problem.q.shape
    exact = problem.window_k.shape[2]
    pages = (problem.slots - exact) // problem.fmt.page_tokens
    order = torch.randperm(problem.slots, generator=random).int()[None]
    order[:, ::7] = -1
    seen = torch.rand(batch, 1, queries, problem.slots, generator=random) < 0.5
    bias = torch.randn(1, heads, 1, problem.slots, generator=random).masked_fill(~seen[:1, :, :1], -torch.inf)
    every = {
        "softcap": 5.0,
        "sinks": torch.randn(heads, generator=random),
        "mask": (seen, bias, bias.half())[seed % 3],
        "positions": order,
        "query_positions": torch.randint(-1, problem.slots, (batch, queries), generator=random).int(),
        "lengths": torch.tensor([[pages, exact], [pages // 2, exact // 2]], dtype=torch.int32)[:batch],
    }
    chosen = torch.rand(len(every), generator=random) < 0.4
    return {name: value for (name, value), taken in zip(every.items(), chosen, strict=True) if taken}


@backends
@given(
    fmt=formats() | st.sampled_from(TENSOR_FORMATS),
    dtype=dtypes,
    seed=seeds,
    pages=st.integers(0, 3),
    exact=st.integers(0, 150),
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4, 8]),
    queries=st.integers(1, 5),
    sharpness=st.sampled_from([1.0, 8.0]),
)
def test_what_slots_are_given(backend, fmt, dtype, seed, pages, exact, batch, group, queries, sharpness):
    shape = {"batch": batch, "group": group, "queries": queries, "dtype": dtype, "sharpness": sharpness}
    problem = Problem(fmt, packed=pages * fmt.page_tokens, exact=exact if pages else exact + 1, seed=seed, **shape)
    check(problem, backend, seed % (problem.window_k.shape[2] + 1), **options_of(problem, seed))


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_at_once(backend, dtype):
    problem = problem_of(PageFormat(64), dtype, batch=2, queries=3, exact=70)
    seeds_of_options = [options_of(problem, seed) for seed in range(20)]
    everything = {name: value for options in seeds_of_options for name, value in options.items()}
    assert len(everything) == 6
    check(problem, backend, 30, **everything)


@backends
@pytest.mark.parametrize("slots", [0, 1, 300])
def test_a_window_of_several_splits(backend, slots):
    """And row blocks, on the CPU; of other kernels on CUDA where there are many queries (prefill)."""
    for queries in (3, 40):
        problem = Problem(
            PageFormat(128), packed=5 * 64, exact=700, group=3, queries=queries, dtype=torch.float16, seed=3
        )
        if backend == "emulated" and queries == 40:
            assert problem.call(emulated.attend_path, problem.q) == "prefill"
        check(problem, backend, slots)
        causal = torch.arange(problem.slots - queries, problem.slots, dtype=torch.int32)[None]
        check(problem, backend, slots, query_positions=causal)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pages_do_not_count(backend, dtype):
    """Not even where all weights of the window, beside theirs, are 0."""
    problem = problem_of(PageFormat(64), dtype, exact=40, group=1)
    with_pages = check(problem, backend, 0)
    k, v = torch.full((1, 2, 320, 64), 3.0), torch.randn(1, 2, 320, 64)
    problem.q = problem.q.abs() + 1
    problem.pages, problem.scale = reference.quantize(k, v, problem.fmt), 4.0
    assert (check(problem, backend, 0).sum(-1) > 1 / 40).all()
    problem = problem_of(PageFormat(64), dtype, exact=40, group=1)
    problem.pages, problem.slots = problem.pages[:, :, :0], 40
    torch.testing.assert_close(check(problem, backend, 0), with_pages, rtol=2e-3, atol=1e-6)


@backends
def test_who_sees_nothing_gives_nothing(backend):
    problem = Problem(PageFormat(64), packed=128, exact=20, batch=2)
    mask = torch.ones(2, 1, 1, problem.slots, dtype=torch.bool)
    mask[1, ..., 128:] = False  # of the window
    assert not check(problem, backend, 0, mask=mask)[1].any()
    mask[1] = False
    assert not check(problem, backend, 0, mask=mask)[1].any()
    given_before = check(problem, backend, 20, mask=mask)[1]
    assert torch.equal(given_before, torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(20))[1])


@backends
def test_without_a_window(backend):
    assert check(Problem(PageFormat(64), packed=128, exact=0), backend, 0).shape == (1, 2, 0)


@backends
def test_a_nan_is_given_to_nobody_who_is_not_seen(backend):
    problem = Problem(PageFormat(64), packed=64, exact=20, group=1, heads=1)
    problem.q[0, 0, 0, 3] = torch.nan
    mask = torch.ones(1, 1, 1, problem.slots, dtype=torch.bool)
    mask[..., 70:] = False
    with on(backend):
        now = problem.call(ops.observed_attend, problem.q, attention=torch.zeros(1, 1, 0), mask=mask)[2]
    assert now[..., :6].isnan().all() and not now[..., 6:].any()


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_without_queries_nothing_is_added_and_the_result_is_new(backend):
    problem = Problem(PageFormat(64), packed=64, exact=20)
    attention = torch.rand(1, 2, 20)
    with on(backend):
        for slots in (20, 7):
            none = problem.q[:, :, :0]
            now = problem.call(ops.observed_attend, none, attention=attention[..., :slots])[2]
            assert torch.equal(now[..., :slots], attention[..., :slots]) and not now[..., slots:].any()
            assert now.data_ptr() != attention.data_ptr()


@pytest.mark.parametrize("backend", ["compiled", *EMULATED])
def test_reads_strided_attention(backend):
    problem = Problem(PageFormat(64), packed=64, exact=20)
    store = torch.rand(1, 2, 40)
    wants = []
    with on(backend):
        for attention in (store[..., :20], store[..., :20].contiguous(), store[..., :20].mT.contiguous().mT):
            wants.append(problem.call(ops.observed_attend, problem.q, attention=attention)[2])
    assert torch.equal(wants[0], wants[1]) and torch.equal(wants[0], wants[2])


@pytest.mark.parametrize("backend", CPU_SETS)
def test_does_not_depend_on_the_number_of_threads(backend):
    problem = Problem(PageFormat(128), packed=20 * 64, exact=1500, heads=1, group=4, queries=5, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(check(problem, backend, 1000))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not EMULATED, reason="needs CUDA's headers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", TENSOR_FORMATS, ids=name_of)
def test_on_tensor_cores(fmt, dtype):
    """Every compiled format, of up to 8 query rows and of up to 16, and in every order of threads."""
    for shape in ({"group": 3}, {"group": 4, "queries": 3, "exact": 83}):
        problem = problem_of(fmt, dtype, packed=fmt.page_tokens, **shape)
        assert problem.call(emulated.attend_path, problem.q) == "tensor"
        results = []
        for order in emulated.ORDERS:
            with emulated.machine(order=order, seed=7):
                results.append(check(problem, "emulated", 30))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(not EMULATED, reason="needs CUDA's headers")
@pytest.mark.parametrize("exact", [100, 300])
def test_costs_four_bytes_a_slot_and_row_and_no_launch(exact):
    """Scores of the window are written and read once; blocks of 256 slots join the last kernel."""

    def counted(attention: Tensor | None) -> dict[str, int]:
        problem = problem_of(PageFormat(128), torch.float16, heads=1, exact=exact, group=4)
        emulated.counters()
        problem.call(emulated.attend, problem.q, attention=attention)
        floats = problem.call(emulated.attend_workspace, problem.q, attention=attention)
        return {**emulated.counters(), "workspace": floats}

    without, with_it = counted(None), counted(torch.zeros(1, 1, exact))
    assert with_it["workspace"] == without["workspace"] + 4 * exact
    assert with_it["blocks"] == without["blocks"] + -(-exact // 256)
    for name in ("mma", "async_bytes", "load_bytes"):
        assert with_it[name] == without[name], name
