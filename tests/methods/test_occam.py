"""OScaR: its rule against a plain statement of it, its bytes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from logquant.methods import OScaR
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, half, minmax, walsh
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_oscar_keeps_new_tokens_until_there_are_enough(arrivals):
    layer = OScaR(residual=64).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    total = sum(arrivals)
    stated = list(range(total // 64 * 64, total))
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == stated


def test_keys_are_rotated_and_divided_by_the_norm_of_all_heads():
    layer = OScaR(residual=64).layer(tiny_config())
    keys, _, _ = feed(layer, [70])
    rotation = walsh(DIM)
    rotated = keys.double() @ rotation
    unit, norms = torch.zeros(HEADS, 32, DIM).double(), []
    for token in range(32):
        elements = [x for head in range(HEADS) for x in rotated[1, head, 32 + token].tolist()]
        norms.append(half(math.sqrt(sum(x * x for x in elements))))
        unit[:, token] = rotated[1, :, 32 + token] / norms[-1]
    for head in range(HEADS):
        channels = [minmax(unit[head, :, channel].tolist()) for channel in range(DIM)]
        stated = [[channels[channel][token] * norms[token] for channel in range(DIM)] for token in range(32)]
        made = torch.tensor(stated).double() @ rotation
        torch.testing.assert_close(layer.dense()[0][1, head, 32:64].double(), made, atol=2e-3, rtol=1e-3)


def test_values_are_rotated_and_quantised_per_token():
    layer = OScaR(residual=64, group=16).layer(tiny_config())
    _, values, _ = feed(layer, [70])
    rotation = walsh(DIM)
    for token in range(0, 64, 7):
        row = (values[0, 1, token].double() @ rotation).tolist()
        stated = torch.tensor(minmax(row[:16]) + minmax(row[16:])).double() @ rotation
        torch.testing.assert_close(layer.dense()[1][0, 1, token].double(), stated, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_oscar_takes_two_halves_a_group_and_one_a_token(bits):
    layer = OScaR(bits=bits, residual=64).layer(tiny_config())
    feed(layer, [130, 1])
    packed = 128
    codes_and_params = 2 * packed * (DIM * bits // 8 + 4 * DIM // 32)
    exact = 2 * (131 - packed) * DIM * 4
    norms = packed * 2  # of both heads together
    assert layer.nbytes == BATCH * (HEADS * (codes_and_params + exact) + norms)
    assert [part.tokens for part in layer.packed()] == [128, 128]


def test_a_token_without_a_norm_comes_back():
    layer = OScaR(group=16, residual=16).layer(tiny_config())
    x = torch.ones(1, 2, 16, DIM)
    x[:, :, 3] = 0
    layer.update(x, x)
    torch.testing.assert_close(layer.dense()[0], x, atol=5e-3, rtol=0)


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="OScaR needs head dimensions that are powers of two from 16 on, got 48"):
        OScaR().layer(tiny_config()).update(x, x)
    with pytest.raises(ValueError, match="group must divide the value dimension 32, got 64"):
        OScaR(group=64).layer(tiny_config()).update(x[..., :32], x[..., :32])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("occam:bits=3", "bits must be 2, 4 or 8, got 3"),
        ("occam:group=48", "group must be a power of two from 16 on, got 48"),
        ("occam:residual=100", "residual must be a multiple of 32, got 100"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
