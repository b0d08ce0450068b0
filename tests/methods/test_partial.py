"""PartialLogQuant: its rule against a plain statement of it, and its bytes."""

from __future__ import annotations

import pytest
import torch

from logquant.methods import Partial
from logquant.methods.registry import parse_cache
from tests.helpers.methods import ARRIVALS, BATCH, DIM, HEADS, exact_positions, feed, minmax
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_partial_keeps_keys_by_the_log_rule_and_the_newest_values(arrivals):
    layer = Partial(window=16).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    exact, total = [], sum(arrivals)
    for position in range(total):
        exact.append(position)
        while len(exact) >= 48:
            exact = exact[:32:2] + exact[32:]
    seen_k, seen_v = layer.dense()
    assert exact_positions(seen_k, keys) == exact
    assert exact_positions(seen_v, values) == list(range(total // 16 * 16, total))
    for seen, original, known in ((seen_k, keys, exact), (seen_v, values, range(total // 16 * 16, total))):
        for token in set(range(0, total, 5)) - set(known):
            assert seen[1, 0, token].tolist() == pytest.approx(minmax(original[1, 0, token].tolist()), abs=1e-5)
    halves = 2 * (DIM * 2 // 8 + 4)
    packed_k, packed_v = total - len(exact), total // 16 * 16
    assert layer.nbytes == BATCH * HEADS * (
        (packed_k + packed_v) * halves // 2 + (2 * total - packed_k - packed_v) * DIM * 4
    )


def test_heads_that_do_not_fit_are_refused():
    x = torch.zeros(1, 1, 5, 96)
    with pytest.raises(ValueError, match="group must divide the head dimension 96, got 64"):
        Partial().layer(tiny_config()).update(x, x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial:bits=3", "bits must be 2, 4 or 8, got 3"),
        ("partial:window=0", "window must be a positive whole number, got 0"),
        ("partial:group=20", "group must be a positive multiple of 16, got 20"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
