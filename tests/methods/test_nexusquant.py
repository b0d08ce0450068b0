"""NexusQuant: its rule, its lattice against all its points, its bytes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaModel

from logquant.compat import as_argument
from logquant.methods import NexusQuant
from logquant.methods.layers.rope import move_keys, rope_frequencies
from logquant.methods.nexusquant import Lattice, nearest_point
from logquant.methods.registry import parse_cache
from logquant.rule import split_positions
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, half, walsh
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_nexusquant_keeps_what_recent_keeps(arrivals):
    layer = NexusQuant(window=32).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    _, exact = split_positions(sum(arrivals), 32, "recent", 4)
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == exact.tolist()


@pytest.fixture(scope="module")
def points():
    """All of the lattice in the cube of 2 bits, float32 ``[260849, 8]``."""
    halves, whole = (torch.cartesian_prod(*[torch.arange(-most, most + 1)] * 8) for most in (1.5, 2.0))
    return torch.cat([halves, whole[whole.sum(1) % 2 == 0]])


def test_every_point_has_a_number_of_eighteen_bits(points):
    lattice = Lattice(2)
    numbers = lattice._number(points)
    assert len(points) == 260_849 and torch.equal(numbers.sort().values, torch.arange(260_849))
    assert torch.equal(lattice._point(numbers), points)
    for count, nbytes in ((4, 9), (2, 5), (8, 18)):  # of heads with 32, 16 and 64 channels
        some = numbers[: 260_848 // count * count].unflatten(0, (-1, count))
        packed = lattice._packed(some)
        assert packed.dtype == torch.uint8 and packed.shape[1] == nbytes
        assert torch.equal(lattice._unpacked(packed), some)


@pytest.mark.parametrize("bits", [3, 4])
def test_points_of_more_bits_have_numbers_too(bits):
    lattice, most = Lattice(bits), 2 ** (bits - 1)
    x = (torch.rand(4000, 8, generator=torch.Generator().manual_seed(bits)) * 2 - 1) * most
    x = torch.cat([x, torch.tensor([[most, -most] * 4, [most - 0.5] * 8, [0.0] * 8, [float(most)] * 7 + [most - 1]])])
    point = nearest_point(x, most)
    assert point.abs().max() == most and (x - point).abs().max() <= 1
    whole = point[:, 0] % 1 == 0
    assert (point[whole].sum(1) % 2 == 0).all() and ((point[~whole] - 0.5) % 1 == 0).all() and 0 < whole.sum() < 4000
    numbers = lattice._number(point)
    assert numbers.min() >= 0 and numbers.max() < 2 ** (8 * bits + 2)
    assert torch.equal(
        lattice._point(lattice._unpacked(lattice._packed(numbers[:4000].unflatten(0, (-1, 4))))).flatten(0, 1),
        point[:4000],
    )


def test_the_nearest_point_is_the_nearest_of_all(points):
    x = torch.rand(24, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
    x = torch.cat([x, x[:12] / 4, torch.tensor([[2.0, -2.0] * 4, [2.0] * 7 + [1.0], [-2.0] * 7 + [1.0], [0.0] * 8])])
    distance = (x - nearest_point(x, 2)).square().sum(1)
    nearest = torch.stack([(row - points).square().sum(1).min() for row in x])
    torch.testing.assert_close(distance, nearest)


def test_vectors_are_rotated_and_scaled_by_their_largest_element(points):
    layer = NexusQuant(window=16, sinks=4).layer(tiny_config())
    _, values, _ = feed(layer, [60])
    rotation = walsh(DIM)
    for token in range(4, 4 + layer.packed_values, 8):
        row = (values[1, 0, token].double() @ rotation).tolist()
        scale = half(max(abs(x) for x in row) / 2)
        scaled = torch.tensor(row).float() / scale
        nearest = [points[(part - points).square().sum(1).argmin()] for part in scaled.split(8)]
        stated = torch.cat(nearest).double() * scale @ rotation
        torch.testing.assert_close(layer.dense()[1][1, 0, token].double(), stated, atol=1e-5, rtol=1e-4)


def test_keys_are_quantised_as_if_at_position_zero():
    """The same token everywhere has the same codes, and comes back as RoPE has made it for its place."""
    config = tiny_config(num_hidden_layers=1)
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    cache = parse_cache("nexusquant:window=16").make(config)
    with torch.inference_mode():
        model(torch.full((1, 100), 7), **as_argument(cache))
        model(torch.full((1, 30), 7), **as_argument(cache))  # in a second eviction
    layer = cache.layers[0]
    numbers, scales = layer.key_parts
    assert layer.packed_keys == 80
    assert (numbers == numbers[:, :, :1]).double().mean() > 0.99
    torch.testing.assert_close(scales, scales[:, :, :1].expand_as(scales), rtol=2e-3, atol=0)
    seen, frequencies = layer.dense()[0], rope_frequencies(config)
    first = seen[:, :, 4:5]
    moved = move_keys(first.expand(-1, -1, 80, -1), frequencies, torch.arange(80.0, dtype=torch.float64)[:, None])
    close = (seen[:, :, 4:84] - moved).abs().amax(-1) < 1e-2
    assert close.double().mean() > 0.9
    layer.remember()
    assert torch.equal(layer.dense()[0], seen)
    with torch.inference_mode():
        model(torch.full((1, 30), 7), **as_argument(cache))
    incremental = layer.dense()[0]
    layer._decoded = None
    torch.testing.assert_close(layer.dense()[0], incremental)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nexusquant_takes_a_quarter_of_a_bit_more_and_one_half_a_vector(bits):
    layer = NexusQuant(bits, bits, window=32).layer(tiny_config())
    feed(layer, [200])
    packed = 32 * ((200 - 4) // 32 - 2)
    codes = DIM * (4 * bits + 1) // 32
    assert layer.nbytes == BATCH * HEADS * 2 * (packed * (codes + 2) + (200 - packed) * DIM * 4)


def test_models_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="NexusQuant needs head dimensions that are powers of two from 16 on, got 48"):
        NexusQuant().layer(tiny_config()).update(x, x)
    dynamic = tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="cannot move keys with the RoPE of 'llama' \\(dynamic\\)"):
        parse_cache("nexusquant").make(dynamic)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nexusquant:key_bits=1", "key_bits must be 2, 3 or 4, got 1"),
        ("nexusquant:value_bits=8", "value_bits must be 2, 3 or 4, got 8"),
        ("nexusquant:window=0", "window must be a positive whole number, got 0"),
        ("nexusquant:sinks=-1", "sinks must be a whole number of tokens, 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
