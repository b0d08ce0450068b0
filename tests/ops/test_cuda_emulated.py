"""The emulator, and what of the CUDA kernels test_ops.py does not see: orders of threads, rounding, traffic."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant import LogQuantConfig
from logquant.format import PageFormat
from logquant.ops import reference
from tests.helpers import emulated
from tests.helpers.cuda_sources import plain
from tests.helpers.problems import TENSOR_FORMATS, Problem, name_of, problem_of
from tests.helpers.strategies import dtypes, formats, key_weights, seeds, tokens, value_feedback

if emulated.cuda_include() is None:
    pytest.skip("needs CUDA's headers", allow_module_level=True)

HALVES = (torch.float16, torch.bfloat16)
MACHINES = [
    {},
    {"order": "reverse", "copies": "eager"},
    {"order": "random", "copies": "random", "seed": 7},
    {"order": "random", "seed": 8, "multiprocessors": 20},
]


def run(problem: Problem, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = problem.call(emulated.attend, problem.q, **options)
    return out, lse


def check(problem: Problem, **options: torch.Tensor | float) -> None:
    problem.check_results(*run(problem, **options), **options)


# ------------------------------------------------------------------------------------------------------ the emulator
@pytest.mark.parametrize("sanitizer", ["none", "address,undefined", "thread"])
def test_the_emulator_catches_seeded_bugs(sanitizer):
    flags = [*emulated.FLAGS, *([] if sanitizer == "none" else [f"-fsanitize={sanitizer}", "-O1"])]
    objects = plain("tests/emulated_bugs.cu", "emulator/emulator.cpp")
    program = emulated.build(f"bugs-{sanitizer.replace(',', '-')}", objects, flags, shared=False)

    def outcome(*arguments: str) -> tuple[int, str]:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    assert outcome("none")[0] == 0
    if sanitizer == "none":
        code, text = outcome()
        assert code == 0, text
    elif sanitizer == "thread":
        for bug in ("race", "no_barrier_before", "no_barrier_after"):
            assert "WARNING: ThreadSanitizer: data race" in outcome(bug)[1], bug
    else:
        for bug in ("read_past_shared", "read_past_global"):
            assert "AddressSanitizer: heap-buffer-overflow" in outcome(bug)[1], bug


def cutlass_include() -> Path | None:
    path = Path(sysconfig.get_path("purelib")) / "cutlass_library/source/include"
    return path if path.exists() else None


@pytest.mark.skipif(cutlass_include() is None, reason="needs CuTe: pip install --no-deps nvidia-cutlass")
def test_fragments_are_laid_out_as_cute_says():
    objects = plain("tests/emulated_layouts.cu", "tests/cute_layouts.cpp", "emulator/emulator.cpp")
    cccl = emulated.cuda_include() / "cccl"
    flags = [*emulated.FLAGS, f"-isystem {cutlass_include()} -isystem {cccl}", "-Wno-unused-parameter"]
    program = emulated.build("layouts", objects, flags, shared=False)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_an_error_names_its_place():
    k = torch.randn(1, 1, 64, 64)
    fmt = PageFormat(64)
    pages = emulated.quantize(k, k, fmt)
    with pytest.raises(RuntimeError, match="invalid launch configuration"):
        emulated._call("dequantize", [*emulated._format(fmt), *[0] * 17, 1, 1, 0])
    assert torch.equal(pages, reference.quantize(k, k, fmt)), "and the next launch works"


# ------------------------------------------------------------------------------------------------------- the kernels
machines = st.builds(
    dict,
    order=st.sampled_from(emulated.ORDERS),
    copies=st.sampled_from(emulated.COPIES),
    seed=st.integers(1, 1 << 30),
    multiprocessors=st.sampled_from([1, 2, 8, 40]),
)


@given(
    fmt=formats() | st.sampled_from(TENSOR_FORMATS),
    dtype=dtypes,
    seed=seeds,
    pages=st.integers(0, 4),
    exact=st.integers(0, 100),
    group=st.integers(1, 16),
    queries=st.sampled_from([1, 2, 5, 16, 40]),
    machine=machines,
)
def test_every_operator_in_every_order(fmt, dtype, seed, pages, exact, group, queries, machine):
    """Any format, dtype, group and number of queries, cut into any number of splits."""
    problem = Problem(
        fmt, packed=pages * fmt.page_tokens, exact=exact, group=group, queries=queries, dtype=dtype, seed=seed
    )
    k, v = tokens(fmt, seed, batch=1, heads=2, count=3 * fmt.page_tokens, dtype=dtype)
    shape = {"batch": 1, "heads": 2, "count": 3 * fmt.page_tokens}
    weights, feedback = key_weights(seed, **shape), value_feedback(fmt, seed, **shape)
    options = {"key_map": problem.key_map, "key_weights": weights, "value_feedback": feedback}
    with emulated.machine(**machine):
        check(problem)
        packed = emulated.quantize(k, v, fmt, **options)
        restored = emulated.dequantize(packed, fmt, dtype=dtype, key_map=problem.key_map)
        window = [k.clone(), v.clone(), torch.zeros_like(packed)]
        step = {"page": 1, "tokens": 3 * fmt.page_tokens, "start": 1, "step": 2, "count": fmt.page_tokens}
        step["key_weights"] = None if weights is None else weights[..., : fmt.page_tokens]
        step["value_feedback"] = None if feedback is None else feedback[:, :, : fmt.page_tokens]
        emulated.evict_(*window, fmt, **step, key_map=problem.key_map)
    assert torch.equal(packed, reference.quantize(k, v, fmt, **options))
    for got, want in zip(
        restored, reference.dequantize(packed, fmt, dtype=dtype, key_map=problem.key_map), strict=True
    ):
        assert torch.equal(got, want)
    expected = [k.clone(), v.clone(), torch.zeros_like(packed)]
    reference.evict_(*expected, fmt, **step, key_map=problem.key_map)
    assert torch.equal(window[2], expected[2])
    for got, want in zip(window[:2], expected[:2], strict=True):
        assert torch.equal(got[:, :, : 2 * fmt.page_tokens], want[:, :, : 2 * fmt.page_tokens])


@pytest.mark.parametrize("settings", MACHINES, ids=str)
@pytest.mark.parametrize("param_bits", [16, 8])
def test_codes_do_not_depend_on_the_order_of_threads(settings, param_bits):
    fmt = PageFormat(80, 96, 32, 4, 2, 112, 0, param_bits, param_bits)
    problem = Problem(fmt, packed=64, exact=96, seed=4)
    k, v = problem.window_k, problem.window_v
    with emulated.machine(**settings):
        pages = emulated.quantize(k, v, fmt, key_map=problem.key_map)
        restored = emulated.dequantize(pages, fmt, key_map=problem.key_map)
        window = [k.clone(), v.clone(), torch.zeros_like(pages)]
        emulated.evict_(*window, fmt, page=1, tokens=96, start=1, step=2, count=32, key_map=problem.key_map)
    assert torch.equal(pages, reference.quantize(k, v, fmt, key_map=problem.key_map))
    for got, want in zip(restored, reference.dequantize(pages, fmt, key_map=problem.key_map), strict=True):
        assert torch.equal(got, want)
    expected = [k.clone(), v.clone(), torch.zeros_like(pages)]
    reference.evict_(*expected, fmt, page=1, tokens=96, start=1, step=2, count=32, key_map=problem.key_map)
    assert torch.equal(window[2], expected[2])
    for got, want in zip(window[:2], expected[:2], strict=True):
        assert torch.equal(got[:, :, :64], want[:, :, :64])


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((128, 128, 64), 40),
        ((256, 256, 64), 40),
        ((16, 160, 128, 2, 4, 16, 160), 96),
        ((16, 512, 64, 2, 2, 16, 256), 96),
        ((16, 512, 128, 2, 2, 16, 256), 96),  # from here on in strips
        ((16, 448, 128, 2, 2, 16, 224), 96),
        ((16, 1024, 32, 2, 8, 16, 1024), 96),
        ((16, 1024, 128, 2, 8, 16, 1024), 96),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", MACHINES[:3], ids=str)
def test_feedback_in_groups_of_every_size(shape, shared, settings):
    """Four blocks an SM, if groups are not large, and no more KB than every GPU has."""
    fmt = PageFormat(*shape, key_param_bits=8, value_param_bits=8)
    k, v = tokens(fmt, 3, batch=1, heads=2, count=fmt.page_tokens)
    v[0, 0, 5, 3] = torch.nan
    feedback = value_feedback(fmt, 3, batch=1, heads=2, count=fmt.page_tokens)
    emulated.counters()
    with emulated.machine(**settings):
        pages = emulated.quantize(k, v, fmt, value_feedback=feedback)
    assert emulated.counters()["shared_bytes"] <= shared << 10
    assert torch.equal(pages, reference.quantize(k, v, fmt, value_feedback=feedback))


@pytest.mark.parametrize("factor", [1.0, 4.0, -4.0])
@pytest.mark.parametrize("page_tokens", [64, 128])
def test_feedback_beyond_what_fp32_holds(page_tokens, factor):
    fmt = PageFormat(64, page_tokens=page_tokens, key_param_bits=8, value_param_bits=8)
    k, v = tokens(fmt, 3, batch=1, heads=2, count=page_tokens)
    v[0, 0, 5, 3] = torch.nan
    feedback = torch.full((1, 1, page_tokens, page_tokens), factor)
    pages = emulated.quantize(k, v, fmt, value_feedback=feedback)
    assert torch.equal(pages, reference.quantize(k, v, fmt, value_feedback=feedback))


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("config", [LogQuantConfig.paper(), LogQuantConfig()], ids=["paper", "default"])
def test_formats_of_common_dims_have_kernels_on_tensor_cores(config, dim):
    assert config.page_format(dim) in TENSOR_FORMATS


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fmt", TENSOR_FORMATS, ids=name_of)
def test_attend_on_tensor_cores(fmt, dtype):
    """Every compiled format: 1 to 24 query rows, parts alone, every option at once, every order of threads."""
    for shape in (
        {"group": 1},
        {"group": 4, "queries": 3},
        {"group": 8, "queries": 3, "packed": fmt.page_tokens},
        {"packed": 0, "exact": 17},
        {"exact": 0},
    ):
        problem = problem_of(fmt, dtype, **shape)
        assert problem.call(emulated.attend_path, problem.q) == "tensor"
        check(problem)
    problem = problem_of(fmt, dtype, batch=2, heads=1, queries=3)
    random = torch.Generator().manual_seed(0)
    options = {
        "softcap": 20.0,
        "positions": torch.randperm(problem.slots, generator=random).int()[None],
        "query_positions": torch.randint(0, problem.slots, (2, 3), generator=random).int(),
        "mask": torch.rand(2, 1, 3, problem.slots, generator=random) < 0.7,
        "sinks": torch.randn(problem.q.shape[1], generator=random),
        "lengths": torch.tensor([[5, 50], [2, 7]], dtype=torch.int32),
    }
    check(problem, **options)
    results = []
    for settings in MACHINES[:3]:
        with emulated.machine(**settings):
            results.append(run(problem, **options))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


PREFILL_FORMATS = [
    PageFormat(64),
    PageFormat(80, 96, 32, 4, 2, key_columns=112),
    PageFormat(96, page_tokens=128),
    PageFormat(128, key_columns=160),
    PageFormat(128, key_bits=8, value_bits=8),
    PageFormat(192, 128),
    PageFormat(256, key_bits=8, value_bits=4),
    PageFormat(64, 80, 32, key_columns=80, key_param_bits=8, value_param_bits=8),
    PageFormat(96, value_group=32, key_param_bits=8, value_param_bits=8),
    PageFormat(128, key_columns=160, key_param_bits=8, value_param_bits=8),
    PageFormat(96, key_columns=112, key_param_bits=8, value_param_bits=8, fine_values=8),
    PageFormat(96, 192, key_columns=112, key_param_bits=8, value_param_bits=8, fine_values=4),
    PageFormat(256, key_bits=4, value_bits=8, key_param_bits=8, value_param_bits=8),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fmt", PREFILL_FORMATS, ids=name_of)
def test_attend_for_many_queries(fmt, dtype):
    """Chunked prefill: rows that fill blocks and do not, parts alone, one split and several, every option at once."""
    for shape, processors in (
        ({"queries": 70}, 1),
        ({"queries": 33, "packed": 0, "exact": 150}, 40),
        ({"queries": 130, "group": 1, "exact": 0, "heads": 1}, 40),
    ):
        problem = problem_of(fmt, dtype, **shape)
        assert problem.call(emulated.attend_path, problem.q) == "prefill"
        with emulated.machine(multiprocessors=processors):
            check(problem)
    problem = problem_of(fmt, dtype, batch=2, heads=1, queries=40)
    random = torch.Generator().manual_seed(0)
    options = {
        "softcap": 20.0,
        "positions": torch.randperm(problem.slots, generator=random).int()[None],
        "query_positions": torch.randint(0, problem.slots, (2, 40), generator=random).int(),
        "mask": torch.rand(2, 1, 40, problem.slots, generator=random) < 0.7,
        "sinks": torch.randn(problem.q.shape[1], generator=random),
        "lengths": torch.tensor([[5, 50], [2, 7]], dtype=torch.int32),
    }
    results = []
    for settings in MACHINES:
        with emulated.machine(**{"multiprocessors": 8, **settings}):
            check(problem, **options)
            results.append(run(problem, **options))
    assert all(torch.equal(x, y) for result in results[:3] for x, y in zip(result, results[0], strict=True))


def test_prefill_skips_what_is_hidden_by_causality():
    problem = problem_of(PageFormat(64), torch.bfloat16, queries=64, packed=64 * 20, exact=64, group=2, heads=1)

    def products(first: int) -> int:
        emulated.counters()
        positions = torch.arange(first, first + 64, dtype=torch.int32)[None]
        with emulated.machine(multiprocessors=1):
            check(problem, query_positions=positions)
        return emulated.counters()["mma"]

    assert products(128) * 5 < products(64 * 20)


SEARCHED = LogQuantConfig().page_format(128)
FINE = LogQuantConfig(fine_values=8).page_format(128)
FINE_4 = LogQuantConfig(fine_values=4).page_format(128)
FITTED_GROUPS = LogQuantConfig().page_format(256)  # more than the kernel keeps the weights of at once


@pytest.mark.parametrize(
    ("fmt", "queries"),
    [(PageFormat(128), 2), (PageFormat(128), 40), (SEARCHED, 2), (SEARCHED, 4), (SEARCHED, 40), (FITTED_GROUPS, 2)]
    + [(PageFormat(128, page_tokens=32, key_param_bits=8, value_param_bits=8), 2)]  # the general kernel
    + [(FINE, 2), (FINE, 40), (FINE_4, 2)]
    + [(fmt, 3) for fmt in (PageFormat(192), PageFormat(256), FITTED_GROUPS)],  # of two warps
    ids=lambda x: name_of(x) if isinstance(x, PageFormat) else str(x),
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("place", [3, 70, 330])
def test_a_hidden_nan_stays_hidden(fmt, dtype, place, queries):
    problem = problem_of(fmt, dtype, queries=queries)
    k, v = torch.randn(1, 2, 320, fmt.head_dim).to(dtype), torch.randn(1, 2, 370, fmt.value_dim).to(dtype)
    v[0, 0, place, 5] = torch.nan
    problem.pages = reference.quantize(k, v[:, :, :320], fmt, key_map=problem.key_map)
    problem.window_v = v[:, :, 320:]
    mask = torch.ones(1, 1, queries, 370, dtype=torch.bool)
    mask[0, 0, 0, place] = False
    for options in ({"mask": mask}, {}):
        out, lse = run(problem, **options)
        want, *_ = problem.call(reference.attend, problem.q, **options)
        assert want.isnan().any()
        assert torch.equal(out.isnan(), want.isnan())
        assert lse.isfinite().all()


@pytest.mark.parametrize("fmt", [PageFormat(128), SEARCHED], ids=name_of)
def test_a_nan_in_a_key_is_seen_by_those_who_see_its_page(fmt):
    problem = problem_of(fmt, torch.float16, queries=2)
    k, v = (torch.randn(1, 2, 320, 128).half() for _ in range(2))
    k[0, 0, 70, 5] = torch.nan
    problem.pages = reference.quantize(k, v, fmt, key_map=problem.key_map)
    mask = torch.ones(1, 1, 2, 370, dtype=torch.bool)
    mask[0, 0, 0, 64:128] = False
    for options in ({"mask": mask}, {}):
        out, _ = run(problem, **options)
        want, *_ = problem.call(reference.attend, problem.q, **options)
        assert want.isnan().any()
        assert torch.equal(out.isnan(), want.isnan())


@pytest.mark.parametrize("queries", [1, 40])
def test_rotated_values_may_be_larger_than_values(queries):
    """Equal channels become one of eight times their size, which fp16 need not hold."""
    fmt = PageFormat(64, value_bits=8, key_param_bits=8, value_param_bits=8)
    problem = problem_of(fmt, torch.float16, queries=queries)
    v = torch.full((1, 2, 370, 64), 4e4).half()
    problem.pages = reference.quantize(torch.randn(1, 2, 320, 64).half(), v[:, :, :320], fmt)
    problem.window_v = v[:, :, 320:]
    check(problem)


@pytest.mark.parametrize("settings", [{"mma_block": 8}, {"mma_block": 16, "mma_guard_bits": 2}], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize(("fmt", "queries"), [(PageFormat(128), 1), (PageFormat(128), 40), (SEARCHED, 1)])
def test_attend_with_tensor_cores_that_truncate(settings, dtype, sharpness, fmt, queries):
    """Keys have outlier channels, up to eight times the others (tests/helpers/strategies.py); sharp softmaxes, too."""
    problem = problem_of(fmt, dtype, packed=256, exact=20, heads=1, sharpness=sharpness, queries=queries)
    with emulated.machine(**settings):
        check(problem)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fmt", TENSOR_FORMATS, ids=name_of)
def test_bytes_loaded_are_those_of_the_pages(fmt, dtype):
    """Once for up to 16 query rows."""
    problem = problem_of(fmt, dtype, batch=1, heads=1, exact=0, queries=4)
    emulated.counters()
    run(problem)
    assert emulated.counters()["async_bytes"] == problem.pages.numel() * 4


@pytest.mark.parametrize("fmt", TENSOR_FORMATS, ids=name_of)
def test_bytes_loaded_are_those_of_the_window_and_q(fmt):
    """The window once; q once a warp and split, where it is kept in registers, else once for every 16 tokens."""
    problem = problem_of(fmt, torch.bfloat16, batch=1, heads=1, packed=0, exact=256)
    emulated.counters()
    with emulated.machine(multiprocessors=1):
        run(problem)
    loaded = emulated.counters()["load_bytes"]
    warps, splits = 4, 3  # three blocks an SM
    q_loads = warps * splits if fmt.head_dim <= 128 else 256 // 16
    assert loaded == problem.window_k.nbytes + problem.window_v.nbytes + q_loads * problem.q.nbytes


def test_few_splits_for_many_heads_and_many_for_few():
    def blocks(batch: int) -> int:
        problem = problem_of(PageFormat(64), torch.bfloat16, packed=64 * 64, batch=batch, heads=2)
        emulated.counters()
        with emulated.machine(multiprocessors=16):
            run(problem)
        return emulated.counters()["blocks"] // batch // 2

    # Blocks a head, and one a row for the combination.
    assert blocks(1) == 8 + 1 + 4
    assert blocks(24) == 1 + 1 + 4
