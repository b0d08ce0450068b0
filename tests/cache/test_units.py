"""Very large and very small keys and values are held in other units, and lose nothing by it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from logquant import LogQuantCache, LogQuantConfig
from logquant.attention.call import AttentionCall
from logquant.attention.units import Units, scaled
from logquant.cache.layer import LogQuantLayer
from logquant.compat import as_argument
from tests.helpers.layers import contents, random_tokens
from tests.helpers.models import tiny_model

CONFIGS = {"default": LogQuantConfig(), "paper": LogQuantConfig.paper()}
EXPONENTS = [-40, -14, 14, 40]


def fed(config, k, v, scale=0.125):
    """A layer after a prompt, single steps that evict and a chunk, and what attention gave."""
    layer, outs = LogQuantLayer(config), []
    for part in (slice(0, 300), *(slice(t, t + 1) for t in range(300, 390)), slice(390, 500)):
        keys, _ = layer.update(k[:, :, part], v[:, :, part])
        query = torch.randn(1, 4, part.stop - part.start, 64, generator=torch.Generator().manual_seed(part.start))
        outs.append(keys.kv_view.attend(AttentionCall(query, None, scale, causal=part.stop - part.start > 1)))
    return layer, outs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_power_of_two_changes_nothing(config, exponent):
    """Exact arithmetic knows no unit; nor do pages, outputs, copies, crops and files."""
    k, v = random_tokens(500)
    # As large as a power of two, so that both sides are held in the same steps.
    k, v = (x / x.abs().amax() * 0.75 for x in (k, v))
    plain, want = fed(config, k, v)
    factor = 2.0**exponent
    layer, got = fed(config, k * factor, v * factor, 0.125 / factor)
    assert layer.held.storage.units == Units(exponent, exponent)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a / factor, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(contents(layer), contents(plain), strict=True):
        assert torch.equal(a, b)
    twin = copy.deepcopy(layer)
    for one, other in ((layer, plain), (twin, plain)):
        assert torch.equal(one.keys / factor, other.keys) and torch.equal(one.values / factor, other.values)
    layer.crop(-200)
    plain.crop(-200)
    assert torch.equal(layer.keys / factor, plain.keys)
    restored = LogQuantLayer(config)
    tensors, described = twin.state()
    restored.restore(twin.rows, tensors, described)
    assert torch.equal(restored.values, twin.values)


def test_usual_sizes_are_held_as_they_are():
    k, v = random_tokens(300)
    assert fed(CONFIGS["default"], *(x.repeat(1, 1, 2, 1) for x in (k, v)))[0].held.storage.units == Units(0, 0)
    for factor in (1e-2, 50.0):
        assert Units.of(k * factor, v * factor) == Units(0, 0)


def test_a_cache_that_was_emptied_takes_new_units():
    k, v = random_tokens(500)
    layer, _ = fed(CONFIGS["default"], k * 2.0**20, v * 2.0**20)
    layer.crop(-500)
    layer.update(k, v)
    layer.commit()
    assert layer.held.storage.units == Units(0, 0)
    layer.crop(-500)
    layer.reset()
    layer.update(k * 2.0**-20, v)
    layer.commit()
    assert layer.held.storage.units.key < -10 and layer.held.storage.units.value == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_say_how_large_the_others_are(bad):
    k, v = random_tokens(100)
    k[0, 0, 3, 5] = v[0, 1, 7, 0] = bad
    assert Units.of(k, v) == Units(0, 0)
    assert Units.of(k * 2.0**20, v).key > 15 and Units.of(k, v * 2.0**20).value > 15


def test_nothing_and_zeros_have_no_size():
    k, v = random_tokens(10)
    assert Units.of(k[:, :, :0], v[:, :, :0]) == Units.of(0 * k, 0 * v) == Units(0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_a_dtype_cannot_hold_becomes_the_largest(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([1.0, -1.0, 0.0, float("inf"), float("nan"), most], dtype=dtype)
    large = scaled(x, 100 if dtype is torch.float16 else 130)
    assert large[:3].tolist() == [most, -most, 0.0] and large[3].isinf() and large[4].isnan() and large[5] == most
    assert scaled(scaled(x[:3], -9), 9).tolist() == [1.0, -1.0, 0.0]
    assert scaled(x, 0) is x


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_largest_values_of_fp16_give_finite_outputs(config):
    k, v = random_tokens(500)
    v = (v / v.abs().amax() * 65504).half()
    layer, outs = LogQuantLayer(config), []
    for part in (slice(0, 400), slice(400, 401), slice(401, 500)):
        keys, _ = layer.update(k[:, :, part].half(), v[:, :, part])
        outs.append(keys.kv_view.attend(AttentionCall(k[:, :, part].half(), None, 4.0, causal=True)))
    assert all(out.isfinite().all() for out in outs) and layer.values.isfinite().all()
    assert outs[1].abs().amax() > 10000


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_whose_projections_undo_each_other_loses_no_more(config, which):
    """Keys or values times 2^14 and 2^-14, undone in the next projection: the divergence is that of the model as is."""
    ids = torch.randint(3, 255, (1, 460), generator=torch.Generator().manual_seed(0))
    found = []
    for factor in (1.0, 2.0**14, 2.0**-14):
        model = tiny_model()
        for layer in model.model.layers:
            attention = layer.self_attn
            first, second = (
                (attention.k_proj, attention.q_proj) if which == "key" else (attention.v_proj, attention.o_proj)
            )
            first.weight.data *= factor
            second.weight.data /= factor
        model.set_attn_implementation("logquant")
        logs = []
        for cache in (DynamicCache(config=model.config), LogQuantCache(model.config, config)):
            with torch.no_grad():
                model(ids[:, :400], **as_argument(cache))
                logs.append(model(ids[:, 400:], **as_argument(cache)).logits.log_softmax(-1))
        found.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item())
    assert found[0] > 0 and all(abs(kl / found[0] - 1) < 0.2 for kl in found[1:]), found
