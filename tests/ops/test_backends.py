"""The choice of backend, and what stands beside the compiled operators: fakes and fallbacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from logquant import ops
from logquant.format import PageFormat
from logquant.ops import compiled, reference, registry
from tests.helpers.backends import OnDevice
from tests.helpers.problems import Problem

OPERATORS = [
    "quantize",
    "dequantize",
    "evict_",
    "attend",
    "decode_step_",
    "page_scores",
    "choose_pages",
    "choose_leaving",
]


# ------------------------------------------------------------------------------------------------- torch's own checks
def opcheck_arguments() -> dict[str, tuple[Any, ...]]:
    fmt = PageFormat(64)
    problem = Problem(fmt, packed=128, exact=192, batch=2, seed=3)
    fields = fmt.fields()
    window = [x.clone() for x in (problem.window_k, problem.window_v)]
    return {
        "quantize": (problem.window_k, problem.window_v, fields),
        "dequantize": (problem.pages, fields, torch.bfloat16),
        "evict_": (*window, problem.pages.clone(), fields, 1, 192, 1, 2, 64),
        "attend": (problem.q, problem.pages, problem.window_k, problem.window_v, fields, 0.125),
        "decode_step_": step_arguments(problem),
        "page_scores": (problem.q, problem.pages, fields, 0.125),
        "choose_pages": (torch.randn(2, 4, 1, 9), torch.tensor([[3]], dtype=torch.int32), 2, 3),
        "choose_leaving": (torch.randn(2, 200), 4, 136, 64, list(range(64))),
    }


def step_arguments(problem: Problem) -> tuple[Any, ...]:
    batch, heads, _, dim = problem.window_k.shape
    new = torch.randn(batch, heads, 1, dim)
    slots = [torch.zeros(batch, 128 + 192, dtype=torch.int32), torch.tensor([[2, 100]] * batch, dtype=torch.int32)]
    state = torch.rand(batch, heads, 192), torch.zeros(batch, problem.q.shape[1], 4, dim), torch.full((batch,), 228)
    window = [x.clone() for x in (problem.window_k, problem.window_v)]
    return problem.q, new, new, problem.pages, *window, *slots, *state, problem.fmt.fields(), 0.125


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.logquant, name).default, opcheck_arguments()[name])


@pytest.mark.parametrize("slots", [0, 100, 192])
def test_opcheck_with_attention(slots):
    arguments = opcheck_arguments()["attend"]
    attention = torch.rand(2, 2, slots)
    torch.library.opcheck(torch.ops.logquant.attend.default, arguments, {"attention": attention})


def test_compiles_without_graph_breaks():
    fmt = PageFormat(64)
    problem = Problem(fmt, packed=128, exact=64, seed=3)

    def step(q: Tensor, pages: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.logquant.attend(2 * q, pages, k, v, fmt.fields(), 0.125)[0] + 1

    arguments = problem.q, problem.pages, problem.window_k, problem.window_v
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(traced(*arguments), step(*arguments))


# -------------------------------------------------------------------------------------------------------- fallbacks
def test_a_device_without_kernels_gets_the_reference_with_one_warning():
    """What the dispatcher runs for a device it has no kernel for, here the first that nobody compiled for."""
    fmt = PageFormat(64)
    problem = Problem(fmt, packed=128, exact=192, seed=3)
    tensors = problem.q, problem.pages, problem.window_k, problem.window_v

    def elsewhere() -> tuple[Tensor, ...]:
        keys, operators = torch._C.DispatchKeySet(torch._C.DispatchKey.MAIA), torch.ops.logquant
        packed = operators.quantize.default.redispatch(keys, *tensors[2:], fmt.fields(), None, None)
        restored = operators.dequantize.default.redispatch(keys, packed, fmt.fields(), torch.float16)
        return packed, *restored, *operators.attend.default.redispatch(keys, *tensors, fmt.fields(), 0.125)

    compiled.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="has no kernels for 'cpu' tensors and runs in plain torch") as caught:
        results = elsewhere()
    assert len(caught) == 1
    pages = reference.quantize(problem.window_k, problem.window_v, fmt)
    restored = reference.dequantize(pages, fmt, dtype=torch.float16)
    attended = problem.call(reference.attend, problem.q)
    for got, want in zip(results, (pages, *restored, *attended), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_an_unknown_backend_is_refused():
    message = "backend must be one of 'auto', 'reference', 'compiled'.*, got 'tpu'"
    with pytest.raises(ValueError, match=message), ops.use_backend("tpu"):
        pass


def test_no_backend_takes_the_place_of_another():
    for name in ("auto", "reference", "compiled", "cpu"):
        with pytest.raises(ValueError, match=f"there is a backend '{name}' already"):
            ops.register(name, reference)


def test_without_the_extension_plain_torch_runs_and_says_so(monkeypatch):
    problem = Problem(PageFormat(64), packed=128, exact=64, seed=3)
    want = problem.run("reference")
    monkeypatch.setattr(compiled, "extension_error", lambda: "it was not built")
    compiled.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch, which is slow: it was not built"):
        got = problem.call(ops.attend, problem.q)
    assert torch.equal(got[0], want[0])
    for name in ("compiled", "cpu"):
        message = f"backend '{name}' is not available: it was not built"
        with pytest.raises(RuntimeError, match=message), ops.use_backend(name):
            pass


def test_a_registered_backend_is_chosen_by_its_name_within_the_block(monkeypatch):
    class Counting:
        """The reference, which says what it was asked for."""

        def __init__(self):
            self.called = []

        def __getattr__(self, name):
            self.called.append(name)
            return getattr(reference, name)

    counting, fmt = Counting(), PageFormat(64)
    problem = Problem(fmt, packed=128, exact=192, seed=3)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    ops.register("counting", counting)
    with ops.use_backend("counting"):
        with ops.use_backend("reference"):
            ops.quantize(problem.window_k, problem.window_v, fmt)
        pages = ops.quantize(problem.window_k, problem.window_v, fmt)
        ops.dequantize(pages, fmt)
        ops.evict_(problem.window_k, problem.window_v, pages, fmt, page=0, tokens=192, start=1, step=2, count=64)
        got = problem.call(ops.attend, problem.q)
    assert counting.called == ["quantize", "dequantize", "evict_", "attend"]
    assert torch.equal(got[0], problem.run("reference")[0])
    ops.quantize(problem.window_k, problem.window_v, fmt)
    assert len(counting.called) == 4


@pytest.mark.parametrize("name", OPERATORS)
def test_signatures_are_those_of_the_schema_in_its_order(name):
    """Arguments reach a backend by their places."""
    typed, plain = (list(inspect.signature(getattr(x, name)).parameters.values()) for x in (ops, reference))
    schema = getattr(torch.ops.logquant, name).default._schema
    names = [{"format": "fmt"}.get(argument.name, argument.name) for argument in schema.arguments]
    assert [x.name for x in plain] == names
    optional = [argument.default_value for argument in schema.arguments if argument.has_default_value()]
    assert optional == [x.default for x in plain if x.default is not x.empty and x.name != "dtype"]
    if name == "attend":  # two functions: without attention, and with it
        observed = list(inspect.signature(ops.observed_attend).parameters.values())
        assert observed[:-1] == typed
        assert (observed[-1].name, observed[-1].annotation) == ("attention", "Tensor")
        assert plain.pop().annotation == "Tensor | None"
    assert [(x.name, x.default, x.annotation) for x in typed] == [(x.name, x.default, x.annotation) for x in plain]


def test_the_cuda_backend_moves_tensors_and_brings_results_back():
    """How tests run on a GPU, tried with the CPU as the other device."""
    device = OnDevice("cpu")
    fmt = PageFormat(64)
    problem = Problem(fmt, packed=128, exact=192, seed=3)
    for got, want in zip(problem.call(device.attend, problem.q)[:2], problem.run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    pages = device.quantize(problem.window_k, problem.window_v, fmt)
    assert torch.equal(pages, reference.quantize(problem.window_k, problem.window_v, fmt))
    changed = [problem.window_k.clone(), problem.window_v.clone(), torch.zeros_like(pages)]
    expected = [x.clone() for x in changed]
    for function, tensors in ((device.evict_, changed), (reference.evict_, expected)):
        function(*tensors, fmt, page=0, tokens=192, start=1, step=2, count=64)
    assert torch.equal(changed[2], expected[2])
    assert torch.equal(changed[0][:, :, :128], expected[0][:, :, :128])
