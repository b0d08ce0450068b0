"""Every operator on every backend against logquant/ops/reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from logquant import LogQuantConfig, ops
from logquant.cache.sizes import packed_tokens
from logquant.format import BITS, DTYPES, PageFormat
from logquant.ops import reference
from logquant.rule import COUNTED, evicted_slots
from tests.helpers import emulated
from tests.helpers.backends import BACKENDS, CPU_SETS, EMULATED, on
from tests.helpers.memo import by_content
from tests.helpers.problems import Problem, key_map_of, rms
from tests.helpers.strategies import column_map, dtypes, formats, key_weights, seeds, tokens, value_feedback

backends = pytest.mark.parametrize("backend", BACKENDS)
quantize, dequantize = by_content(reference.quantize), by_content(reference.dequantize)


# ------------------------------------------------------------------------------------------- quantize, dequantize
@backends
@given(
    fmt=formats(), dtype=dtypes, seed=seeds, batch=st.integers(1, 2), heads=st.integers(1, 3), pages=st.integers(1, 3)
)
def test_quantize_and_dequantize_bit_for_bit(backend, fmt, dtype, seed, batch, heads, pages):
    k, v = tokens(fmt, seed, batch=batch, heads=heads, count=pages * fmt.page_tokens, dtype=dtype)
    key_map = key_map_of(fmt, seed, batch, heads)
    options = {
        "key_map": key_map,
        "key_weights": key_weights(seed, batch=batch, heads=heads, count=k.shape[2]),
        "value_feedback": value_feedback(fmt, seed, batch=batch, heads=heads, count=k.shape[2]),
    }
    with on(backend):
        packed = ops.quantize(k, v, fmt, **options)
        restored = ops.dequantize(packed, fmt, dtype=dtype, key_map=key_map)
    expected = quantize(k, v, fmt, **options)
    assert torch.equal(packed, expected)
    for got, want in zip(restored, dequantize(expected, fmt, dtype=dtype, key_map=key_map), strict=True):
        assert torch.equal(got, want)


@backends
@given(fmt=formats(), seed=seeds, rows=st.integers(1, 2))
def test_quantize_takes_the_indexed_tokens(backend, fmt, seed, rows):
    k, v = tokens(fmt, seed, batch=2, heads=2, count=3 * fmt.page_tokens)
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(0, k.shape[2], (rows, fmt.page_tokens), generator=random, dtype=torch.int32)
    options = {
        "index": index,
        "key_map": column_map(fmt, seed, batch=1, heads=1),
        "key_weights": key_weights(seed, batch=2, heads=1, count=fmt.page_tokens),
        "value_feedback": value_feedback(fmt, seed, batch=2, heads=1, count=fmt.page_tokens),
    }
    with on(backend):
        packed = ops.quantize(k, v, fmt, **options)
    assert torch.equal(packed, quantize(k, v, fmt, **options))


SEARCHED = PageFormat(64, key_columns=80, key_param_bits=8, value_param_bits=8)
FINE = LogQuantConfig(fine_values=8).page_format(64)
FINE_4 = LogQuantConfig(fine_values=4).page_format(64)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [PageFormat(64), SEARCHED, FINE, FINE_4], ids=str)
def test_quantize_extreme_values(backend, dtype, fmt):
    """Infinities, NaNs, signed zeros, subnormals, saturation: still bit for bit."""
    key_map = None if fmt.key_columns == 64 else column_map(fmt, 0, batch=1, heads=1)
    random = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 256, 64, generator=random)
    v = k.flip(2).clone()
    for x in (k, v):
        flat = x.view(-1)
        flat[::701] = torch.nan
        flat[3::907] = torch.inf
        flat[5::977] = -torch.inf
        x[0, 1, :64] = 0.0
        x[0, 1, :64:2] = -0.0
        x[0, 1, 64:128] *= 1e-7
        x[0, 1, 128:192] *= 3e4
        x[0, 1, 192:] = x[0, 1, 192:].sign() * (1e38 if dtype != torch.float16 else 6e4)
    k, v = k.to(dtype), v.to(dtype)
    options = {"key_map": key_map, "value_feedback": value_feedback(fmt, 3, batch=1, heads=2, count=256)}
    with on(backend):
        packed = ops.quantize(k, v, fmt, **options)
    assert torch.equal(packed, quantize(k, v, fmt, **options))


@backends
@pytest.mark.parametrize("factor", [4.0, -4.0, 2.0])
@pytest.mark.parametrize("fmt", [SEARCHED, FINE, FINE_4, PageFormat(128, 128, 128, 2, 4, 128, 32, 8, 8)], ids=str)
def test_feedback_without_bounds_stays_bit_for_bit(backend, fmt, factor):
    """Factors that make errors grow until fp32 overflows."""
    count = 2 * fmt.page_tokens
    k, v = tokens(fmt, 0, batch=1, heads=2, count=count)
    options = {"value_feedback": torch.full((1, 2, count, fmt.page_tokens), factor)}
    if fmt.needs_map:
        options["key_map"] = column_map(fmt, 0, batch=1, heads=1)
    with on(backend):
        packed = ops.quantize(k, v, fmt, **options)
    assert torch.equal(packed, quantize(k, v, fmt, **options))


@backends
def test_quantize_reads_strided_tensors(backend):
    fmt = PageFormat(64)
    k, v = tokens(fmt, 1, batch=2, heads=3, count=64)
    as_projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    channels_apart = [x.mT.contiguous().mT for x in (k, v)]
    with on(backend):
        for strided in (as_projected, channels_apart):
            assert torch.equal(ops.quantize(*strided, fmt), quantize(k, v, fmt))


# ---------------------------------------------------------------------------------------------------------- evict_
@by_content
def evicted(k: Tensor, v: Tensor, pages: Tensor, fmt: PageFormat, **step: Any) -> list[Tensor]:
    """What an eviction leaves of the window and of the pages."""
    changed = [x.clone() for x in (k, v, pages)]
    reference.evict_(*changed, fmt, **step)
    return changed


@backends
@given(
    fmt=formats(),
    dtype=dtypes,
    seed=seeds,
    rule=st.sampled_from(COUNTED),
    sinks=st.integers(0, 5),
    pages_per_window=st.integers(1, 2),
)
def test_evict_(backend, fmt, dtype, seed, rule, sinks, pages_per_window):
    window = pages_per_window * fmt.page_tokens
    full = sinks + 3 * window
    k, v = tokens(fmt, seed, batch=2, heads=2, count=full + 3, dtype=dtype)
    key_map = key_map_of(fmt, seed, 2, 2)
    slots = evicted_slots(rule, window, sinks)
    store = torch.full((2, 2, 2 + pages_per_window, fmt.words), 7, dtype=torch.int32)
    step = dict(page=1, tokens=full, start=slots.start, step=slots.step, count=window, key_map=key_map)
    step["key_weights"] = key_weights(seed, batch=2, heads=2, count=window)
    step["value_feedback"] = value_feedback(fmt, seed, batch=2, heads=2, count=window)
    got = [x.clone() for x in (k, v, store)]
    with on(backend):
        ops.evict_(*got, fmt, **step)
    want = evicted(k, v, store, fmt, **step)
    assert torch.equal(got[2], want[2])
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[:, :, : full - window], b[:, :, : full - window])
        assert torch.equal(a[:, :, full:], b[:, :, full:]), "slots past the tokens are not touched"


# ---------------------------------------------------------------------------------------------------------- attend
@backends
@given(
    fmt=formats(),
    dtype=dtypes,
    seed=seeds,
    pages=st.integers(0, 4),
    exact=st.integers(0, 200),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
    queries=st.integers(1, 16),
    sharpness=st.sampled_from([1.0, 8.0]),
)
@example(  # few numbers, of which torch's own bfloat16 result happens to have most right
    fmt=PageFormat(16, 16, 32, 8, 2, 16, 16, 8, 8),
    dtype=torch.float16,
    seed=6603520,
    pages=1,
    exact=0,
    batch=1,
    heads=1,
    group=1,
    queries=9,
    sharpness=8.0,
)
def test_attend(backend, fmt, dtype, seed, pages, exact, batch, heads, group, queries, sharpness):
    packed = pages * fmt.page_tokens
    if packed + exact == 0:
        exact = 1
    Problem(
        fmt,
        packed=packed,
        exact=exact,
        batch=batch,
        heads=heads,
        group=group,
        queries=queries,
        dtype=dtype,
        seed=seed,
        sharpness=sharpness,
    ).check(backend)


# Errors over many problems, of outputs and of log-sum-exps, as a share of what low precision costs
# (tests/helpers/problems.py): about 1.4 times what they are. A kernel that becomes twice as inexact is above.
INEXACT = {
    ("cpu", torch.float32): (0.013, 0.008),
    ("cpu", torch.float16): (0.42, 0.07),
    ("cpu", torch.bfloat16): (0.40, 0.009),
    ("tensor", torch.float16): (0.64, 0.40),
    ("tensor", torch.bfloat16): (0.42, 0.08),
    ("general", torch.float32): (1.05e-4, 1.05e-4),
    ("general", torch.float16): (0.38, 9e-4),
    ("general", torch.bfloat16): (0.37, 1.15e-4),
    ("prefill", torch.float16): (0.70, 0.53),
    ("prefill", torch.bfloat16): (0.70, 0.50),
}
MANY_PROBLEMS = {
    "tensor": [{"fmt": PageFormat(64), "packed": 128}, {"fmt": LogQuantConfig().page_format(128), "packed": 64}],
    "general": [{"fmt": PageFormat(16, 32), "packed": 128}, {"fmt": PageFormat(80, 64, 32, 4, 2), "packed": 32}],
    "prefill": [
        {"fmt": PageFormat(16, 16, 32, 8, 2, 16, 16, 8, 8), "packed": 32, "exact": 0, "queries": 9},
        {"fmt": PageFormat(64), "packed": 64, "queries": 20},
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "path"), [*((name, "cpu") for name in CPU_SETS), *product(EMULATED, ("tensor", "general", "prefill"))]
)
def test_attend_is_as_exact_as_it_was(backend, path, dtype):
    """Over many problems, with flat softmaxes and sharp ones."""
    shapes = MANY_PROBLEMS[path] if path != "cpu" else [shape for some in MANY_PROBLEMS.values() for shape in some]
    taken = path if path == "cpu" or dtype != torch.float32 else "general"
    ratios = []
    for shape, seed in product(shapes, range(24)):
        shape = {"exact": 40, "group": 4, **shape, "seed": 3 * seed, "sharpness": (1.0, 8.0)[seed % 2]}
        problem = Problem(**shape, dtype=dtype)
        if backend == "emulated":
            assert problem.call(emulated.attend_path, problem.q) == taken
        pairs = zip(problem.run(backend), problem.truth(), problem.low_precision(), strict=True)
        ratios.append([rms(got.double() - true) / rms(low) for got, true, low in pairs])
    for ratio, most in zip(map(rms, torch.tensor(ratios).T), INEXACT[taken, dtype], strict=True):
        print(f"{taken} {dtype}: {ratio:.3g} of at most {most}")
        assert ratio <= most < 2 * ratio


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [1, 63, 191, 500, 2_000, 20_000])
@pytest.mark.parametrize(("heads", "group"), [(2, 1), (1, 4), (1, 16)])
def test_attend_over_context_lengths(backend, dtype, context, heads, group):
    packed = packed_tokens(LogQuantConfig(), context)
    problem = Problem(PageFormat(128), packed=packed, exact=context - packed, heads=heads, group=group, dtype=dtype)
    problem.check(backend)


@backends
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_attend_head_dims_of_real_models(backend, bits, dim):
    fmt = PageFormat(dim, key_bits=bits, value_bits=bits)
    Problem(fmt, packed=5 * 64, exact=150, group=4, dtype=torch.bfloat16, seed=dim + bits).check(backend)


@pytest.mark.parametrize("backend", CPU_SETS)
@pytest.mark.parametrize("config", [LogQuantConfig(), LogQuantConfig.paper()], ids=["default", "paper"])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 6.0], ids=["flat", "normal", "peaked"])
def test_attend_is_within_2e_3_of_the_outputs_rms(backend, config, sharpness):
    """Beside float64 on the same dequantised tokens: folding rounds queries and weights to int16, which is all."""
    fmt, (heads, group, packed, exact) = config.page_format(128), (2, 4, 2048, 150)
    for seed in range(4):
        torch.manual_seed(seed)
        k, v = torch.randn(1, heads, packed + exact, 128), torch.randn(1, heads, packed + exact, 128)
        q = sharpness * torch.randn(1, heads * group, 1, 128)
        key_map = column_map(fmt, seed, batch=1, heads=heads) if fmt.needs_map else None
        pages = ops.quantize(k[:, :, :packed], v[:, :, :packed], fmt, key_map=key_map)
        stored = ops.dequantize(pages, fmt, dtype=torch.float32, key_map=key_map)
        window = k[:, :, packed:].contiguous(), v[:, :, packed:].contiguous()
        keys, values = (torch.cat(x, 2).double().repeat_interleave(group, 1) for x in zip(stored, window, strict=True))
        want = (q.double() @ keys.mT * 128**-0.5).softmax(-1) @ values
        with on(backend):
            got = ops.attend(q, pages, *window, fmt, scale=128**-0.5, key_map=key_map)[0]
        assert (got - want).abs().max() <= 2e-3 * want.square().mean().sqrt()


def masks(kind: str, problem: Problem, seed: int) -> Tensor:
    """A mask in logical order that hides half of the tokens, of a boolean or float kind."""
    random = torch.Generator().manual_seed(seed)
    batch, heads, queries, _ = problem.q.shape
    shape = [(1, 1, 1), (batch, 1, queries), (batch, heads, queries), (1, heads, 1)][seed % 4]
    seen = torch.rand(*shape, problem.slots, generator=random) < 0.5
    if kind == "bool":
        return seen
    bias = torch.randn(*shape, problem.slots, generator=random)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind]
    return bias.masked_fill(~seen, -torch.inf).to(dtype)


@backends
@given(
    fmt=formats(),
    seed=seeds,
    kind=st.sampled_from(["bool", "float32", "float16", "bfloat16"]),
    queries=st.integers(1, 5),
    with_positions=st.booleans(),
)
def test_attend_masks_look_tokens_up_by_position(backend, fmt, seed, kind, queries, with_positions):
    problem = Problem(fmt, packed=2 * fmt.page_tokens, exact=40, batch=2, queries=queries, seed=seed)
    order = torch.randperm(problem.slots, generator=torch.Generator().manual_seed(seed)).int()[None]
    problem.check(backend, mask=masks(kind, problem, seed), positions=order if with_positions else None)


@backends
@given(fmt=formats(), seed=seeds, queries=st.integers(1, 16), rows=st.integers(1, 2))
def test_attend_is_causal_by_position(backend, fmt, seed, queries, rows):
    problem = Problem(fmt, packed=2 * fmt.page_tokens, exact=30, batch=2, queries=queries, seed=seed)
    random = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(problem.slots, generator=random) for _ in range(rows)]).int()
    own = torch.randint(-1, problem.slots, (rows, queries), generator=random).int()
    problem.check(backend, positions=order, query_positions=own)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_softcap_and_sinks(backend, dtype):
    problem = Problem(PageFormat(64), packed=256, exact=100, group=4, dtype=dtype, sharpness=8.0)
    sinks = torch.linspace(-3, 8, problem.q.shape[1])
    problem.check(backend, softcap=5.0)
    problem.check(backend, sinks=sinks)
    problem.check(backend, softcap=30.0, sinks=sinks, mask=masks("bool", problem, 1))
    # Past the last token of a vector: -inf, capped, would count.
    Problem(PageFormat(64), packed=0, exact=17, group=4).check(backend, softcap=0.5)


@backends
def test_attend_page_table_and_lengths(backend):
    fmt = PageFormat(64)
    whole = Problem(fmt, packed=6 * 64, exact=50, batch=2, heads=2, group=2, queries=3)
    random = torch.Generator().manual_seed(0)
    blocks = torch.randperm(20, generator=random)[:12].view(2, 6).int()
    store = torch.randint(-(2**31), 2**31 - 1, (20, 2, fmt.words), generator=random).int()
    store[blocks.long()] = whole.pages.transpose(1, 2)
    lengths = torch.tensor([[6, 50], [2, 7]], dtype=torch.int32)
    expected = [whole.truth(), whole.truth(lengths=lengths)]
    assert not torch.equal(expected[0][0], expected[1][0])

    whole.pages = store
    whole.check(backend, page_table=blocks)
    whole.check(backend, page_table=blocks, lengths=lengths)
    for options, (want, _) in zip(({}, {"lengths": lengths}), expected, strict=True):
        assert torch.equal(whole.truth(page_table=blocks, **options)[0], want)


@backends
def test_attend_row_with_fewer_tokens_equals_the_row_alone(backend):
    problem = Problem(PageFormat(64), packed=4 * 64, exact=50, batch=2)
    out, lse = problem.run(backend, lengths=torch.tensor([[4, 50], [1, 9]], dtype=torch.int32))
    problem.q, problem.pages = problem.q[1:], problem.pages[1:, :, :1]
    problem.window_k, problem.window_v = problem.window_k[1:, :, :9], problem.window_v[1:, :, :9]
    problem.key_map = None if problem.key_map is None else problem.key_map[-1:]
    alone, alone_lse = problem.run(backend)
    assert torch.allclose(out[1:], alone, rtol=1e-4, atol=1e-5)
    assert torch.allclose(lse[1:], alone_lse, rtol=1e-5, atol=1e-5)


@backends
def test_attend_sees_nothing(backend):
    problem = Problem(PageFormat(64), packed=128, exact=20, batch=2)
    nothing = torch.zeros(2, 1, 1, problem.slots, dtype=torch.bool)
    nothing[0] = True
    out, lse = problem.run(backend, mask=nothing)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    hidden = torch.zeros(2, 1, 1, problem.slots).masked_fill(~nothing, torch.finfo(torch.float32).min)
    assert torch.equal(problem.run(backend, mask=hidden)[0], out)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["packed keys", "packed values", "exact keys", "exact values"])
def test_attend_non_finite_tokens(backend, where, dtype):
    """A NaN reaches the queries that see it, and no others."""
    fmt = PageFormat(64)
    k, v = tokens(fmt, 0, batch=1, heads=1, count=148, dtype=dtype)
    place = 70 if "packed" in where else 140
    (k if "keys" in where else v)[0, 0, place, 3] = torch.nan
    pages = reference.quantize(k[:, :, :128], v[:, :, :128], fmt)
    q = torch.randn(1, 2, 2, 64).to(dtype)
    seen = torch.ones(1, 1, 2, 148, dtype=torch.bool)
    # A NaN key spoils its channel in the whole page.
    seen[0, 0, 0, 64 : 128 if where == "packed keys" else 148] = False
    with on(backend):
        out, lse = ops.attend(q, pages, k[:, :, 128:], v[:, :, 128:], fmt, scale=0.125, mask=seen)
    assert out[:, :, 0].isfinite().all() and lse[:, :, 0].isfinite().all()
    assert out[:, :, 1].isnan().any(-1).all()
    want, *_ = reference.attend(q, pages, k[:, :, 128:], v[:, :, 128:], fmt, scale=0.125, mask=seen)
    assert torch.equal(out.isnan(), want.isnan())
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    assert torch.allclose(out[:, :, 0], want[:, :, 0], rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_non_finite_query(backend, dtype):
    problem = Problem(PageFormat(64), packed=128, exact=20, group=2, dtype=dtype)
    for bad in (torch.nan, torch.inf):
        problem.q[0, 1, 0, 7] = bad
        out, _ = problem.run(backend)
        assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_reads_strided_tensors(backend, dtype):
    problem = Problem(PageFormat(64), packed=192, exact=30, batch=2, heads=2, group=2, queries=2, dtype=dtype)
    want = problem.run(backend)
    problem.q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
    by_channel = problem.window_k.mT.contiguous().mT
    rows = torch.zeros(2 * 2 * 30 * 65 + 1, dtype=dtype)[1:].view(2, 2, 30, 65)  # aligned as elements are
    rows[..., :64] = problem.window_k
    store = torch.zeros(2, 2, 5, problem.fmt.words + 16, dtype=torch.int32)
    store[:, :, 1:4, 16:] = problem.pages
    problem.pages = store[:, :, 1:4, 16:]
    for problem.window_k in (by_channel, rows[..., :64]):
        for got, expected in zip(problem.run(backend), want, strict=True):
            if dtype == torch.float32 or backend in CPU_SETS:
                assert torch.equal(got, expected)
            else:  # CUDA has another kernel for rows that are not aligned
                torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("backend", CPU_SETS)
def test_attend_does_not_depend_on_the_number_of_threads(backend):
    problem = Problem(PageFormat(128), packed=100 * 64, exact=150, heads=1, group=4, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(problem.run(backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
