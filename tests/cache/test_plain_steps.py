"""Plain steps, of which a layer is told together: whatever happens in between, all is as if it had looked each time."""

from __future__ import annotations

import copy
import itertools
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.cache import plain_steps
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from tests.helpers.models import tiny_config, tiny_model

HEADS, GROUP, DIM = 2, 3, 32
MODEL = tiny_config(
    num_hidden_layers=1, num_attention_heads=GROUP * HEADS, num_key_value_heads=HEADS, head_dim=DIM, hidden_size=96
)
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "log": {"rule": "log"},
    "recent, 4 bits": {"rule": "recent", "bits": 4},
    "paper": {"rule": "log", "sinks": 0, "key_columns": 1.0, "param_bits": 16},
    "recall": {"recall": "both(pages=0.5;skip=0)"},
    "recall, log": {"rule": "log", "recall": "means(pages=0.3;skip=0)"},
}


class Layer:
    """A layer that is fed at random.

    Args:
        config: of the cache.
        dtype: of what comes.
        together: whether it takes plain steps.
    """

    def __init__(self, config: LogQuantConfig, dtype: torch.dtype, together: bool = True) -> None:
        self.cache, self.dtype = LogQuantCache(MODEL, config), dtype
        self.layer._steps_plainly &= together
        self.random = torch.Generator().manual_seed(0)

    @property
    def layer(self) -> LogQuantLayer:
        return self.cache.layers[0]

    @property
    def is_between(self) -> bool:
        """Whether there are plain steps that the layer has not been told of."""
        return self.layer.plain_step is not None

    def draw(self, heads: int, new: int) -> Tensor:
        return torch.randn(1, heads, new, DIM, generator=self.random).to(self.dtype)

    def come(self, new: int = 1) -> tuple[Any, Tensor]:
        """Tokens come; the view, and their queries."""
        k, v, q = self.draw(HEADS, new), self.draw(HEADS, new), self.draw(GROUP * HEADS, new)
        with torch.no_grad():
            keys, _ = self.cache.update(k, v, 0)
        return keys.kv_view, q

    def attend(self, view: Any, q: Tensor, mask: Tensor | None = None, scale: float = 0.25) -> Tensor:
        with torch.no_grad():
            return view.attend(AttentionCall(q, mask, scale, causal=mask is None and q.shape[2] > 1))

    def step(self) -> Tensor:
        return self.attend(*self.come())

    def contents(self) -> list[Tensor]:
        """All that is held, committed."""
        layer = copy.deepcopy(self.cache).layers[0]
        tensors, _ = layer.state()
        return [*tensors.values(), layer.held.layout.positions(torch.device("cpu"))]


def dense_attention(layer: Layer) -> Tensor:
    view, _ = layer.come()
    out = view.dense()[0]
    view.observe(None)
    return out


def masked(layer: Layer) -> Tensor:
    view, q = layer.come()
    seen = torch.ones(1, 1, 1, view.length, dtype=torch.bool)
    seen[..., 5:9] = False
    return layer.attend(view, q, seen)


def attended_twice(layer: Layer) -> Tensor:
    view, q = layer.come()
    layer.attend(view, q.flip(1))
    return layer.attend(view, q)


def looked_at_before_it_attends(layer: Layer) -> Tensor:
    view, q = layer.come()
    assert layer.layer.nbytes > 0 and not layer.is_between
    return layer.attend(view, q)


def looked_at_between(layer: Layer) -> Tensor:
    view, q = layer.come()
    layer.attend(view, q.flip(1))
    copy.deepcopy(layer.cache)
    return layer.attend(view, q)


def told(layer: Layer) -> Tensor:
    """Other attention, that says what it asked."""
    view, q = layer.come()
    view.observe(AttentionCall(q, None, 0.25))
    return q


def refused(layer: Layer) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="key_states must be"):
        layer.cache.update(torch.zeros(1, HEADS + 1, 1, DIM), torch.zeros(1, HEADS + 1, 1, DIM), 0)


def drafts(layer: Layer, *chunks: int) -> Tensor:
    layer.cache.activate_past_recording()
    outs = [layer.attend(*layer.come(new)) for new in chunks]
    layer.cache.crop(-2)
    layer.layer.record_past = False
    return torch.cat(outs, 2)


def replaced(layer: Layer) -> None:
    layer.cache = copy.deepcopy(layer.cache)


def with_gradients(layer: Layer) -> Tensor:
    k, v, q = layer.draw(HEADS, 1), layer.draw(HEADS, 1), layer.draw(GROUP * HEADS, 1)
    return layer.cache.update(k, v, 0)[0].kv_view.attend(AttentionCall(q, None, 0.25))


def attended_with_gradients(layer: Layer) -> Tensor:
    view, q = layer.come()
    view.attend(AttentionCall(q.requires_grad_(), None, 0.25)).sum().backward()
    assert q.grad is not None
    return q.grad


def in_inference_mode(layer: Layer) -> Tensor:
    with torch.inference_mode():
        return torch.cat([layer.step() for _ in range(3)]).clone()


EVENTS: dict[str, Any] = {
    "crop the last": lambda layer: layer.cache.crop(-1),
    "crop some": lambda layer: layer.cache.crop(-7),
    "crop nothing": lambda layer: layer.cache.crop(0),
    "select": lambda layer: layer.cache.reorder_cache(torch.tensor([0])),
    "commit": lambda layer: layer.cache.commit(),
    "look": lambda layer: layer.layer.nbytes,
    "chunk": lambda layer: layer.attend(*layer.come(11)),
    "no attention": lambda layer: layer.come()[1],
    "other scale": lambda layer: layer.attend(*layer.come(), scale=0.5),
    "dense": dense_attention,
    "masked": masked,
    "twice": attended_twice,
    "looked at": looked_at_before_it_attends,
    "looked at between": looked_at_between,
    "told": told,
    "refused": refused,
    "drafts at once": lambda layer: drafts(layer, 5),
    "drafts one by one": lambda layer: drafts(layer, 1, 1, 1),
    "copy": replaced,
    "gradients": with_gradients,
    "attention with gradients": attended_with_gradients,
    "inference mode": in_inference_mode,
    "nothing": lambda layer: None,
}


@pytest.mark.parametrize("config", CONFIGS)
@given(
    prompt=st.integers(1, 200),
    program=st.lists(st.tuples(st.integers(0, 70), st.sampled_from(sorted(EVENTS))), min_size=1, max_size=6),
    half=st.booleans(),
)
def test_all_is_as_if_the_layer_had_looked_each_time(config, prompt, program, half):
    """Outputs, and whatever a file would hold, bit for bit."""
    dtype = torch.bfloat16 if half else torch.float32
    layers = [Layer(LogQuantConfig(window=32, **CONFIGS[config]), dtype, together) for together in (True, False)]
    for layer in layers:
        layer.attend(*layer.come(prompt))
    for count, event in [*program, (9, "nothing")]:
        for _ in range(count):
            got, want = (layer.step() for layer in layers)
            assert torch.equal(got, want)
        got, want = (EVENTS[event](layer) for layer in layers)
        assert torch.equal(got, want) if isinstance(got, Tensor) else got == want
        assert layers[0].layer.length == layers[1].layer.length
        assert not layers[1].is_between
    pairs = zip(*(layer.contents() for layer in layers), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("config", CONFIGS)
def test_most_steps_are_plain(config):
    layer = Layer(LogQuantConfig(window=32, **CONFIGS[config]), torch.float32)
    layer.attend(*layer.come(70))
    plain = 0
    for _ in range(160):
        layer.step()
        plain += layer.is_between
    assert plain >= 140


def test_a_view_serves_until_the_next_token_comes_and_no_longer():
    layer = Layer(LogQuantConfig(window=32), torch.float32)
    layer.attend(*layer.come(70))
    for _ in range(9):
        layer.step()
    view, q = layer.come()
    assert isinstance(view, plain_steps.PlainToken) and view.length == 80
    out = layer.attend(view, q)
    assert torch.equal(layer.attend(view, q), out)
    for look in (lambda: layer.layer.nbytes, layer.layer.commit, lambda: copy.deepcopy(layer.cache)):
        look()
        assert torch.equal(layer.attend(view, q), out)
        assert view.dense()[0].shape[2] == 80
    layer.step()
    with pytest.raises(RuntimeError, match="stale"):
        layer.attend(view, q)


def test_where_a_step_looks_at_more_each_is_told():
    layer = Layer(LogQuantConfig(window=32, prune="keydiff(keep=0.5)"), torch.float32)
    layer.attend(*layer.come(70))
    for _ in range(20):
        layer.step()
        assert not layer.is_between


def test_layers_go_on_sharing_what_they_work_out_of_their_rows():
    """Where tokens are, though one layer is looked at by itself in between; and then no bytes are held twice."""
    model = tiny_model(num_hidden_layers=4)
    model.set_attn_implementation("logquant")
    ids = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    held = []
    for together in (True, False):
        cache = LogQuantCache(model.config, window=32, rule="log")
        for layer in cache.layers:
            layer._steps_plainly &= together
        with torch.no_grad():
            model(ids, **as_argument(cache))
            for i in range(150):
                model(ids[:, i % 100][:, None], **as_argument(cache))
                if i == 70:
                    assert cache.layers[2].nbytes > 0
            assert (cache.layers[0].plain_step is not None) == together
            model(ids[:, :9], **as_argument(cache))
        assert len({id(layer.rows) for layer in cache.layers}) == 1
        held.append(cache.nbytes)
    assert held[0] == held[1]


def test_a_look_in_the_midst_of_a_step_takes_no_token_twice(monkeypatch):
    """As of a thread that watches the cache."""
    watched, other = (Layer(LogQuantConfig(window=32), torch.float32) for _ in range(2))
    for layer in (watched, other):
        layer.attend(*layer.come(70))
        for _ in range(8):
            layer.step()
    step = plain_steps.PlainStep.next

    def looked_at(*args: Any) -> Any:
        made = step(*args)
        assert watched.layer.nbytes > 0
        return made

    with monkeypatch.context() as patch:
        patch.setattr(plain_steps.PlainStep, "next", looked_at)
        watched.step()
    other.step()
    for _ in range(30):
        assert torch.equal(watched.step(), other.step())
    assert all(torch.equal(a, b) for a, b in zip(watched.contents(), other.contents(), strict=True))


def interrupted(line: int, act: Any) -> bool:
    """``act()`` with a Ctrl-C at the so-manieth line of the cache; whether there were fewer."""
    reached = itertools.count(1)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("layer.py", "plain_steps.py", "contents.py", "held.py")):
            return None
        if event == "line" and next(reached) == line:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


@torch.no_grad()
@pytest.mark.parametrize("looking", [False, True])
def test_what_is_interrupted_anywhere_is_as_before_or_as_it_is_to_be(looking):
    """Ctrl-C in a step or a look; then what did not come, comes again."""
    for line in itertools.count(1):
        layer, other = (Layer(LogQuantConfig(window=32), torch.float32) for _ in range(2))
        for each in (layer, other):
            each.attend(*each.come(70))
            for _ in range(8):
                each.step()
        states = layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0
        act = partial(getattr, layer.layer, "nbytes") if looking else partial(layer.cache.update, *states)
        done = interrupted(line, act)
        if not looking:
            other.cache.update(*states)
        for _ in range(other.layer.length - layer.layer.length):
            layer.cache.update(*states)
        other.random.set_state(layer.random.get_state())
        for _ in range(30):
            assert torch.equal(layer.step(), other.step())
        assert all(torch.equal(a, b) for a, b in zip(layer.contents(), other.contents(), strict=True))
        if done:
            break
    assert line > 10
