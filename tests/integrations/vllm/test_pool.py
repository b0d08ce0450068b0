"""What attention over a pool of blocks computes, without vLLM: against a plain statement, however work is cut."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from logquant import LogQuantConfig, ops
from logquant.integrations.vllm import attention, guards
from logquant.integrations.vllm.layout import EXACT, PAGE, QUERY_DTYPE, BlockLayout
from logquant.integrations.vllm.step import Batch, Step
from logquant.quantizer.feedback import key_weights, value_feedback
from tests.helpers.strategies import column_map
from tests.helpers.vllm_pool import Blocks, Request, request

HEADS, GROUP, DIM = 2, 3, 32
TOKENS = 900

LAYOUTS = {
    "default": (guards.config_of(types.SimpleNamespace(additional_config={})), torch.bfloat16),
    "float32": (LogQuantConfig(rule="recent", key_columns=1.5), torch.float32),
    "bfloat16": (LogQuantConfig(rule="recent", key_columns=1.5), torch.bfloat16),
    "fine": (LogQuantConfig(fine_values=8), torch.float32),
    "4 bits, no sinks": (LogQuantConfig(rule="recent", bits=4, sinks=0), torch.float32),
    "plain parameters": (LogQuantConfig(rule="recent", param_bits=16, key_columns=1.0), torch.float32),
}


@dataclasses.dataclass(frozen=True)
class Case:
    layout: BlockLayout
    key_map: Tensor | None

    def blocks(self, **options: int) -> Blocks:
        return Blocks(self.layout, HEADS, self.key_map, **options)

    def request(self, tokens: int = TOKENS, seed: int = 1) -> Request:
        return request(self.layout, HEADS, tokens, seed)


@pytest.fixture(params=LAYOUTS)
def case(request) -> Case:
    config, dtype = LAYOUTS[request.param]
    layout = BlockLayout.of(config, DIM, GROUP, dtype)
    return Case(layout, column_map(layout.fmt, 3, batch=1, heads=HEADS) if layout.fmt.needs_map else None)


def page(case: Case, asked: Request, number: int) -> Tensor:
    """Page ``number`` of a request, by a plain statement: ``[H, words]``."""
    layout = case.layout
    end = min(number + EXACT, (number // layout.pages + 1) * layout.pages) * PAGE
    own = slice(number * PAGE, (number + 1) * PAGE)
    key, value = (x[own].transpose(0, 1)[None].clone() for x in (asked.key, asked.value))
    sinks = layout.sinks if number == 0 else 0
    for x in (key, value):
        x[:, :, :sinks] = x[:, :, sinks : sinks + 1]
    options = {} if case.key_map is None else {"key_map": case.key_map}
    if layout.fmt.mse_searched:
        position = torch.arange(end - layout.queries, end)
        query = asked.query[position].to(QUERY_DTYPE).float().unflatten(1, (HEADS, GROUP))  # [n, H, group, D]
        scores = torch.einsum("nhgd,htd->hgnt", query, key[0].float()) * DIM**-0.5
        token = torch.arange(own.start, own.stop)
        seen = (token <= position[:, None]) & (token >= layout.sinks)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).flatten(1, 2)[None]
        if layout.fmt.fine_values:
            given = weights.mean(2)
            given[:, :, :sinks] = -1.0
            # Of 16 slots the last two have fine values; they and then the others take the tokens in descending order.
            slots = sorted(range(PAGE), key=lambda slot: (slot % 16 < 14, slot))
            order = torch.empty_like(given, dtype=torch.int64)
            order[..., slots] = given.argsort(dim=-1, descending=True, stable=True)
            key, value = (x.gather(2, order[..., None].expand_as(x)) for x in (key, value))
            weights = weights.gather(3, order[:, :, None].expand_as(weights))
        options |= {"key_weights": key_weights(weights.mean(2), PAGE), "value_feedback": value_feedback(weights, PAGE)}
    return ops.quantize(key, value, layout.fmt, **options)[0, :, 0]


def expected(case: Case, asked: Request) -> Tensor:
    """What attention gives each token of a request, in float64, ``[T, Hq, D]``."""
    layout = case.layout
    tokens = len(asked.key)
    pages = torch.stack([page(case, asked, p) for p in range(tokens // PAGE - EXACT + 1)], 1)[None]
    packed = [x[0].double() for x in ops.dequantize(pages, layout.fmt, key_map=case.key_map)]
    exact = [x.transpose(0, 1).double() for x in (asked.key, asked.value)]
    # Sinks are attended to exactly: not where they were the first page's least attended tokens, or its first.
    hidden = range(62 - layout.sinks, 62) if layout.fmt.fine_values else range(layout.sinks)
    out = []
    for first in range(0, tokens, PAGE):
        end = min(first + PAGE, tokens)
        own = max(0, first - (EXACT - 1) * PAGE)  # the first token after the pages
        slots = [slot for slot in range(own) if slot not in hidden]
        key, value = (
            torch.cat([e[:, : min(layout.sinks, own)], p[:, slots], e[:, own:end]], 1).repeat_interleave(GROUP, 0)
            for e, p in zip(exact, packed, strict=True)
        )
        scores = torch.einsum("lhd,htd->hlt", asked.query[first:end].double(), key) * DIM**-0.5
        later = torch.arange(end) > torch.arange(first, end)[:, None]
        scores[:, :, own - end :].masked_fill_(later[:, own:], -torch.inf)
        out.append(torch.einsum("hlt,htd->lhd", scores.softmax(-1), value))
    return torch.cat(out)


def close(case: Case, got: Tensor, want: Tensor) -> None:
    """As close as the dtype of the output lets it be."""
    torch.testing.assert_close(got.double(), want, **TOLERANCE[case.layout.dtype])


# A few units of the last place in bfloat16; what the kernels' sums of products round in float32.
TOLERANCE = {torch.float32: {"rtol": 1e-3, "atol": 1e-3}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3}}


def test_every_query_sees_what_its_position_says_however_work_is_cut(case, one_thread):
    """Four requests in batches: one in chunks of pages, one all at once, one in odd chunks, one token by token."""
    blocks = case.blocks(count=96)
    asked = [case.request(seed=seed) for seed in (1, 2, 3)] + [case.request(280, seed=4)]
    chunks = [64, TOKENS, 37, 1]
    while work := [
        (a, min(n, len(a.key) - a.computed)) for a, n in zip(asked, chunks, strict=True) if a.computed < len(a.key)
    ]:
        blocks.step(work)
    for each in asked:
        close(case, each.out, expected(case, each))


def test_a_shared_block_is_what_it_would_be_cold_and_is_never_written_again(case, one_thread):
    """A request that finds the first packed block and the exact ones at its end goes on as if they were its own."""
    blocks = case.blocks()
    first, second, prefix = case.request(), case.request(), case.layout.tokens
    blocks.step([(first, prefix)])
    shared = [*first.packed, *(block for block in first.exact if block)]
    before = blocks.memory[shared].clone()
    second.packed, second.exact = list(first.packed), list(first.exact)
    second.computed, second.out = prefix, first.out
    for x, y in zip((second.query, second.key, second.value), (first.query, first.key, first.value), strict=True):
        x[prefix:] = y[prefix:].flip(0)
    packed = len(first.packed)
    blocks.give_back = lambda given: None  # somebody else has them still
    while second.computed < TOKENS:
        blocks.step([(second, min(100, TOKENS - second.computed)), *([(first, 1)] if first.computed < TOKENS else [])])
    assert packed == 1 and torch.equal(blocks.memory[shared].view(torch.int16), before.view(torch.int16))
    close(case, second.out, expected(case, second))


def test_drafts_that_are_taken_back_leave_no_trace(case, one_thread):
    """Prompt and answer, drafts with it, some accepted; pages are those of one token after the other, bit for bit."""
    case = dataclasses.replace(case, layout=dataclasses.replace(case.layout, drafts=True))
    drafting, plain, accepts = case.request(), case.request(), np.random.default_rng(0)
    pools = [case.blocks(), case.blocks()]
    for blocks, asked in zip(pools, (drafting, plain), strict=True):
        blocks.step([(asked, 70)])
    while drafting.computed < TOKENS:
        drafts = min(int(accepts.integers(7)), TOKENS - drafting.computed - 1)
        pools[0].draft(drafting, drafts, int(accepts.integers(drafts + 1)))
    while plain.computed < TOKENS:
        pools[1].step([(plain, 1)])
    close(case, drafting.out, expected(case, drafting))
    got, want = (
        torch.cat([blocks.pool.pages[block] for block in asked.packed], 1)[:, : TOKENS // PAGE - EXACT + 1]
        for blocks, asked in zip(pools, (drafting, plain), strict=True)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("end", range(1, 8))
def test_a_draft_may_end_a_block_and_be_taken_back(end, one_thread):
    """Wherever it is cut, as often as it happens: the queries that its pages wait for are still there."""
    config, dtype = LAYOUTS["bfloat16"]
    layout = BlockLayout.of(config, DIM, GROUP, dtype, drafts=True)
    case = Case(layout, column_map(layout.fmt, 3, batch=1, heads=HEADS))
    asked, blocks = case.request(layout.tokens + 100), case.blocks()
    blocks.step([(asked, layout.tokens - end)])
    for _ in range(3):
        blocks.draft(asked, 7, 0)
    blocks.step([(asked, layout.tokens + 100 - asked.computed)])
    close(case, asked.out, expected(case, asked))
    got = torch.cat([blocks.pool.pages[block] for block in asked.packed[:1]], 1)
    assert torch.equal(got, torch.stack([page(case, asked, number) for number in range(layout.pages)], 1))


def test_sinks_keep_their_slots_where_queries_look_at_single_tokens(case, one_thread):
    """Many tokens are then given exactly nothing, as sinks are."""
    blocks, asked = case.blocks(), case.request(500)
    asked.query *= 4000
    blocks.step([(asked, 500)])
    made = blocks.pool.pages[asked.packed[0], :, :3].unbind(1)
    assert all(torch.equal(own, page(case, asked, p)) for p, own in enumerate(made))


def test_blocks_of_too_few_pages_are_refused():
    with pytest.raises(ValueError, match=r"at least two pages and a query, and has room for 1 pages of 8384 bytes"):
        BlockLayout.of(LogQuantConfig(bits=8, key_columns=1.0), 64, 3, torch.bfloat16)


def test_many_query_heads_keep_fewer_queries():
    layout = BlockLayout.of(LogQuantConfig(), 128, 16, torch.bfloat16)
    assert 0 < layout.queries < 16


def test_a_batch_that_is_there_for_its_shape_alone_writes_to_block_0(case):
    """As vLLM has them while other processes work: no block is theirs, and slots are -1."""
    blocks, asked = case.blocks(), case.request()
    blocks.step([(asked, TOKENS)])
    before = blocks.memory.clone()
    tables = [torch.zeros(2, 16, dtype=torch.int32) for _ in range(2)]
    batch = Batch(np.array([0, 1, 65]), np.array([700, 255]), *tables, torch.full((65,), -1))
    step = Step.of(batch, case.layout, HEADS)
    assert step.due is not None and (step.kept is not None or case.layout.pages == EXACT)
    new = [x[:65] for x in (asked.query, asked.key, asked.value)]
    attention.forward(*new, blocks.pool, step, blocks.quantizer, torch.empty_like(new[0]))
    changed = (before.view(torch.uint8) != blocks.memory.view(torch.uint8)).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [0]


def test_what_a_profiling_run_sees_is_what_rows_take(case):
    blocks, asked = case.blocks(), case.request()
    blocks.step([(asked, TOKENS - 1)])
    table = torch.zeros(3, 16, dtype=torch.int32)
    batch = Batch(np.arange(4), np.array([700, 800, 900]), table, table, torch.zeros(3, dtype=torch.int64))
    (rows,) = Step.of(batch, case.layout, HEADS).rows
    assert blocks.pool.tokens[rows.window].nbytes == case.layout.window_nbytes(3, HEADS)
