"""ClusterKV: its clusters and what a query reads, against a plain statement of the rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from logquant.compat import as_argument
from logquant.methods import ClusterKV
from logquant.methods.clusterkv import kmeans
from logquant.methods.registry import parse_cache
from tests.helpers.methods import BATCH, DIM, HEADS, feed, tokens_for
from tests.helpers.models import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ClusterKV(budget=30, per_cluster=10, sinks=3, window=24, iterations=5, skip=0)


def clusters_by_the_paper(keys, count, iterations):
    """Centroids and labels of one head's ``keys`` ``[T, D]``."""
    centroids = [keys[i] for i in torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(iterations):
        labels = [max(range(count), key=lambda c: F.cosine_similarity(key, centroids[c], 0).item()) for key in keys]
        for c in range(count):
            if own := [key for key, label in zip(keys, labels, strict=True) if label == c]:
                centroids[c] = sum(own) / len(own)
    return centroids, labels


def read_by_the_paper(queries, centroids, labels, budget):
    """The tokens, of those in clusters, that the queries of one KV head ``[G, D]`` read together."""
    weights = sum(torch.tensor([float(q @ c) / math.sqrt(DIM) for c in centroids]).softmax(0) for q in queries.unbind())
    read = []
    for cluster in sorted(range(len(centroids)), key=lambda c: -weights[c]):
        read += [i for i, label in enumerate(labels) if label == cluster][: budget - len(read)]
    return read


@pytest.mark.parametrize("arrivals", [[100, *[1] * 60], [90, 7, 1, 40, *[1] * 20], [1] * 80])
def test_queries_read_the_clusters_that_they_ask_for(arrivals):
    layer = SETTINGS.layer(tiny_config())
    keys, values, outputs = feed(layer, arrivals)
    queries, read_sets = tokens_for(sum(arrivals))[2], set()
    for row in range(BATCH):
        for head in range(HEADS):
            own = keys[row, head].double()
            centroids, labels, position = [], [], 0
            for new, out in zip(arrivals, outputs, strict=True):
                for at in range(position, position + new):
                    group = queries[row, 2 * head : 2 * head + 2, at].double()
                    clustered = 3 + len(labels)
                    seen = [*range(min(3, at + 1)), *range(clustered, at + 1)] if at >= 3 else list(range(at + 1))
                    read = range(len(labels))
                    if len(labels) > SETTINGS.budget:
                        read = read_by_the_paper(group, centroids, labels, SETTINGS.budget)
                        read_sets.add((head, tuple(sorted(read))))
                    seen = sorted({*seen, *(3 + i for i in read)})
                    scores = group @ own[seen].T / math.sqrt(DIM)
                    want = scores.softmax(-1) @ values[row, head, seen].double()
                    got = out[row, 2 * head : 2 * head + 2, at - position].double()
                    assert torch.allclose(got, want, atol=1e-5), (row, head, at)
                position += new
                # The whole prompt, then every 24 tokens.
                while (loose := position - 3 - len(labels)) >= (1 if position == new > 1 else 24):
                    count, number = (loose, max(1, loose // 10)) if position == new > 1 else (24, 8)
                    first = 3 + len(labels)
                    more, of = clusters_by_the_paper(own[first : first + count], number, 5)
                    labels += [label + len(centroids) for label in of]
                    centroids += more
            assert layer.labels[row, head].tolist() == labels
            assert torch.allclose(layer.centroids[row, head].double(), torch.stack(centroids), atol=1e-5)
    assert len(read_sets) > 4, "queries and heads choose for themselves"


def test_a_cluster_without_keys_keeps_its_centroid():
    keys = torch.ones(1, 1, 5, DIM)
    centroids, labels = kmeans(keys, 3, 4)
    assert torch.equal(centroids, keys[:, :, :3]) and labels.unique().tolist() == [0]


def test_the_first_layers_read_everything_and_nothing_is_forgotten():
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation("logquant")
    cache = parse_cache("clusterkv:budget=20,per_cluster=10").make(model.config)
    assert [layer.reads_all for layer in cache.layers] == [True, True, False]
    ids = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, **as_argument(cache))
    assert all(layer.keys.shape[2] == 120 and layer.centroids.shape[2] == 10 for layer in cache.layers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clusterkv:budget=0", "budget must be a positive whole number, got 0"),
        ("clusterkv:sinks=-1", "sinks must be a whole number, 0 or more, got -1"),
        (
            "clusterkv:bits=2",
            "a setting must be one of budget, per_cluster, sinks, window, iterations, skip, got 'bits'",
        ),
    ],
)
def test_bad_settings_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(name)
