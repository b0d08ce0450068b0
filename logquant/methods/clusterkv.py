"""ClusterKV (arXiv 2412.03213): all tokens are kept, and a query reads the clusters of keys that it asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..attention.call import AttentionCall
from ..attention.exact import exact_attention
from ..attention.masks import hides
from ..attention.view import View
from .layers.base import Baseline
from .layers.evicting import EvictingLayer
from .registry import method


@method("clusterkv")
@dataclass(frozen=True)
class ClusterKV(Baseline):
    """ClusterKV's section 4, with the numbers of its code: semantic clusters, made when the prompt ends.

    The keys of the prompt but the first ``sinks``, and later those of every ``window`` tokens, fall into clusters in
    each KV head, by k-means with cosine distances. A query reads the clusters whose centroids it scores highest, until
    it has ``budget`` tokens, of the last one only the first; and besides, all sinks and all tokens that are in no
    cluster yet. The first ``skip`` layers read everything. Nothing is saved but reads: it is here to be compared with.

    The query heads of a KV head choose together, by the mean of their softmax over centroids; the published code, which
    repeats keys for each query head, has each choose for itself.

    Args:
        budget: tokens of clusters that a query reads.
        per_cluster: tokens of a prompt for each cluster; the paper has 80.
        sinks: first tokens, always read.
        window: tokens after which those that came since are clustered, too, into eight clusters.
        iterations: of k-means.
        skip: first layers, which read everything.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    budget: int = 1024
    per_cluster: int = 80
    sinks: int = 16
    window: int = 320
    iterations: int = 20
    skip: int = 2

    def __post_init__(self) -> None:
        for field in ("budget", "per_cluster", "window", "iterations"):
            self.need(getattr(self, field) >= 1, field, "a positive whole number")
        for field in ("sinks", "skip"):
            self.need(getattr(self, field) >= 0, field, "a whole number, 0 or more")

    def layer(self, config: PreTrainedConfig) -> ClusterKVLayer:
        return ClusterKVLayer(self)

    def make(self, config: PreTrainedConfig) -> Cache:
        cache = super().make(config)
        for layer in cache.layers[: self.skip]:
            if isinstance(layer, ClusterKVLayer):
                layer.reads_all = True
        return cache


class ClusterKVLayer(EvictingLayer):
    """Keys and values of one layer under :class:`ClusterKV`.

    Attributes:
        centroids: ``[B, H, C, D]``, the means of the keys of each cluster.
        labels: int64 ``[B, H, n]``, the cluster of each token after the sinks that is in one.
        reads_all: whether queries read everything.
    """

    forgets = False

    def __init__(self, settings: ClusterKV) -> None:
        super().__init__()
        self.settings, self.reads_all = settings, False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, dim = key_states.shape
        self.centroids = key_states.new_empty(batch, heads, 0, dim)
        self.labels = key_states.new_empty(batch, heads, 0, dtype=torch.int64)

    def view(self, new: int) -> View:
        return ClusterView(self, self.keys, self.values, new)

    def evict(self, view: View, call: AttentionCall) -> None:
        """Cluster what is due; nothing is forgotten."""
        s = self.settings
        is_prompt = view.new == self.held > 1
        loose = self.held - s.sinks - self.labels.shape[2]
        while loose >= (1 if is_prompt else s.window):
            count = loose if is_prompt else s.window
            self._cluster(count, max(1, count // s.per_cluster) if is_prompt else 8)
            loose -= count

    def _cluster(self, count: int, clusters: int) -> None:
        """The next ``count`` tokens become clusters of their own."""
        first, before = self.settings.sinks + self.labels.shape[2], self.centroids.shape[2]
        keys = self.keys[:, :, first : first + count].float()
        centroids, labels = kmeans(keys, min(clusters, count), self.settings.iterations)
        self.centroids = torch.cat([self.centroids, centroids.to(self.keys.dtype)], 2)
        self.labels = torch.cat([self.labels, labels + before], 2)

    def read_by(self, query: Tensor, scale: float) -> Tensor:
        """Which clustered tokens queries ``[B, Hq, L, D]`` read: bool ``[B, H, L, n]``."""
        heads, tokens = self.labels.shape[1:]
        query = query.float().unflatten(1, (heads, -1))
        scores = scale * torch.einsum("bhgld,bhcd->bhglc", query, self.centroids.float())
        # Better clusters come first, and of one cluster older tokens.
        place = scores.softmax(-1).mean(2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        of_tokens = place.gather(-1, self.labels[:, :, None].expand(-1, -1, place.shape[2], -1))
        read = of_tokens.argsort(dim=-1, stable=True)[..., : min(self.settings.budget, tokens)]
        return torch.zeros_like(of_tokens, dtype=torch.bool).scatter_(-1, read, True)


class ClusterView(View):
    """Keys and values of which each query reads some."""

    plain = False
    layer: ClusterKVLayer

    def attend(self, call: AttentionCall) -> Tensor:
        layer, narrowed = self.layer, call
        if not layer.reads_all and layer.labels.shape[2] > layer.settings.budget:
            narrowed = call._replace(mask=self._mask(call), causal=False)
        out = exact_attention(narrowed, self.keys, self.values)
        self.observe(call)
        return out

    def _mask(self, call: AttentionCall) -> Tensor:
        """What is not hidden, of what is read, ``[B, H or Hq, L, T]``."""
        query, queries, total = call.query, call.query.shape[2], self.length
        heads = self.keys.shape[1]
        by_head = self.new == 1 < queries  # the query heads came as queries of their KV head
        read = self.layer.read_by(query.flatten(1, 2).unsqueeze(2) if by_head else query, call.scale)
        seen = torch.ones(len(read), heads, read.shape[2], total, dtype=torch.bool, device=read.device)
        sinks = self.layer.settings.sinks
        seen[..., sinks : sinks + read.shape[3]] = read
        group = query.shape[1] // heads
        seen = seen.expand(-1, -1, queries, -1) if by_head else seen.repeat_interleave(group, 1)
        if call.mask is not None:
            return seen & ~hides(call.mask[..., :total])
        return seen.tril(total - queries) if not by_head and queries > 1 else seen


def kmeans(keys: Tensor, clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Cosine k-means of the keys of each head.

    Args:
        keys: float32 ``[B, H, T, D]``.
        clusters: how many; the same tokens of all heads, drawn at random, are the first centroids.
        iterations: assignments, each followed by new means; a cluster without keys keeps its centroid.

    Returns:
        Means ``[B, H, clusters, D]``, and of each key its cluster, int64 ``[B, H, T]``.
    """
    drawn = torch.randperm(keys.shape[2], generator=torch.Generator().manual_seed(0))[:clusters]
    centroids, directions = keys[:, :, drawn.to(keys.device)], F.normalize(keys, dim=-1)
    for _ in range(iterations):
        labels = (directions @ F.normalize(centroids, dim=-1).mT).argmax(-1)
        sums = torch.zeros_like(centroids).scatter_add_(2, labels[..., None].expand_as(keys), keys)
        counts = torch.zeros_like(centroids[..., :1]).scatter_add_(2, labels[..., None], torch.ones_like(keys[..., :1]))
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids, labels
