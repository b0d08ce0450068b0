"""The closed form of the rule against the rule as the paper states it, step by step."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant.cache.drafts import cut
from logquant.cache.layout import Rows
from logquant.cache.slots import Slots
from logquant.rule import COUNTED, evicted_slots, evictions, split_positions
from tests.helpers.rows import PlainRow, step_by_step

CPU = torch.device("cpu")
rules = st.sampled_from(COUNTED)


@given(tokens=st.integers(0, 900), window=st.integers(1, 40), rule=rules, sinks=st.integers(0, 6))
def test_closed_form_is_the_rule(tokens, window, rule, sinks):
    packed, exact = split_positions(tokens, window, rule, sinks)
    assert (packed.tolist(), exact.tolist()) == step_by_step(tokens, window, rule, sinks)


@pytest.mark.parametrize("window", [32, 64, 128])
@pytest.mark.parametrize("rule", COUNTED)
def test_properties(window, rule):
    for tokens in (*range(0, 5 * window, 7), 2000):
        packed, exact = split_positions(tokens, window, rule, 4)
        assert sorted(packed.tolist() + exact.tolist()) == list(range(tokens))
        assert len(packed) == window * evictions(tokens, window, 4)
        if tokens >= 3 * window + 4:
            assert 2 * window <= len(exact) - 4 < 3 * window
            assert exact[:4].tolist() == [0, 1, 2, 3], "sinks stay exact"
            assert exact[-window:].tolist() == list(range(tokens - window, tokens)), "the newest W stay exact"


def test_first_token_stays_exact_without_sinks():
    assert split_positions(100_000, 64)[1][0] == 0


def test_density_halves_with_every_window_of_distance():
    _, exact = split_positions(64_000, 64)
    blocks_back = (64_000 - 1 - exact) // 64
    assert blocks_back.bincount()[:7].tolist() == [64, 32, 16, 8, 4, 2, 1]
    assert blocks_back[0] == 999, "and the first token"


def test_a_million_tokens():
    packed, exact = split_positions(1_000_000, 64)
    assert len(packed) == 64 * (1_000_000 // 64 - 2)
    assert len(exact) == 1_000_000 - len(packed)


@given(tokens=st.integers(0, 400), window=st.integers(1, 24), rule=rules, sinks=st.integers(0, 5))
def test_one_eviction_takes_the_stated_slots(tokens, window, rule, sinks):
    taken = evicted_slots(rule, window, sinks)
    full = sinks + 3 * window
    assert len(range(full)[taken]) == window
    packed, _ = split_positions(full, window, rule, sinks)
    assert packed.tolist() == list(range(full)[taken])


BATCH = 3
arrivals = st.integers(0, 70).flatmap(
    lambda n: st.one_of(st.none(), st.lists(st.booleans(), min_size=BATCH * n, max_size=BATCH * n)).map(
        lambda real: (n, real)
    )
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), arrivals, st.sampled_from([0, 0, 24])),
        st.tuples(st.just("crop"), st.integers(1, 90)),
        st.tuples(st.just("select"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
    ),
    max_size=10,
)


def check_rows(rows: Rows, plain: list[PlainRow]) -> None:
    table = rows.positions(CPU, 2)
    assert rows.length == plain[0].length and len(table) == (1 if rows.alike else BATCH)
    for slots, got, row in zip(rows.slots * (BATCH // len(rows.slots)), table.expand(BATCH, -1), plain, strict=True):
        packed, exact = row.layout()
        assert (slots.tokens, slots.packed, slots.exact) == (len(row.real), len(packed), len(exact))
        assert got[: len(packed)].tolist() == packed
        new = [row.length, row.length + 1]
        assert got[rows.packed : rows.packed + len(exact) + 2].tolist() == exact + new
        empty = torch.cat([got[len(packed) : rows.packed], got[rows.packed + len(exact) + 2 :]])
        assert (empty == -1).all()


@given(program=operations, window=st.integers(1, 24), rule=rules, sinks=st.integers(0, 5))
def test_rows_follow_any_program_of_arrivals_removals_and_selections(program, window, rule, sinks):
    rows = Rows((Slots(window, rule, sinks),))
    plain = [PlainRow(window, rule, sinks) for _ in range(BATCH)]
    for name, *arguments in program:
        before = [row.layout() for row in plain]
        if name == "append":
            (count, real), reserved = arguments
            real = None if real is None or all(real) else torch.tensor(real).view(BATCH, count)
            moves = rows.reserving(reserved).moves(count, CPU, real)
            for row, coming in zip(plain, [[True] * count] * BATCH if real is None else real.tolist(), strict=True):
                row.append(coming, reserved)
            for move in moves:
                for row, (packed, exact) in list(zip(plain, before, strict=True))[move.rows]:
                    held = exact + list(range(rows.length, rows.length + count))
                    leaving, tokens = move.leaving[0], move.tokens
                    staying = torch.arange(tokens - len(leaving)) if move.staying is None else move.staying[0]
                    assert len(packed) == move.packed
                    assert packed + [held[i] for i in leaving] == row.layout()[0]
                    assert [held[i] for i in staying] == row.layout()[1]
                    if move.is_step:
                        full = list(range(move.tokens))
                        assert leaving.tolist() == full[evicted_slots(rule, window, sinks)]
            rows = rows.reserving(reserved).append(count, real)
        elif name == "crop":
            after = rows.crop(*arguments)
            for row in plain:
                row.crop(*arguments)
            all_alike = len(after.slots) < len(rows.slots)
            for held, left, (packed, exact), row in zip(
                rows.slots, after.slots * (BATCH if all_alike else 1), before, plain, strict=False
            ):
                slots = packed + exact
                assert [slots[i] for i in held.exact_before(left)] == row.layout()[1]
                assert packed[: left.packed] == row.layout()[0], "packed tokens only ever grow at their end"
            rows = after
        else:
            rows = rows.select(*arguments)
            plain = [copy.deepcopy(plain[i]) for i in arguments[0]] if not rows.alike else plain
        check_rows(rows, plain)


@given(tokens=st.integers(0, 400), more=st.integers(0, 60), window=st.integers(1, 24), rule=rules)
def test_a_recalled_arrival_leaves_no_trace(tokens, more, window, rule):
    before = Slots(window, rule).append(tokens)
    after = before.append(more, reserved=more).crop(more).append(0)
    assert (after.tokens, after.decided, after.packed, after.nbytes) == (tokens, tokens, before.packed, 0)


def test_layers_share_the_next_rows():
    rows = Rows((Slots(64),))
    assert rows.append(7) is rows.append(7)
    assert rows.append(7) is not rows.append(8)
    real = torch.tensor([[True, False]])
    assert rows.append(2, real=real) is rows.append(2, real=real.clone())


def mask_of(*rows: list[int], queries: int = 1) -> Tensor:
    return torch.tensor(rows).bool()[:, None, None].expand(-1, 1, queries, -1)


def test_columns_that_no_query_sees_are_padding():
    rows = Rows((Slots(64),))
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    assert rows.real_positions(None, 3, 2) is None
    assert rows.real_positions(causal, 3, 2) is None
    left = causal & mask_of([0, 1, 1], [1, 1, 1], queries=3)
    real = [[False, True, True], [True, True, True]]
    assert rows.real_positions(left, 3, 2).tolist() == real
    for dtype, low in itertools.product([torch.float32, torch.bfloat16, torch.float16], ["min", "-inf"]):
        hidden = torch.finfo(dtype).min if low == "min" else -torch.inf
        additive = torch.zeros(2, 1, 3, 3, dtype=dtype).masked_fill(~left, hidden)
        assert rows.real_positions(additive, 3, 2).tolist() == real
    after = rows.append(3, real=torch.tensor(real))
    assert after.real_positions(mask_of([0, 1, 1, 1], [1, 1, 1, 0]), 1, 2).tolist() == [[True], [False]]
    assert after.crop(3).alike and after.crop(2).real_positions(mask_of([0, 1], [1, 1]), 1, 2) is None


def test_masks_that_cannot_be_served():
    rows = Rows((Slots(64),))
    with pytest.raises(ValueError, match=r"attention_mask must be .* with 3 positions or more, got \[2, 1,"):
        rows.real_positions(mask_of([1, 1], [1, 1]), 3, 2)
    padded = rows.append(2, real=torch.tensor([[True, True], [False, True]]))
    for mask, got in ((None, "no mask"), (mask_of([1, 1, 1], [1, 1, 1]), "a mask that shows it")):
        with pytest.raises(ValueError, match=rf"must hide position 0 of row 1: it was hidden \(padding\).*got {got}"):
            padded.real_positions(mask, 1, 2)


def test_a_mask_is_looked_at_once_unless_it_changes():
    rows, mask = Rows((Slots(64),)), mask_of([0, 1], [1, 1]).clone()
    first = rows.real_positions(mask, 2, 2)
    assert rows.real_positions(mask, 2, 2) is first
    mask[:] = True
    assert rows.real_positions(mask, 2, 2) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=-1, window=64), "tokens and sinks must not be negative, got -1 and 0"),
        (dict(tokens=1, window=64, sinks=-2), "tokens and sinks must not be negative, got 1 and -2"),
        (dict(tokens=1, window=0), "window must be at least 1, got 0"),
        (dict(tokens=1, window=64, rule="newest"), "rule must be one of log, recent, got 'newest'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_positions(**arguments)


@given(
    before=st.lists(st.integers(0, 60), min_size=BATCH, max_size=BATCH),
    together=st.integers(0, 40),
    real=st.lists(st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), min_size=1, max_size=60),
    window=st.integers(1, 24),
)
def test_drafts_are_cut_where_one_by_one_they_would_evict(before, together, real, window):
    rows = Rows((Slots(window),)).append(60, real=torch.arange(60) < torch.tensor(before)[:, None])
    coming = torch.tensor([[True] * BATCH] * together + real).T
    parts = cut(rows, coming.shape[1], len(real), coming)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(coming.shape[1]))
    ends, grown = {part.stop for part in parts}, rows.append(together, real=coming[:, :together])
    assert together == 0 or together in ends
    for column in range(together, coming.shape[1]):
        after = grown.append(1, real=coming[:, column : column + 1])
        slots = (r.slots * (BATCH // len(r.slots)) for r in (after, grown))
        evicted = any(a.packed > b.packed for a, b in zip(*slots, strict=True))
        assert (column + 1 in ends) == (evicted or column + 1 == coming.shape[1])
        grown = after


def test_the_first_layout_of_a_sequence_does_not_keep_the_later_ones():
    empty = rows = Rows((Slots(8),))
    kept = []
    for _ in range(100):
        after = rows.append(1)
        assert rows.append(1) is after, "the other layers of a step get the same one"
        after.positions(CPU)
        kept.append(weakref.ref(after))
        rows = after
    assert sum(ref() is not None for ref in kept) <= 2 and empty.append(1) is not rows
