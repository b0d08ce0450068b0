"""Layers of a cache: made, fed, and looked into."""

from __future__ import annotations

import torch
from torch import Tensor

from logquant import LogQuantConfig
from logquant.cache.layer import LogQuantLayer

# Plain LogQuant. What its pages hold depends on their own tokens alone, not on what attended to which part of a text.
PLAIN = {"rule": "log", "sinks": 0, "key_columns": 1.0, "param_bits": 16}


def make_layer(**options) -> LogQuantLayer:
    """Plain, unless other options say so: then what a layer holds follows from its tokens alone."""
    config = LogQuantConfig(**PLAIN | options)
    return LogQuantLayer(config)


def random_tokens(count: int, *, batch: int = 1, heads: int = 2, dim: int = 64, value_dim: int = 64, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, count, d, generator=random) for d in (dim, value_dim))


def feed(layer: LogQuantLayer, k: Tensor, v: Tensor, portions: list[int]) -> None:
    first = 0
    for n in portions:
        layer.update(k[:, :, first : first + n], v[:, :, first : first + n])
        first += n


def contents(layer: LogQuantLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Pages, keys and values of the tokens that are committed now, those of the last update among them."""
    layer.commit()
    storage, exact = layer.held.storage, layer.rows.exact
    return storage.used_pages(layer.rows), storage.window_k[:, :, :exact], storage.window_v[:, :, :exact]


def row_contents(layer: LogQuantLayer, row: int) -> tuple[Tensor, ...]:
    """The same of one row."""
    layer.commit()
    slots, storage = layer.rows.slots[row if len(layer.rows.slots) > 1 else 0], layer.held.storage
    pages = storage.pages[row, :, : slots.packed // layer.format.page_tokens]
    return pages, storage.window_k[row, :, : slots.exact], storage.window_v[row, :, : slots.exact]
