"""KVarN: its rule, its scales against a plain statement of them, its bytes, and what it refuses."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from logquant.methods import KVarN
from logquant.methods.kvarn import balance
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, minmax, walsh
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_kvarn_keeps_sinks_and_a_tile_that_is_not_full(arrivals):
    layer = KVarN(tile=32, sinks=8).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    total = sum(arrivals)
    full = 8 + (total - 8) // 32 * 32
    stated = [position for position in range(total) if position < 8 or position >= full]
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == stated


def column_scales(rows, iterations):
    """Of a tile, a list of rows, by the authors' description: the scales of its columns."""
    height, width = len(rows), len(rows[0])
    log_row, log_column = [0.0] * height, [0.0] * width

    def left():
        return [[x / math.exp(log_row[i] + log_column[j]) for j, x in enumerate(row)] for i, row in enumerate(rows)]

    def deviations(tile):
        return [statistics.stdev(column) for column in zip(*tile, strict=True)], [statistics.stdev(r) for r in tile]

    def imbalance():
        return sum(max(s) / max(min(s), 1e-8) for s in deviations(left()))

    def added(log, deviation):
        return min(max(log + math.log(min(max(deviation, 1e-3), 1e3)), -0.3), 10.0)

    least, best = imbalance(), log_column
    for _ in range(iterations):
        log_column = [added(log, s) for log, s in zip(log_column, deviations(left())[0], strict=True)]
        log_row = [added(log, s) for log, s in zip(log_row, deviations(left())[1], strict=True)]
        if (now := imbalance()) <= least:
            least, best = now, log_column
    return [math.exp(log) for log in best]


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_scales_are_found_in_turn_and_the_best_are_taken(iterations):
    generator = torch.Generator().manual_seed(iterations)
    tile = torch.randn(16, 32, generator=generator) * torch.rand(16, 1, generator=generator).mul(3).exp()
    tile[:, 3] *= 0.1  # below what scales go to
    tile[:, 7] *= 40
    stated = column_scales(tile.double().tolist(), iterations)
    assert balance(tile, iterations)[0].tolist() == pytest.approx(stated, rel=1e-4)
    # Tiles do not know of each other.
    assert torch.equal(balance(torch.stack([tile, tile.flip(0) * 7]), iterations)[0], balance(tile, iterations))


def test_kvarn_scales_tokens_of_keys_and_channels_of_values():
    layer = KVarN(tile=32, sinks=4, iterations=4).layer(tiny_config())
    keys, values, _ = feed(layer, [40])
    rotation = walsh(DIM)
    for bits, by_channel, given, seen in zip((4, 2), (True, False), (keys, values), layer.dense(), strict=True):
        rotated = given[1, 1, 4:36].double() @ rotation
        tile = rotated.T if by_channel else rotated
        columns = [torch.tensor(s).half().item() for s in column_scales(tile.tolist(), 4)]
        stated = []
        for row in tile.tolist():
            left = minmax([x / s for x, s in zip(row, columns, strict=True)], bits)
            stated.append([x * s for x, s in zip(left, columns, strict=True)])
        made = torch.tensor(stated).double()
        made = (made.T if by_channel else made) @ rotation
        torch.testing.assert_close(seen[1, 1, 4:36].double(), made, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 2), (2, 2), (8, 4)])
def test_kvarn_takes_three_halves_a_channel_or_token_and_tile(key_bits, value_bits):
    layer = KVarN(key_bits, value_bits, tile=64, sinks=10).layer(tiny_config())
    feed(layer, [150, 1])
    exact = 151 - 128
    keys = 2 * (64 * DIM * key_bits // 8 + 2 * (2 * DIM + 64))
    values = 2 * (64 * DIM * value_bits // 8 + 2 * (DIM + 2 * 64))
    assert layer.nbytes == BATCH * HEADS * (keys + values + 2 * exact * DIM * 4)
    assert [part.tokens for part in layer.packed()] == [128, 128]


def test_constant_and_zero_tiles_come_back():
    layer = KVarN(tile=16, sinks=0).layer(tiny_config())
    x = torch.zeros(1, 1, 16, DIM)
    layer.update(x, x + 3)
    assert torch.equal(layer.dense()[0], x)
    torch.testing.assert_close(layer.dense()[1], x + 3, atol=2e-2, rtol=0)


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="KVarN needs head dimensions that are powers of two from 16 on, got 48"):
        KVarN().layer(tiny_config()).update(x, x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kvarn:key_bits=3", "key_bits must be 2, 4 or 8, got 3"),
        ("kvarn:value_bits=1", "value_bits must be 2, 4 or 8, got 1"),
        ("kvarn:tile=40", "tile must be a positive multiple of 16, got 40"),
        ("kvarn:sinks=-1", "sinks must be a whole number of tokens, 0 or more, got -1"),
        ("kvarn:iterations=-1", "iterations must be a whole number, 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
