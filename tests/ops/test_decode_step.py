"""A step in tensors of fixed size (``ops.decode_step_``), on every backend: a token appended, and attention as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant import LogQuantConfig, ops
from logquant.format import DTYPES
from logquant.ops import reference
from tests.helpers.backends import BACKENDS, CPU_SETS, EMULATED, on
from tests.helpers.problems import Problem
from tests.helpers.strategies import dtypes, formats, seeds

backends = pytest.mark.parametrize("backend", BACKENDS)
DEFAULT = LogQuantConfig().page_format(64)
IN_PLACE = ("window_k", "window_v", "positions", "lengths", "attention", "queries", "seen")


def state_of(problem: Problem, used: list[tuple[int, int]], *, kept: int, counts: bool) -> dict[str, Tensor]:
    """What a layer holds: rows that use so many pages and window slots of a problem."""
    batch, heads, slots, dim = problem.window_k.shape
    random = torch.Generator().manual_seed(len(used))
    packed = problem.pages.shape[2] * problem.fmt.page_tokens
    positions = torch.stack([torch.randperm(packed + slots, generator=random) for _ in used]).int()
    return {
        "pages": problem.pages,
        "window_k": problem.window_k.clone(),
        "window_v": problem.window_v.clone(),
        "positions": positions,
        "lengths": torch.tensor(used, dtype=torch.int32),
        "attention": torch.rand(batch, heads, slots if counts else 0, generator=random),
        "queries": torch.zeros(batch, problem.q.shape[1], kept, dim, dtype=problem.dtype),
        "seen": torch.full((batch,), packed + slots + 7),
    }


def new_token(problem: Problem) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = problem.window_k.shape
    random = torch.Generator().manual_seed(5)
    k = torch.randn(batch, heads, 1, dim, generator=random)
    v = torch.randn(batch, heads, 1, problem.fmt.value_dim, generator=random)
    return k.to(problem.dtype), v.to(problem.dtype)


def step(problem: Problem, state: dict[str, Tensor], k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.decode_step_(
        problem.q, k, v, **state, fmt=problem.fmt, scale=problem.scale, key_map=problem.key_map, **options
    )


@backends
@given(
    fmt=formats(),
    dtype=dtypes,
    seed=seeds,
    group=st.integers(1, 4),
    used=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 79)), min_size=1, max_size=3),
    kept=st.integers(0, 5),
    counts=st.booleans(),
    masked=st.booleans(),
)
def test_a_step_is_an_append_and_an_attend(backend, fmt, dtype, seed, group, used, kept, counts, masked):
    problem = Problem(fmt, packed=3 * fmt.page_tokens, exact=80, batch=len(used), group=group, dtype=dtype, seed=seed)
    state, (k, v) = state_of(problem, used, kept=kept, counts=counts), new_token(problem)
    before = {name: x.clone() for name, x in state.items()}
    options = {}
    if masked:
        options["mask"] = torch.rand(len(used), 1, 1, int(state["seen"][0]) + 1) < 0.7
    with on(backend):
        out = step(problem, state, k, v, **options)

    packed, want = 3 * fmt.page_tokens, before
    for row, (_, slots) in enumerate(used):
        want["window_k"][row, :, slots], want["window_v"][row, :, slots] = k[row, :, 0], v[row, :, 0]
        want["positions"][row, packed + slots] = before["seen"][row]
        want["lengths"][row, 1] += 1
        if kept:
            want["queries"][row, :, int(before["seen"][row]) % kept] = problem.q[row, :, 0]
    arguments = problem.q, problem.pages, want["window_k"], want["window_v"], fmt
    by_position = {"positions": want["positions"]} if masked else {}
    options |= by_position | {"scale": problem.scale, "key_map": problem.key_map, "lengths": want["lengths"]}
    with on(backend):
        if counts:
            expected, _, given_now = ops.observed_attend(*arguments, **options, attention=want["attention"])
            want["attention"] = given_now
        else:
            expected, _ = ops.attend(*arguments, **options)
    want["seen"] = before["seen"] + 1
    assert torch.equal(out, expected), "the same bits"
    for name in IN_PLACE:
        assert torch.equal(state[name], want[name]), name


@pytest.mark.parametrize("backend", ["reference", *CPU_SETS])
def test_a_row_without_room_is_refused_and_nothing_changes(backend):
    problem = Problem(DEFAULT, packed=64, exact=80, batch=2)
    state, (k, v) = state_of(problem, [(1, 79), (1, 80)], kept=2, counts=True), new_token(problem)
    before = {name: x.clone() for name, x in state.items()}
    with on(backend), pytest.raises(RuntimeError, match="room for another token"):
        step(problem, state, k, v)
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_cannot_tell_and_such_a_row_attends_to_nan(backend, dtype):
    problem = Problem(DEFAULT, packed=64, exact=80, batch=2, dtype=dtype)
    state, (k, v) = state_of(problem, [(1, 70), (1, 80)], kept=2, counts=True), new_token(problem)
    with on(backend):
        out = step(problem, state, k, v)
    assert out[0].isfinite().all() and out[1].isnan().all()
    assert state["lengths"].tolist() == [[1, 71], [1, 80]]
    again = state_of(problem, [(1, 70), (1, 80)], kept=2, counts=True)
    written = {name: again[name] for name in IN_PLACE if name != "attention"}
    reference.append_(problem.q, k, v, **written)
    assert again["window_k"][1, :, -1].isnan().all(), "as the reference says"
    assert torch.equal(again["lengths"], state["lengths"]) and torch.equal(again["seen"], state["seen"])


@pytest.mark.parametrize("backend", CPU_SETS[:1])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("window_k", lambda x: x.mT.contiguous().mT),
        ("window_v", lambda x: x.double()),
        ("positions", lambda x: x[:, 1:]),
        ("lengths", lambda x: x.long()),
        ("lengths", lambda x: x[:1]),
        ("attention", lambda x: x[:, :, 1:]),
        ("queries", lambda x: x[:, 1:]),
        ("seen", lambda x: x.int()),
    ],
)
def test_wrong_arguments_are_named(backend, name, bad):
    problem = Problem(DEFAULT, packed=64, exact=80, batch=2)
    state, (k, v) = state_of(problem, [(1, 3), (1, 4)], kept=2, counts=True), new_token(problem)
    before = {key: x.clone() for key, x in state.items()}
    with on(backend), pytest.raises(RuntimeError, match=name):
        step(problem, state | {name: bad(state[name])}, k, v)
    assert all(torch.equal(state[key], before[key]) for key in state)
