"""TurboQuant: its rule, its distortion as the paper has it, its constants and its bytes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from logquant.methods import TurboQuant
from logquant.methods.registry import parse_cache
from logquant.methods.turboquant import codebook, rotation
from logquant.rule import split_positions
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_turboquant_keeps_what_recent_keeps(arrivals):
    layer = TurboQuant(window=32).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    _, exact = split_positions(sum(arrivals), 32, "recent", 4)
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == exact.tolist()


# Of a unit vector, from the paper's Theorem 1 (and Max 1960, for a Gaussian).
@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.36), (2, 0.117), (4, 0.009)])
def test_turboquant_loses_what_the_paper_says(bits, distortion):
    dim = 128
    layer = TurboQuant(bits=bits, window=32, sinks=0).layer(tiny_config())
    x = torch.randn(1, 1, 4096, dim, generator=torch.Generator().manual_seed(1)) * 3 + 1
    layer.update(x, x)
    error = (layer.dense()[0] - x).square().sum(-1) / x.square().sum(-1)
    assert error[:, :, : layer.packed_keys].mean().item() == pytest.approx(distortion, rel=0.05)


def test_turboquants_constants():
    torch.testing.assert_close(rotation(64) @ rotation(64).mT, torch.eye(64), atol=1e-6, rtol=0)
    assert codebook(512, 1).tolist() == pytest.approx(
        [-math.sqrt(2 / math.pi / 512), math.sqrt(2 / math.pi / 512)], 1e-2
    )
    # Lloyd's conditions, by sampling: each centroid is the mean of what is nearest to it.
    x = F.normalize(torch.randn(200_000, 16, generator=torch.Generator().manual_seed(2)), dim=-1)[:, 0]
    book = codebook(16, 2)
    nearest = (x[:, None] - book).abs().argmin(-1)
    means = torch.stack([x[nearest == i].mean() for i in range(4)])
    torch.testing.assert_close(means, book, atol=5e-3, rtol=0)


def test_turboquant_takes_one_half_a_vector():
    layer = TurboQuant(window=32).layer(tiny_config())
    feed(layer, [200])
    packed = 32 * ((200 - 4) // 32 - 2)
    assert layer.nbytes == BATCH * HEADS * 2 * (packed * (DIM * 2 // 8 + 2) + (200 - packed) * DIM * 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("turboquant:bits=3", "bits must be 1, 2, 4 or 8, got 3"),
        ("turboquant:sinks=-1", "sinks must be a whole number of tokens, 0 or more, got -1"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
