"""A page table for each KV head, on every backend: the same as if the chosen pages were all there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from logquant import LogQuantConfig, ops
from logquant.format import PageFormat
from logquant.recall.index import PageIndex
from logquant.recall.reading import HeadsAsRows, Recall
from logquant.recall_spec import RecallSpec
from tests.helpers import emulated
from tests.helpers.backends import BACKENDS, EMULATED, on
from tests.helpers.problems import Problem

FORMATS = [
    pytest.param(LogQuantConfig().page_format(64), id="d64"),  # on tensor cores
    pytest.param(LogQuantConfig.paper().page_format(128), id="d128-plain"),
    pytest.param(PageFormat(48, 80, 32, key_bits=4), id="general"),
]


def chosen_of(problem: Problem, count: int) -> Tensor:
    """Different pages for each KV head, int32 ``[B, H, count]``."""
    batch, heads, pages, _ = problem.pages.shape
    noise = torch.rand(batch, heads, pages, generator=torch.Generator().manual_seed(1))
    return noise.argsort(-1)[..., :count].sort(-1).values.int()


def taken(pages: Tensor, chosen: Tensor) -> Tensor:
    return pages.gather(2, chosen[..., None].long().expand(-1, -1, -1, pages.shape[3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_table_for_each_head(backend, fmt, dtype):
    """With every option at once: bit allocation of each head, mask, positions, lengths and what the window is given."""
    problem = Problem(fmt, packed=9 * fmt.page_tokens, exact=70, batch=2, heads=3, group=2, dtype=dtype, seed=1)
    chosen, tokens = chosen_of(problem, 4), fmt.page_tokens
    random = torch.Generator().manual_seed(2)
    positions = torch.stack([torch.randperm(problem.slots, generator=random).int() for _ in range(2)])
    mask = torch.rand(2, 6, 1, problem.slots, generator=random) < 0.8
    given = torch.rand(2, 3, 60, generator=random)
    lengths = torch.tensor([[4, 70], [2, 61]], dtype=torch.int32)
    shared = {"scale": problem.scale, "softcap": 5.0}
    with on(backend):
        # The first pages of a larger store.
        store = torch.cat([problem.pages, problem.pages.new_full((2, 3, 2, fmt.words), -1)], 2)
        rows = HeadsAsRows(store[:, :, :9], fmt, problem.key_map)
        assert rows.blocks.data_ptr() == store.data_ptr()
        got = rows.attend(
            problem.q,
            chosen,
            problem.window_k,
            problem.window_v,
            given=given,
            positions=positions,
            mask=mask,
            lengths=lengths,
            **shared,
        )
    for head in range(3):
        own, group = slice(head, head + 1), slice(2 * head, 2 * head + 2)
        packed = positions[:, : 9 * tokens].unflatten(1, (9, tokens))
        of_chosen = packed.gather(1, chosen[:, head, :, None].long().expand(-1, -1, tokens)).flatten(1)
        key_map = problem.key_map
        want = ops.observed_attend(
            problem.q[:, group],
            taken(problem.pages, chosen)[:, own],
            problem.window_k[:, own],
            problem.window_v[:, own],
            fmt,
            key_map=key_map if key_map is None or key_map.shape[1] == 1 else key_map[:, own],
            positions=torch.cat([of_chosen, positions[:, 9 * tokens :]], 1),
            mask=mask[:, group],
            lengths=lengths,
            attention=given[:, own],
            **shared,
        )
        tolerance = 1e-3 if dtype == torch.float32 else 3e-2
        assert torch.allclose(got[0][:, group], want[0], atol=tolerance, rtol=tolerance)
        assert torch.allclose(got[1].view(2, 6, 1)[:, group], want[1], atol=tolerance, rtol=tolerance)
        assert torch.allclose(got[2][:, own], want[2], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chooser", ["both", "means", "bounds"])
def test_choosing_and_reading(backend, chooser):
    """The whole of it on every backend, in rows of different lengths: the reference chooses the same pages."""
    fmt = LogQuantConfig().page_format(64)
    problem = Problem(fmt, packed=12 * 64, exact=70, batch=2, group=3, queries=2, dtype=torch.bfloat16, seed=3)
    index = PageIndex.of(torch.randn(2, 2, 12 * 64, 64, generator=torch.Generator().manual_seed(0)), 64)
    recall = Recall(RecallSpec(chooser, pages=0.4), index)
    packed = 12 * 64, 7 * 64
    counts = recall.counts(packed, 64, None)
    assert counts is not None and counts.tolist() == [[5], [3]]
    options = {
        "given": None,
        "scale": problem.scale,
        "sinks": torch.linspace(-1, 1, 6),
        "lengths": torch.tensor([[12, 70], [7, 70]], dtype=torch.int32),
    }
    reading = recall.reading(problem.pages, fmt, problem.key_map, packed)
    assert reading is not None
    results = []
    for name in (backend, "reference"):
        with on(name):
            results.append(reading.attend(problem.q, problem.window_k, problem.window_v, **options)[0])
    assert torch.allclose(*results, atol=3e-2, rtol=3e-2)


def test_pages_that_are_no_view_of_a_store_are_copied():
    fmt = PageFormat(64)
    problem = Problem(fmt, packed=256, exact=3, batch=2, seed=3)
    rows = HeadsAsRows(problem.pages.transpose(0, 1).contiguous().transpose(0, 1), fmt)
    assert torch.equal(rows.blocks.view_as(problem.pages), problem.pages)


@pytest.mark.skipif(not EMULATED, reason="needs CUDA's headers")
@pytest.mark.parametrize("fmt", FORMATS[:2])
def test_bytes_read_on_cuda_fall_with_the_share(fmt):
    """On tensor cores, whose copies of pages the emulator counts; the window is read as ever."""
    problem = Problem(fmt, packed=32 * fmt.page_tokens, exact=64, heads=2, group=4, dtype=torch.float16, seed=3)

    def bytes_read(count: int) -> int:
        emulated.counters()
        with on("emulated"):
            HeadsAsRows(problem.pages, fmt, problem.key_map).attend(
                problem.q,
                chosen_of(problem, count),
                problem.window_k,
                problem.window_v,
                given=None,
                scale=problem.scale,
            )
        counted = emulated.counters()
        return counted["async_bytes"] + counted["load_bytes"]

    none, quarter, whole = (bytes_read(count) for count in (1, 8, 32))
    page = (whole - none) / 31
    assert page == pytest.approx(2 * fmt.nbytes, rel=0.2)  # of two KV heads
    assert quarter - none == pytest.approx(7 * page, rel=0.02)
