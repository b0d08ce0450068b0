"""Memory: what copies share, how stores grow, peaks, and that nothing is kept after a conversation."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.compat import as_argument
from tests.helpers.layers import contents, feed, make_layer, random_tokens
from tests.helpers.models import tiny_model

ROOT = Path(__file__).parents[2]


def measured(code: str) -> dict[str, float]:
    """What a process of its own prints: peaks are those of a process."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_copies_share_pages_until_one_writes():
    k, v = random_tokens(1000)
    layer = make_layer()
    feed(layer, k, v, [600])
    twin, third = copy.deepcopy(layer), copy.deepcopy(layer)
    store = layer.held.storage.pages.data_ptr()
    assert twin.held.storage.pages.data_ptr() == third.held.storage.pages.data_ptr() == store
    before = [t.clone() for t in contents(layer)]
    feed(twin, k[:, :, 600:], v[:, :, 600:], [1] * 30)
    assert twin.held.storage.pages.data_ptr() == store, "the window has taken all of them"
    feed(twin, -k[:, :, :60], -v[:, :, :60], [1] * 60)
    assert twin.rows.packed > layer.rows.packed and twin.held.storage.pages.data_ptr() != store
    assert third.held.storage.pages.data_ptr() == store
    for got, want in zip(contents(layer), before, strict=True):
        assert torch.equal(got, want)
    del third
    feed(layer, k[:, :, 600:], v[:, :, 600:], [1] * 90)
    feed(straight := make_layer(), k, v, [690])
    for got, want in zip(contents(layer), contents(straight), strict=True):
        assert torch.equal(got, want)


def test_the_last_owner_of_shared_pages_writes_in_place():
    k, v = random_tokens(1000)
    layer = make_layer()
    feed(layer, k, v, [600] + [1] * 64)
    assert layer.held.storage.pages.shape[2] > layer.rows.packed // 64, "there is room"
    twin = copy.deepcopy(layer)
    store = layer.held.storage.pages.data_ptr()
    del layer
    feed(twin, k[:, :, 664:], v[:, :, 664:], [1] * 63)
    assert twin.rows.packed // 64 == twin.held.storage.pages.shape[2] and twin.held.storage.pages.data_ptr() == store


def test_stores_of_all_layers_are_made_by_the_first_that_packs():
    model = tiny_model(num_hidden_layers=3)
    cache = LogQuantCache(model.config)
    left = []
    for i in range(3):
        k, v = random_tokens(500, dim=32, value_dim=32, seed=i)
        keys, _ = cache.update(k, v, i)
        keys.kv_view.attend(AttentionCall(k[:, :, :2], None, 1.0))
        left.append(len(cache._shared.allocator._stores))
    assert left == [2, 1, 0]
    assert {layer.held.storage.pages.shape[:3] for layer in cache.layers} == {(1, 2, 320 // 64)}


PREFILL = """
import json, resource, torch
from logquant.cache import LogQuantLayer
from logquant import LogQuantConfig
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
heads, tokens = 8, 100_000
layer = LogQuantLayer(LogQuantConfig())
# What is loaded and allocated once is no part of it.
small = torch.zeros(1, heads, 300, 128, dtype=torch.bfloat16)
LogQuantLayer(LogQuantConfig()).update(small, small)[0].kv_view.observe(None)
before = peak()
k, v = (torch.full((1, heads, tokens, 128), x, dtype=torch.bfloat16) for x in (1.0, 2.0))
exact = k.nbytes + v.nbytes
keys, values = layer.update(k, v)
keys.kv_view.observe(None)
assert layer.rows.packed == 64 * (tokens // 64 - 2)
prompt = (peak() - before) / exact
del keys, values, k, v
print(json.dumps({"prompt": prompt, "held": layer.nbytes / exact}))
"""


def test_a_prompt_of_100000_tokens_peaks_under_1_3_times_its_keys_and_values():
    found = measured(PREFILL)
    assert found["prompt"] < 1.3, found
    assert found["held"] < 0.165, found


CONVERSATIONS = """
import gc, json, torch
from logquant import LogQuantCache
from logquant.compat import as_argument
from tests.helpers.models import tiny_model
def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
torch.set_num_threads(1)
model = tiny_model()
model.set_attn_implementation("logquant")
ids = torch.randint(0, 256, (2, 600), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[1, :100] = 0
sizes = []
for conversation in range(80):
    cache = LogQuantCache(model.config)
    out = model.generate(ids, attention_mask=mask, **as_argument(cache), max_new_tokens=16, do_sample=False)
    more = torch.cat([out, ids[:, :40]], 1)
    twice = torch.cat([mask, torch.ones(2, 56, dtype=torch.long)], 1)
    model.generate(more, attention_mask=twice, **as_argument(cache), max_new_tokens=6)
    beams = LogQuantCache(model.config)
    model.generate(ids, attention_mask=mask, **as_argument(beams), max_new_tokens=5, num_beams=2)
    sizes.append(resident())
print(json.dumps({"growth": sizes[-1] / sizes[19] - 1}))
"""


@pytest.mark.slow
def test_memory_is_flat_over_80_conversations():
    found = measured(CONVERSATIONS)
    assert abs(found["growth"]) < 0.01, found


def test_nothing_keeps_a_cache_alive_that_is_dropped():
    import gc
    import weakref

    model = tiny_model()
    model.set_attn_implementation("logquant")
    cache = LogQuantCache(model.config)
    ids = torch.randint(0, 256, (1, 400))
    model.generate(ids, **as_argument(cache), max_new_tokens=5)
    tensors = [weakref.ref(layer.held.storage.pages) for layer in cache.layers]
    del cache
    gc.collect()
    assert all(ref() is None for ref in tensors)
