"""Gradients through a cache: those of a DynamicCache while all tokens are exact, and never wrong in silence."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.compat import as_argument
from tests.helpers.layers import make_layer, random_tokens
from tests.helpers.masks import causal_mask
from tests.helpers.models import tiny_model

IDS = torch.randint(3, 255, (2, 700), generator=torch.Generator().manual_seed(0))
SOFT = 0.3 * torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(1))
IMPLEMENTATIONS = ["logquant", "sdpa", "eager"]


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request):
    model = tiny_model().train()
    model.set_attn_implementation(request.param)
    return model


def gradients(model, *, soft=None):
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return named if soft is None else named | {"soft prompt": soft.grad}


def same(got, want):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)
        assert grad.abs().max() > 0, name


def caches(model, **options):
    return DynamicCache(config=model.config), LogQuantCache(model.config, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_training_after_a_frozen_context(model, padded):
    found = []
    mask = torch.ones(2, 100, dtype=torch.long)
    if padded:
        mask[0, :7] = 0
    for cache in caches(model):
        with torch.no_grad():
            model(IDS[:, :60], attention_mask=mask[:, :60], **as_argument(cache))
        for part in (slice(60, 80), slice(80, 81), slice(81, 100)):
            loss = model(
                IDS[:, part], attention_mask=mask[:, : part.stop], labels=IDS[:, part], **as_argument(cache)
            ).logits.logsumexp(-1)
            loss.sum().backward(retain_graph=True)
        found.append(gradients(model))
    same(found[1], found[0])


def test_a_soft_prompt_learns(model):
    found = []
    for cache in caches(model):
        soft = SOFT.clone().requires_grad_()
        model(inputs_embeds=soft, **as_argument(cache))
        model(IDS[:, :20], **as_argument(cache))
        model(IDS[:, 20:60], labels=IDS[:, 20:60], **as_argument(cache)).loss.backward()
        found.append(gradients(model, soft=soft))
        assert cache.get_seq_length() == 70
    same(found[1], found[0])


def test_gradients_flow_through_exact_tokens_beside_packed_ones(model):
    """Those of a DynamicCache that holds what the pages hold."""
    cache = LogQuantCache(model.config)
    with torch.no_grad():
        model(IDS[:, :400], **as_argument(cache))
    assert cache.layers[0].rows.packed
    dense = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        dense.update(*(x.clone() for x in layer.dense()), i)
    found = []
    for each in (dense, cache):
        model(IDS[:, 400:420], **as_argument(each))
        model(IDS[:, 420:460], labels=IDS[:, 420:460], **as_argument(each)).loss.backward()
        found.append(gradients(model))
    same(found[1], found[0])


def test_a_gradient_that_packed_tokens_would_need_is_refused(model):
    """And nothing is, while nobody asks for it."""
    cache = LogQuantCache(model.config)
    model(IDS[:, :400], labels=IDS[:, :400], **as_argument(cache)).loss.backward(retain_graph=True)
    loss = model(IDS[:, 400:420], labels=IDS[:, 400:420], **as_argument(cache)).loss
    with pytest.raises(RuntimeError, match=r"no gradient flows through quantised tokens.*torch.no_grad\(\)"):
        loss.backward()
    with torch.no_grad():
        model(IDS[:, 420:430], **as_argument(cache))


def test_a_prompt_that_is_packed_afterwards_trains(model):
    found = []
    for cache in caches(model):
        model(IDS[:, :400], labels=IDS[:, :400], **as_argument(cache)).loss.backward()
        found.append(gradients(model))
    same(found[1], found[0])


def test_what_comes_without_gradients_ends_the_graph(model):
    """As in a DynamicCache: a step under no_grad, and no gradient goes further back."""
    found = []
    for cache in caches(model):
        model(IDS[:, :20], **as_argument(cache))
        with torch.no_grad():
            model(IDS[:, 20:30], **as_argument(cache))
        held = [layer.keys.clone() for layer in cache.layers]
        model(IDS[:, 30:60], labels=IDS[:, 30:60], **as_argument(cache)).loss.backward()
        found.append(gradients(model))
        for before, layer in zip(held, cache.layers, strict=True):
            torch.testing.assert_close(layer.keys[:, :, :30].detach(), before)
    same(found[1], found[0])


@pytest.mark.parametrize("change", ["reorder", "crop"])
def test_gradients_survive_a_change_of_the_cache(model, change):
    found = []
    for cache in caches(model):
        model(IDS[:, :40], **as_argument(cache))
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        else:
            cache.crop(-10)
        model(IDS[:, 40:60], labels=IDS[:, 40:60], **as_argument(cache)).loss.backward()
        found.append(gradients(model))
    same(found[1], found[0])


@pytest.mark.parametrize("context", [0, 30, 300], ids="context {}".format)
def test_the_second_forward_pass_of_checkpointing_appends_nothing(model, context):
    found = []
    for checkpointed in (False, True):
        cache = LogQuantCache(model.config)
        if context:
            with torch.no_grad():
                model(IDS[:, :context], **as_argument(cache))
        handlers = [patch(layer) for layer in model.model.layers] if checkpointed else []
        for part in (slice(context, context + 20), slice(context + 20, context + 50)):
            out = model(IDS[:, part], labels=IDS[:, part], **as_argument(cache))
        out.loss.backward()
        found.append(gradients(model))
        assert [layer.get_seq_length() for layer in cache.layers] == [context + 50] * 2
        for layer in handlers:
            del layer.forward
    same(found[1], found[0])


def patch(layer, use_reentrant=False):
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=use_reentrant, **kwargs)
    return layer


def test_a_backward_pass_that_brings_other_tokens_is_refused():
    cache = LogQuantCache(tiny_model().config)
    keys = torch.randn(1, 2, 30, 32)
    cache.update(keys, keys, 0)

    def bring(grad):
        cache.update(grad, grad, 0)

    leaf = torch.randn(1, 2, 5, 32, requires_grad=True)
    leaf.register_hook(bring)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        leaf.square().sum().backward()
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("pads", [(150, 160), (150, 0), (0, 0)], ids=str)
def test_packed_tokens_that_came_with_a_gradient_are_known_in_padded_batches(pads):
    tokens = 400 if all(pads) else 250
    layer = make_layer(sinks=4)
    k, v = random_tokens(tokens, batch=2)
    keys, _ = layer.update(k.requires_grad_(), v)
    real = torch.ones(2, tokens, dtype=torch.long)
    for row, count in zip(real, pads, strict=True):
        row[:count] = 0
    mask = causal_mask(real, tokens)
    keys.kv_view.attend(AttentionCall(k, mask, 0.1))
    layer.commit()
    assert layer.rows.packed and layer.held.storage.severed


def test_a_pass_without_gradients_that_is_taken_back_does_not_hide_where_the_graph_begins():
    k, v = random_tokens(203)
    k = 1 * k.requires_grad_()
    layer = make_layer(sinks=4)

    def step(start, stop):
        keys, _ = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        return keys.kv_view.attend(AttentionCall(k[:, :, start:stop], None, 0.1, causal=stop - start > 1))

    step(0, 140)
    with torch.no_grad():
        step(0, 5)
    layer.crop(-5)
    step(140, 202)
    with pytest.raises(RuntimeError, match="no gradient flows through quantised tokens"):
        step(202, 203).sum().backward()
