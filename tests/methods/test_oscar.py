"""OSCAR: its rule, its rotations against a plain statement of them, its bytes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from logquant.methods import OSCAR
from logquant.methods.oscar import rotation_for
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, minmax, tokens_for
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_oscar_keeps_sinks_and_the_newest(arrivals):
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    total = sum(arrivals)
    stated = [position for position in range(total) if position < 8 or position >= total - 40]
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact_positions(seen_v, values) == stated


def test_oscar_rotates_by_what_attends_and_clips():
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    keys, values, _ = feed(layer, [30, 60])
    queries = tokens_for(90)[2].double()
    # Attention weights of the exact tokens: nothing was quantised before.
    grouped = queries.unflatten(1, (HEADS, -1))
    hidden = torch.ones(90, 90, dtype=torch.bool).triu(1)
    scores = torch.einsum("bhgld,bhtd->bhglt", grouped, keys.double()) / math.sqrt(DIM)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("bhglt,bhtd->bhgld", weights, values.double()).flatten(2, 3)
    flat = grouped.flatten(2, 3)
    for made, covariance in zip(layer.rotations, (flat.mT @ flat, out.mT @ out), strict=True):
        made = made.double()
        torch.testing.assert_close(made @ made.mT, torch.eye(DIM).double().expand_as(made), atol=1e-5, rtol=0)
        # An eigenvector's sign is free, and so is the rotation's up to it: what counts is that Hadamard spreads the
        # variance evenly, which it does for the eigenvectors alone.
        variances = torch.diagonal(made.mT @ covariance @ made, dim1=-2, dim2=-1)
        assert (variances.std(-1) / variances.mean(-1)).max() < 1e-3
        assert torch.diagonal(covariance, dim1=-2, dim2=-1).std() / covariance.mean().abs() > 1e-3
    row = (keys[0, 1, 20].double() @ layer.rotations[0][0, 1].double()).tolist()
    bound = sorted(abs(x) for x in row)[int(0.96 * DIM)]
    stated = (
        torch.tensor(minmax([min(max(x, -bound), bound) for x in row])).double() @ layer.rotations[0][0, 1].double().mT
    )
    torch.testing.assert_close(layer.dense()[0][0, 1, 20].double(), stated, atol=1e-5, rtol=1e-4)


def test_oscars_rotation_is_eigenvectors_hadamard_and_bit_reversal():
    covariance = torch.diag(torch.arange(16, 0, -1.0))
    made = rotation_for(covariance)
    # Of a diagonal covariance: rows of the Hadamard matrix, up to sign, with columns in bit-reversed order.
    sylvester = torch.ones(1, 1)
    while len(sylvester) < 16:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    order = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    torch.testing.assert_close(made.abs(), torch.full_like(made, 0.25))
    signs = made[:, :1].sign()
    torch.testing.assert_close(made * signs, sylvester[:, order] / 4, atol=1e-6, rtol=0)


def test_oscar_takes_two_halves_a_vector_and_its_rotations():
    layer = OSCAR(sinks=8, recent=40).layer(tiny_config())
    feed(layer, [200])
    packed = 200 - 48
    rotations = 2 * DIM * DIM * 4
    assert layer.nbytes == BATCH * HEADS * (2 * (packed * (DIM * 2 // 8 + 4) + 48 * DIM * 4) + rotations)


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 48)
    with pytest.raises(ValueError, match="powers of two from 16 on, got 48"):
        OSCAR().layer(tiny_config()).update(x, x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oscar:group=48", "group must be a power of two from 16 on, got 48"),
        ("oscar:key_clip=1.5", "key_clip must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
