"""The modes of torch that a caller may be in: inference mode in every order, autocast, two dtypes at once."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from logquant import LogQuantCache
from logquant.attention.call import AttentionCall
from logquant.compat import as_argument
from tests.helpers.layers import contents, make_layer, random_tokens
from tests.helpers.models import tiny_model

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
IDS = torch.randint(3, 255, (1, 420), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def logits(model, ids, cache):
    return model(ids, **as_argument(cache)).logits.detach().clone()


@pytest.mark.parametrize("implementation", ["logquant", "sdpa", "eager"])
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="-".join)
def test_a_cache_works_in_every_order_of_modes(model, modes, implementation):
    """Prompt, single steps and a chunk that packs tokens, and a copy made in the same mode goes on as well."""
    model.set_attn_implementation(implementation)
    parts = [IDS[:, :300], *IDS[:, 300:340].split(1, 1), IDS[:, 340:]]
    with torch.no_grad():
        want_cache = LogQuantCache(model.config)
        want = [logits(model, part, want_cache) for part in parts]
    cache, got, twins = LogQuantCache(model.config), [], []
    for i, part in enumerate(parts):
        with MODES[modes[min(i, 1) + (i == len(parts) - 1)]]():
            got.append(logits(model, part, cache))
            if i in (0, 40):
                twins.append((i, copy.deepcopy(cache)))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # With gradients, attention goes over dequantised tensors.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3, msg=f"part {i}")
    for i, twin in twins:
        with torch.no_grad():
            again = [logits(model, part, twin) for part in parts[i + 1 :]]
        for a, b in zip(again, want[i + 1 :], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("change", ["reorder", "repeat", "crop", "to", "offload"])
def test_what_is_changed_in_inference_mode_goes_on_outside(change):
    k, v = random_tokens(420, batch=2)
    changes = {
        "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda layer: layer.batch_repeat_interleave(1),
        "crop": lambda layer: layer.crop(-120),
        "to": lambda layer: layer.to("cpu"),
        "offload": lambda layer: layer.offload(),
    }
    states = []
    for mode in (torch.no_grad, torch.inference_mode):
        layer = make_layer()
        with mode():
            layer.update(k[:, :, :300], v[:, :, :300])
            changes[change](layer)
        layer.prefetch()
        for t in range(300, 420):
            layer.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        states.append(contents(layer))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prompt", [50, 300])
@pytest.mark.parametrize("implementation", ["logquant", "sdpa", "eager"])
def test_autocast_gives_what_a_dynamic_cache_gives(model, implementation, prompt):
    """Under autocast rotary embeddings leave keys in float32 beside values in bfloat16."""
    model.set_attn_implementation(implementation)
    outs = []
    for cache in (DynamicCache(config=model.config), LogQuantCache(model.config, bits=8, window=128)):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(
                [logits(model, part, cache) for part in (IDS[:, :prompt], *IDS[:, prompt : prompt + 5].split(1, 1))]
            )
    assert cache.layers[0].dtype == torch.bfloat16
    for got, want in zip(outs[1], outs[0], strict=True):
        assert got.dtype == want.dtype
        assert (got.float() - want.float()).abs().max() < 0.1 * want.float().abs().max()


def test_autocast_leaves_the_quantiser_alone():
    """Pages and maps of the same tokens and queries are the same inside."""
    k, v = random_tokens(500)
    held = []
    for inside in (False, True):
        layer = make_layer(sinks=4, key_columns=1.25, param_bits=8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            for part in (slice(0, 300), slice(300, 500)):
                keys, _ = layer.update(k[:, :, part], v[:, :, part])
                keys.kv_view.attend(AttentionCall(k[:, :, part], None, 0.125, causal=True))
            held.append((*contents(layer), layer.held.advice.key_map))
    for a, b in zip(*held, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_the_store_has_the_dtype_of_the_first_values(dtypes):
    k, v = random_tokens(330)
    layer = make_layer()
    layer.update(k[:, :, :300].to(dtypes[0]), v[:, :, :300].to(dtypes[1]))
    layer.update(k[:, :, 300:].to(dtypes[1]), v[:, :, 300:].to(dtypes[0]))
    plain = make_layer()
    for part in (slice(0, 300), slice(300, 330)):
        plain.update(k[:, :, part].to(dtypes[1]), v[:, :, part].to(dtypes[1]))
    for got, want in zip(contents(layer), contents(plain), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_queries_of_another_dtype_attend_to_the_store():
    k, v = random_tokens(301)
    layer = make_layer(bits=8)
    layer.update(k[:, :, :300].bfloat16(), v[:, :, :300].bfloat16())
    keys, _ = layer.update(k[:, :, 300:], v[:, :, 300:])
    query = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    out = keys.kv_view.attend(AttentionCall(query, None, 0.125))
    want = torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=0.125)
    assert out.dtype == torch.float32 and (out - want).abs().max() < 0.02
