"""Quanto and HQQ: the caches are those of transformers, and a missing package is named."""

from __future__ import annotations

import pytest

from logquant.methods import HQQ, Quanto, quanto
from logquant.methods.accounting import cache_nbytes, packed_bits_per_element
from logquant.methods.registry import parse_cache
from tests.helpers.methods import BATCH, DIM, HEADS, feed
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def needs(settings):
    try:
        return settings()
    except ImportError as error:
        pytest.skip(f"{error}")


@pytest.mark.parametrize("settings", [Quanto, HQQ])
def test_quantized_cache_is_that_of_transformers(settings):
    cache = needs(settings).make(tiny_config())
    layer = cache.layers[0]
    keys, *_ = feed(layer, [100, *[1] * 10])
    assert layer.keys.shape[2] == 10 and layer.get_seq_length() == 110
    bits = packed_bits_per_element(cache)
    # Scales and zeros of 64 channels each: 32 bits, or as much as the dtype wants.
    assert 2.25 <= bits <= 2 + 64 / 64 + 0.1
    assert cache_nbytes(cache) >= BATCH * HEADS * 2 * DIM * (10 * 4 + 100 * bits / 8)
    seen = layer._dequantize(layer._quantized_keys)
    assert 0 < (seen - keys[:, :, :100]).square().mean() < 0.3


@pytest.mark.parametrize(("name", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setattr(quanto.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"cache '{name}' needs the package {package}: pip install"):
        parse_cache(name)
