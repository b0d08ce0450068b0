"""KIVI: its rule against a plain statement of Algorithm 1, its bytes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from logquant.methods import KIVI
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, minmax
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def kivi_by_the_paper(arrivals, residual):
    """Exact keys and exact values, as positions: Algorithm 1 step by step."""
    keys, values, position = [], [], 0
    for new in arrivals:
        keys += range(position, position + new)
        values += range(position, position + new)
        position += new
        while len(keys) >= residual:
            keys = keys[residual:]
        while len(values) > residual:
            values = values[1:]
    return keys, values


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_kivi_quantises_keys_by_the_residual_and_values_one_by_one(arrivals):
    layer = KIVI(residual=64).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    seen_k, seen_v = layer.dense()
    assert (exact_positions(seen_k, keys), exact_positions(seen_v, values)) == kivi_by_the_paper(arrivals, 64)
    packed_k, packed_v = layer.packed_keys, layer.packed_values
    for channel in (0, DIM - 1):
        for group in range(0, packed_k, 32):
            stated = minmax(keys[1, 1, group : group + 32, channel].tolist())
            assert seen_k[1, 1, group : group + 32, channel].tolist() == pytest.approx(stated, abs=1e-5)
    for token in range(0, packed_v, 7):
        assert seen_v[1, 1, token].tolist() == pytest.approx(minmax(values[1, 1, token].tolist()), abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_takes_two_more_halves_a_group(bits):
    layer = KIVI(bits=bits, residual=64).layer(tiny_config())
    feed(layer, [130, 1])
    exact = 131 - 128 + 64
    codes = 128 * DIM * bits // 8 + 67 * DIM * bits // 8
    params = 4 * (128 // 32 * DIM + 67 * DIM // 32)
    assert layer.nbytes == BATCH * HEADS * (codes + params + exact * DIM * 4)
    assert [part.tokens for part in layer.packed()] == [128, 67]


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="group must divide the value dimension 48, got 32"):
        KIVI().layer(tiny_config()).update(x, x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kivi:bits=3", "bits must be 2, 4 or 8, got 3"),
        ("kivi:group=33", "group must be a positive multiple of 16, got 33"),
        ("kivi:residual=100", "residual must be a multiple of 32, got 100"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
