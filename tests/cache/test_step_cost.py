"""What a decode step asks of the device beyond what a full cache does: kernels, and numbers that the host waits for."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.attention import masks
from logquant.cache import layout
from logquant.compat import as_argument
from tests.helpers.masks import pad_mask
from tests.helpers.models import tiny_model

LAYERS = 4
# Views, which no device hears of.
VIEWS = {"slice", "view", "expand", "unsqueeze", "select", "detach", "transpose", "alias", "split", "unbind", "squeeze"}
WAITS = {"_local_scalar_dense", "nonzero"}


class Kernels(TorchDispatchMode):
    """Counts the operators that run within; cache/layout.py waits for nothing, for its tensors are on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in VIEWS and not (name in WAITS and _on_host()):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def _on_host() -> bool:
    """Whether cache/layout.py calls."""
    frame: Any = sys._getframe()
    while frame is not None and "/logquant/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == layout.__file__


def step(cache, implementation: str, mask: Tensor | None) -> Counter[str]:
    """The kernels of a step after 303 tokens, which moves none of them."""
    model = tiny_model(num_hidden_layers=LAYERS)
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, 256, (2, 304), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for begin, end in ((0, 300), (300, 301), (301, 302), (302, 303), (303, 304)):
            with Kernels() as kernels:
                seen = None if mask is None else mask[:, :end]
                model(ids[:, begin:end], attention_mask=seen, **as_argument(cache(model.config)))
    return kernels.counts


def once(make):
    made: list[Any] = []
    return lambda config: made[0] if made else (made.append(make(config)), made[0])[1]


def beyond(counts: Counter[str], full: Counter[str]) -> dict[str, int]:
    """How many more than with a full cache, by name."""
    return {name: n - full[name] for name, n in counts.items() if n > full[name]}


@pytest.mark.parametrize("rule", ["attention", "log", "recent"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_fixed_size_is_one_operator_a_layer_and_waits_for_nothing(rule, padded):
    mask = torch.cat([pad_mask([300, 250], "left"), torch.ones(2, 4, dtype=torch.long)], 1) if padded else None
    full = step(once(lambda config: DynamicCache(config=config)), "sdpa", mask)
    counts = step(once(lambda config: LogQuantCache(config, rule=rule, max_length=400)), "logquant", mask)
    more = beyond(counts, full)
    assert more.pop("decode_step_") == LAYERS
    assert not WAITS & more.keys()
    # What is left makes the mask, once a step, from a position that the host does not know.
    assert sum(more.values()) <= 10 and max(more.values(), default=0) < LAYERS + 1, more
    assert sum(counts.values()) <= sum(full.values()) + 10, "no more than with a full cache"


@pytest.mark.parametrize("rule", ["attention", "log", "recent"])
def test_a_step_of_a_cache_that_grows_waits_for_nothing_without_padding(rule):
    full = step(once(lambda config: DynamicCache(config=config)), "sdpa", None)
    more = beyond(step(once(lambda config: LogQuantCache(config, rule=rule)), "logquant", None), full)
    assert more.pop("attend") == LAYERS
    assert not WAITS & more.keys()
    # A key and a value are copied into the window, which takes the place of a full cache's `cat`, and a query is kept.
    assert more.pop("copy_") == 2 * LAYERS and more.pop("clone") == LAYERS
    assert not more, more


@pytest.mark.parametrize("rule", ["attention", "log", "recent"])
def test_a_padded_step_of_a_cache_that_grows_waits_once_for_all_layers(rule, monkeypatch):
    """What the mask shows is copied to the host, once; everything else that depends on it is there."""
    reads, seen_by_some = [], masks.seen_by_some

    def reading(*args: Any) -> Tensor:
        reads.append(args)
        return seen_by_some(*args)

    monkeypatch.setattr(layout, "seen_by_some", reading)
    mask = torch.cat([pad_mask([300, 250], "left"), torch.ones(2, 4, dtype=torch.long)], 1)
    full = step(once(lambda config: DynamicCache(config=config)), "sdpa", mask)
    before = len(reads)
    more = beyond(step(once(lambda config: LogQuantCache(config, rule=rule)), "logquant", mask), full)
    assert len(reads) - before == 5, "one for each forward pass"
    assert more.pop("attend") == LAYERS and not WAITS & more.keys(), more
