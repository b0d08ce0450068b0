"""Kitty: its rule against a plain statement of it, its bytes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from logquant.methods import KIVI, Kitty
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, minmax
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_kitty_keeps_sinks_and_quantises_as_kivi_after_them(arrivals):
    layer = Kitty(residual=64, sinks=8).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    total = sum(arrivals)
    packed_k, packed_v = (total - 8) // 64 * 64, max(0, total - 8 - 64)
    seen_k, seen_v = layer.dense()
    for seen, given, packed in ((seen_k, keys, packed_k), (seen_v, values, packed_v)):
        assert exact_positions(seen, given) == [*range(8), *range(8 + packed, total)]


@pytest.mark.parametrize("boosted", [0.0, 0.25, 1.0])
def test_the_largest_channels_of_a_page_have_four_bits(boosted):
    layer = Kitty(boosted=boosted, residual=32, sinks=4).layer(tiny_config())
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(BATCH, HEADS, 70, DIM, generator=generator)
    keys[:, :, :36] *= torch.rand(DIM, generator=generator) * 5  # another order of channels in another page
    keys[:, :, 36:] *= torch.rand(DIM, generator=generator) * 5
    layer.update(keys, keys)
    count = round(boosted * DIM)
    for first in (4, 36):
        page = keys[1, 1, first : first + 32]
        mean = [sum(abs(x) for x in page[:, channel].tolist()) / 32 for channel in range(DIM)]
        largest = sorted(range(DIM), key=lambda channel: -mean[channel])[:count]
        for channel in range(DIM):
            stated = minmax(page[:, channel].tolist(), 4 if channel in largest else 2)
            seen = layer.dense()[0][1, 1, first : first + 32, channel].tolist()
            assert seen == pytest.approx(stated, abs=1e-5)
    rows = [layer.dense()[1][0, 0, token].tolist() for token in range(4, 38)]
    for token, row in enumerate(rows, 4):
        assert row == pytest.approx(minmax(keys[0, 0, token].tolist()), abs=1e-5)


def test_kitty_without_more_bits_and_sinks_is_kivi():
    kitty = Kitty(boosted=0, residual=64, sinks=0).layer(tiny_config())
    kivi = KIVI(group=64, residual=64).layer(tiny_config(head_dim=64))
    x = torch.randn(1, 2, 150, 64, generator=torch.Generator().manual_seed(1))
    for layer in (kitty, kivi):
        layer.update(x, x)
    for one, other in zip(kitty.dense(), kivi.dense(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert kitty.nbytes == kivi.nbytes


def test_kitty_takes_two_halves_a_channel_or_token_and_a_byte_of_each_boosted_channel():
    layer = Kitty(residual=64, sinks=8).layer(tiny_config())
    feed(layer, [140, 1])
    keys, boosted = 128 * DIM * 2 // 8 + 2 * DIM * 4, DIM // 4
    upper = 128 * boosted * 2 // 8 + 2 * boosted
    values = 69 * (DIM * 2 // 8 + 4)
    exact = (141 - 128) + (141 - 69)
    assert layer.nbytes == BATCH * HEADS * (keys + upper + values + exact * DIM * 4)
    assert [part.tokens for part in layer.packed()] == [128, 69]


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="group must divide the value dimension 48, got 32"):
        Kitty(group=32).layer(tiny_config()).update(x, x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kitty:boosted=1.5", "boosted must be from 0 to 1, got 1.5"),
        ("kitty:residual=100", "residual must be a positive multiple of 16, got 100"),
        ("kitty:group=33", "group must be a positive multiple of 16, got 33"),
        ("kitty:sinks=-1", "sinks must be a whole number of tokens, 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
