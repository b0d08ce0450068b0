"""Tokens are taken back: what a layer then holds is what it would hold had they never come."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

from logquant import LogQuantCache
from tests.helpers.layers import contents, feed, make_layer, random_tokens
from tests.helpers.models import logits_of

IMPLEMENTATIONS = ["logquant", "sdpa", "eager"]


@pytest.mark.parametrize("removed", [1, 30, 63])
def test_crop_of_exact_tokens_leaves_no_trace(removed):
    """As speculative decoding does it: tokens come, some are taken back, others come in their place."""
    k, v = random_tokens(600)
    wrong_k, wrong_v = random_tokens(removed, seed=1)
    layer, straight = make_layer(bits=8), make_layer(bits=8)
    layer.update(k[:, :, :400], v[:, :, :400])
    for first in range(400, 600, 40):
        layer.activate_past_recording()
        new = slice(first, first + 40)
        layer.update(torch.cat([k[:, :, new], wrong_k], 2), torch.cat([v[:, :, new], wrong_v], 2))
        layer.crop(-removed)
    feed(straight, k, v, [400, 200])
    straight.commit()
    assert layer.held.layout.positions(k.device)[0].tolist() == straight.held.layout.positions(k.device)[0].tolist()
    for got, want in zip(contents(layer), contents(straight), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("left", [350, 210, 64, 0])
@pytest.mark.parametrize("rule", ["log", "attention"])
def test_crop_of_packed_tokens_hides_them(llama, ids, implementation, left, rule):
    """After the cut, attention sees what was there before, and nothing of what was removed."""
    cache = LogQuantCache(llama.config, bits=8, window=32, rule=rule)
    logits_of(llama, cache, ids, [400] + [1] * 5, "sdpa")
    cache.crop(left - 405)
    assert cache.get_seq_length() == left
    other = torch.cat([ids[:, :left], ids[:, 410:490]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = logits_of(llama, cache, other[:, left:], [40] + [1] * 40, implementation)
    want = logits_of(llama, DynamicCache(config=llama.config), other, [left + 80], "sdpa")[:, left:]
    assert (got - want).abs().mean() < 5e-3 * want.abs().mean()


@pytest.mark.parametrize("left", [990, 640, 300, 150, 0])
def test_crop_leaves_what_a_fresh_run_has(left):
    """Pages bit for bit, positions, and the tokens that were never packed; those that were come back as packed."""
    k, v = random_tokens(1000)
    layer, fresh = make_layer(), make_layer()
    layer.update(k, v)
    layer.commit()
    before = layer.rows
    never_packed = set(before.positions(k.device)[0, before.packed :].tolist())
    dequantised = [x.clone() for x in layer.dense()]
    layer.crop(left - 1000)
    assert layer.get_seq_length() == left
    if left == 0:
        assert layer.rows.packed == 0 and layer.held.storage.pages.shape[2] == 0
        return
    fresh.update(k[:, :, :left], v[:, :, :left])
    fresh.commit()
    assert torch.equal(layer.held.layout.positions(k.device), fresh.held.layout.positions(k.device))
    (pages, *windows), (want_pages, *want_windows) = contents(layer), contents(fresh)
    assert torch.equal(pages, want_pages)
    exact = fresh.held.layout.positions(k.device)[0, fresh.rows.packed :].long()
    kept = torch.tensor([p in never_packed for p in exact.tolist()])
    assert kept.all() if left == 990 else not kept.all()
    for window, want, packed in zip(windows, want_windows, dequantised, strict=True):
        assert torch.equal(window[:, :, kept], want[:, :, kept])
        assert torch.equal(window[:, :, ~kept], packed[:, :, exact[~kept]])


def test_crop_of_the_last_update_leaves_no_trace():
    """Without recording, whatever the rule would have done with the tokens."""
    k, v = random_tokens(600)
    layer, straight = make_layer(), make_layer()
    feed(layer, k, v, [400])
    for first in range(400, 600):
        layer.update(-k[:, :, :1], -v[:, :, :1])
        layer.crop(-1)
        feed(layer, k[:, :, first:], v[:, :, first:], [1])
    feed(straight, k, v, [600])
    for got, want in zip(contents(layer), contents(straight), strict=True):
        assert torch.equal(got, want)


def test_crop_of_a_positive_number_is_refused():
    layer = make_layer()
    layer.update(*random_tokens(10))
    layer.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative, got 3"):
        layer.crop(3)
    assert layer.get_seq_length() == 10
