"""The closed form of the rule against the rule as the paper states it, step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logquant.window import RULES, Rule, Slots, evicted_slots, evictions, split_positions

CPU = torch.device("cpu")
rules = st.sampled_from(RULES)


def step_by_step(tokens: int, window: int, rule: Rule, sinks: int) -> tuple[list[int], list[int]]:
    """DESIGN section 2, one token at a time."""
    kept_apart: list[int] = []
    exact: list[int] = []
    packed: list[int] = []
    for position in range(tokens):
        if position < sinks:
            kept_apart.append(position)
            continue
        exact.append(position)
        while len(exact) >= 3 * window:
            if rule == "log":
                head = exact[: 2 * window]
                packed += head[1::2]
                exact = head[0::2] + exact[2 * window :]
            else:
                packed += exact[:window]
                exact = exact[window:]
    return packed, kept_apart + exact


@given(tokens=st.integers(0, 900), window=st.integers(1, 40), rule=rules, sinks=st.integers(0, 6))
def test_closed_form_is_the_rule(tokens, window, rule, sinks):
    packed, exact = split_positions(tokens, window, rule, sinks)
    assert (packed.tolist(), exact.tolist()) == step_by_step(tokens, window, rule, sinks)


@pytest.mark.parametrize("window", [32, 64, 128])
@pytest.mark.parametrize("rule", RULES)
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


class PlainSlots:
    """The state as lists, with the rule as a loop: what Slots must say after any sequence of operations."""

    def __init__(self, window: int, rule: Rule, sinks: int) -> None:
        self.window, self.rule, self.sinks = window, rule, sinks
        self.packed: list[int] = []
        self.exact: list[int] = []
        self.total = 0

    def append(self, tokens: int, recallable: int) -> None:
        row = self.exact + list(range(self.total, self.total + tokens))
        self.total += tokens
        # The rule looks at all but the newest tokens; those it has looked at before it looks at again.
        decided = max(len([p for p in row if p < self.settled]), len(row) - recallable)
        self.settled = max(self.settled, self.total - recallable)
        head, tail = row[:decided], row[decided:]
        while len(head) >= 3 * self.window + self.sinks:
            leaving = head[evicted_slots(self.rule, self.window, self.sinks)]
            self.packed += leaving
            head = [p for p in head if p not in set(leaving)]
        self.exact = head + tail

    settled = 0

    def crop(self, tokens: int) -> None:
        self.total = max(0, self.total - tokens)
        self.settled = min(self.settled, self.total)
        self.exact = [p for p in self.exact if p < self.total]
        self.packed = [p if p < self.total else -1 for p in self.packed]
        while self.packed and all(p < 0 for p in self.packed[-self.window :]):
            del self.packed[-self.window :]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 150), st.sampled_from([0, 0, 24])),
        st.tuples(st.just("crop"), st.integers(1, 90)),
    ),
    max_size=10,
)


@given(program=operations, window=st.integers(1, 24), rule=rules, sinks=st.integers(0, 5))
def test_slots_follow_any_program_of_arrivals_and_removals(program, window, rule, sinks):
    slots, plain = Slots(window, rule, sinks), PlainSlots(window, rule, sinks)
    for name, *arguments in program:
        if name == "append":
            leaving, staying = slots.moves(arguments[0], CPU, arguments[1])
            row = plain.exact + list(range(plain.total, plain.total + arguments[0]))
            before = list(plain.packed)
        slots = getattr(slots, name)(*arguments)
        getattr(plain, name)(*arguments)
        if name == "append":
            assert before + [row[i] for i in leaving] == plain.packed
            assert [row[i] for i in staying] == plain.exact
        assert slots.positions(CPU).tolist() == plain.packed + plain.exact
        assert slots.positions(CPU, 3).tolist()[-3:] == [plain.total, plain.total + 1, plain.total + 2]
        assert (slots.tokens, slots.packed, slots.exact) == (plain.total, len(plain.packed), len(plain.exact))
        assert slots.has_dead_slots == (-1 in plain.packed)


@given(tokens=st.integers(0, 400), more=st.integers(0, 60), window=st.integers(1, 24), rule=rules)
def test_a_recalled_arrival_leaves_no_trace(tokens, more, window, rule):
    before = Slots(window, rule).append(tokens)
    after = before.append(more, recallable=more).crop(more).append(0)
    assert (after.tokens, after.settled, after.packed, after.nbytes) == (tokens, tokens, before.packed, 0)


def test_layers_share_the_next_slots():
    slots = Slots(64)
    assert slots.append(7) is slots.append(7)
    assert slots.append(7) is not slots.append(8)


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
