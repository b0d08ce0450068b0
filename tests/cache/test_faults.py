"""Faults: out of memory at every allocation, interrupts, changed dtypes. Nothing that was there is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logquant import LogQuantCache, ops
from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from logquant.cache.storage import Storage
from logquant.compat import as_argument
from tests.helpers.layers import make_layer, random_tokens, row_contents
from tests.helpers.masks import causal_mask, pad_mask
from tests.helpers.models import tiny_model


class FailingAllocation(TorchDispatchMode):
    """The n-th operation that makes a tensor fails as it does when memory runs out."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = n, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        made = [r for r in tree_leaves(result) if isinstance(r, Tensor) and r.numel()]
        makes_one = any(r.untyped_storage().data_ptr() not in given for r in made)
        if makes_one:
            self.left -= 1
            if self.left < 0:
                raise self.error("out of memory: injected")
        return result


def state(layer: LogQuantLayer) -> list[Tensor]:
    layer.commit()
    rows = layer.held.layout.positions(torch.device("cpu")).clone()
    return [rows] + [t.clone() for i in range(layer.batch_size) for t in row_contents(layer, i)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


K, V = random_tokens(900, batch=2)
PADDED = torch.cat([pad_mask([300, 230], "left"), torch.ones(2, 600, dtype=torch.long)], 1)


def step(layer: LogQuantLayer, start: int, new: int, mask: bool) -> None:
    part = slice(start, start + new)
    keys, _ = layer.update(K[:, :, part], V[:, :, part])
    seen = causal_mask(PADDED[:, : start + new], new) if mask else None
    keys.kv_view.attend(AttentionCall(K[:, :, part], seen, 1.0, causal=not mask))
    layer.commit()
    assert layer.rows.length == start + new


# name: (columns before, what is done)
OPERATIONS = {
    "prompt": ([], lambda layer, mask: step(layer, 0, 300, mask)),
    "step": ([300], lambda layer, mask: step(layer, 300, 1, mask)),
    "step that evicts": ([300, *[1] * 83], lambda layer, mask: step(layer, 383, 1, mask)),
    "chunk": ([300], lambda layer, mask: step(layer, 300, 200, mask)),
    "crop of packed tokens": ([300, 300], lambda layer, mask: layer.crop(-250)),
    "reorder": ([300], lambda layer, mask: layer.reorder_cache(torch.tensor([1, 1]))),
    "repeat": ([300], lambda layer, mask: layer.batch_repeat_interleave(2)),
    "deepcopy": ([300], lambda layer, mask: copy.deepcopy(layer)),
}


@pytest.mark.parametrize("rule", ["log", "attention"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_of_memory_at_any_allocation_loses_nothing(operation, mask, rule):
    """After each failure either nothing has happened, or the tokens have come; a second try then gives what is due."""
    before, act = OPERATIONS[operation]
    want = make_layer(rule=rule)
    start = 0
    for n in before:
        step(want, start, n, mask)
        start += n
    failing = copy.deepcopy(want)
    held = state(want) if start else None
    act(want, mask)
    due = state(want)
    failures = 0
    while True:
        layer = copy.deepcopy(failing)
        try:
            with FailingAllocation(failures, torch.OutOfMemoryError):
                act(layer, mask)
            break
        except torch.OutOfMemoryError:
            failures += 1
        came = layer.get_seq_length() - start
        assert layer.get_seq_length() == layer.rows.length + (layer.uncommitted.new if layer.uncommitted else 0)
        if came > 0:
            layer.crop(-came)
        if held is None:
            assert layer.get_seq_length() == 0
        elif came < 0:
            assert same(state(layer), due)
            continue
        else:
            assert same(state(layer), held)
        act(layer, mask)
        assert same(state(layer), due)
    assert failures > 0
    assert same(state(layer), due)


@pytest.mark.parametrize(("rule", "within"), [("log", (ops, "evict_")), ("attention", (Storage, "replace"))])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_eviction_makes_the_layer_cleanly_invalid(monkeypatch, error, rule, within):
    layer = make_layer(rule=rule)
    for start, n in ((0, 300), *((300 + i, 1) for i in range(83))):
        step(layer, start, n, False)

    def interrupted(*args, **kwargs):
        raise error("interrupted")

    monkeypatch.setattr(*within, interrupted)
    with pytest.raises(error):
        step(layer, 383, 1, False)
    monkeypatch.undo()
    for use in (
        lambda: step(layer, 384, 1, False),
        lambda: layer.crop(-1),
        lambda: copy.deepcopy(layer),
        lambda: layer.reorder_cache(torch.tensor([0, 1])),
    ):
        with pytest.raises(RuntimeError, match=r"layer is invalid: an earlier call was interrupted.*reset\(\)"):
            use()
    layer.reset()
    step(layer, 0, 300, False)
    assert layer.get_seq_length() == 300


@pytest.mark.parametrize("failing_layer", [0, 1, 2])
@pytest.mark.parametrize("new", [1, 100])
@pytest.mark.parametrize("first", [300, 383])
@pytest.mark.parametrize("rule", ["log", "attention"])
def test_rewind_after_an_error_within_a_forward_pass(failing_layer, new, first, rule):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    ids = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(0))
    cache = LogQuantCache(model.config, rule=rule)
    with torch.no_grad():
        model(ids[:, :first], **as_argument(cache))
        want = copy.deepcopy(cache)
        hook = model.model.layers[failing_layer].self_attn.o_proj.register_forward_hook(
            lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("injected"))
        )
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, first : first + new], **as_argument(cache))
        hook.remove()
        if failing_layer < 2:
            with pytest.raises(ValueError, match=r"the layers of the cache hold .* tokens.*rewind\(\) the cache"):
                cache.check_layers_agree()
            careless = copy.deepcopy(cache)
            with pytest.raises(RuntimeError, match=r"an earlier forward pass ended early. Call cache.rewind\(\)"):
                model(ids[:, first : first + new], **as_argument(careless))
            assert careless.rewind() == first
            model(ids[:, first : first + new], **as_argument(careless))
            if new == 1:
                assert cache.rewind() == first
                for layer, other in zip(cache.layers, want.layers, strict=True):
                    assert same(state(layer), state(other))
            else:
                assert cache.rewind() == first
            cache.check_layers_agree()
            assert [layer.get_seq_length() for layer in cache.layers] == [first] * 3
            model(ids[:, first : first + new], **as_argument(cache))
        assert cache.get_seq_length() == first + new


def test_rewind_of_an_unfinished_prompt_empties_the_cache():
    model = tiny_model()
    cache = LogQuantCache(model.config)
    k, v = random_tokens(300, heads=2, dim=32, value_dim=32)
    cache.update(k, v, 0)
    assert cache.rewind() == 0 and cache.get_seq_length() == 0
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long), **as_argument(cache))
    assert cache.get_seq_length() == 300
