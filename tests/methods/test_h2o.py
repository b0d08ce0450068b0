"""H2O: its rule against a plain statement of Algorithm 1, and its bytes."""

from __future__ import annotations

import math

import pytest
import torch

from logquant.methods import H2O
from logquant.methods.registry import parse_cache
from tests.helpers.methods import BATCH, DIM, HEADS, feed, tokens_for
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def h2o_by_the_paper(keys, queries, arrivals, heavy, recent):
    """Kept positions of one KV head, whose query heads are ``queries`` ``[G, T, D]``: Algorithm 1."""
    score, kept, position = {}, [], 0
    for new in arrivals:
        kept += range(position, position + new)
        for at in range(position, position + new):
            seen = [j for j in kept if j <= at]
            for query in queries:
                logits = [float(query[at] @ keys[j]) / math.sqrt(DIM) for j in seen]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                for j, weight in zip(seen, weights, strict=True):
                    score[j] = score.get(j, 0.0) + weight / sum(weights)
        position += new
        if len(kept) > heavy + recent:
            older = sorted(kept[:-recent], key=lambda j: score[j], reverse=True)[:heavy]
            kept = sorted(older) + kept[-recent:]
    return kept, score


@pytest.mark.parametrize("arrivals", [[40, *[1] * 8], [5, *[1] * 25], [25, 6, 1, 9]])
def test_h2o_keeps_what_got_most_attention(arrivals):
    layer = H2O(heavy=6, recent=9).layer(tiny_config())
    keys, values, _ = feed(layer, arrivals)
    queries = tokens_for(sum(arrivals))[2].double()
    kinds = set()
    for row in range(BATCH):
        for head in range(HEADS):
            group = queries[row, 2 * head : 2 * head + 2]
            kept, score = h2o_by_the_paper(keys[row, head].double(), group, arrivals, 6, 9)
            assert torch.equal(layer.keys[row, head], keys[row, head, kept])
            assert torch.equal(layer.values[row, head], values[row, head, kept])
            assert layer.scores[row, head].tolist() == pytest.approx([score[j] for j in kept], rel=1e-4)
            kinds.add(tuple(kept))
    assert len(kinds) > 1  # heads choose for themselves
    assert layer.nbytes == BATCH * HEADS * 15 * (2 * DIM * 4 + 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h2o:heavy=-1", "heavy must be a whole number of tokens, 0 or more, got -1"),
        ("h2o:bits=2", "a setting must be one of heavy, recent, got 'bits'"),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
