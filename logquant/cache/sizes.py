"""Bytes and capacities that follow from a configuration, and bytes of what caches hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..quantizer.queries import kept_queries
from ..residual.trained import residual_of
from ..rule import evictions


def window_capacity(config: LogQuantConfig) -> int:
    """Exact tokens there is room for; the cache evicts as soon as this many are there."""
    return config.sinks + 3 * config.window


def window_slots(config: LogQuantConfig, exact: int) -> int:
    """Slots that are allocated for ``exact`` exact tokens: room for W more, but not beyond the capacity."""
    return min(window_capacity(config), exact + config.window)


def packed_tokens(config: LogQuantConfig, tokens: int, head_dim: int | None = None) -> int:
    """How many of ``tokens`` tokens are quantised; with ``prune``, if all are of a prompt.

    Args:
        config: what is kept exact and how the rest is stored.
        tokens: tokens seen.
        head_dim: channels of a key and of a value, where ``prune`` is given bytes.
    """
    left = config.window * evictions(tokens, config.window, config.sinks)
    budget = config.budget(head_dim)
    return left if budget is None or not left else budget.kept(tokens, left)


def store_pages(pages: int) -> int:
    """Pages that a store is given when it grows to hold ``pages``.

    Attention reads the whole store at every token, and the store is copied once in at least W tokens: growing it by
    little costs little time, and every page to spare costs memory.
    """
    return pages + max(1, pages // 32)


def head_nbytes(
    config: LogQuantConfig,
    tokens: int,
    head_dim: int,
    value_dim: int | None = None,
    itemsize: int = 2,
    *,
    decoding: bool = False,
    query_heads: int = 0,
) -> int:
    """Bytes of one KV head of one sequence after a prompt of ``tokens`` tokens: its pages and its window.

    Args:
        config: what is kept exact and how the rest is stored.
        tokens: tokens seen.
        head_dim, value_dim: channels of a key and of a value.
        itemsize: bytes of an exact element.
        query_heads: query heads of a KV head, whose newest queries are kept where parameters are searched or bits
            allocated; 0 counts none, as when the attention does not tell its queries.
        decoding: the last tokens were decoded, not part of a prompt: the most that the cache may hold then, for a
            store that grows gets pages to spare. With ``prune`` they count as part of it, nevertheless.
    """
    fmt = config.page_format(head_dim, value_dim)
    packed = packed_tokens(config, tokens, head_dim)
    pages = packed // fmt.page_tokens
    window = window_slots(config, tokens if packed == 0 else window_capacity(config))
    stored = store_pages(pages) if decoding and pages else pages
    key_map = 2 * fmt.key_columns if config.allocates_bits(fmt) else 0
    kept = kept_queries(config, fmt, allocated=packed > 0)
    queries = min(tokens, kept) * query_heads * fmt.head_dim * itemsize
    return key_map + queries + stored * fmt.nbytes + window * (fmt.head_dim + fmt.value_dim) * itemsize


def choice_nbytes(
    config: LogQuantConfig, tokens: int, kv_heads: int, head_dim: int | None = None, *, decoding: bool = False
) -> int:
    """Bytes of what the rule ``attention`` keeps for one sequence in one layer after a prompt of ``tokens`` tokens.

    Those are the positions of its tokens, and what the exact ones have been given (:mod:`logquant.cache.chosen`).

    Args:
        config: what is kept exact and how the rest is stored.
        tokens: tokens seen.
        kv_heads: KV heads of the layer.
        head_dim: as for :func:`packed_tokens`.
        decoding: as for :func:`head_nbytes`.
    """
    if config.rule != "attention":
        return 0
    # The last token of a step takes its place with the next one, and its sums lie beside those of the others till then.
    committed = tokens - 1 if decoding else tokens
    packed = packed_tokens(config, committed, head_dim)
    exact = committed - config.window * evictions(committed, config.window, config.sinks)
    sums = kv_heads * (2 * exact + 1 if decoding else exact)
    return packed * position_dtype(committed).itemsize + 4 * (exact + sums)


def index_nbytes(config: LogQuantConfig, tokens: int, head_dim: int, layer: int) -> int:
    """Bytes of the mean keys that layer ``layer`` keeps for one KV head of one sequence of ``tokens`` tokens.

    Those are what ``recall`` chooses pages by (:mod:`logquant.recall.index`).
    """
    spec = config.recall_spec(layer)
    if spec is None or not spec.uses_means:
        return 0
    return packed_tokens(config, tokens, head_dim) // config.page_size * (head_dim + 4)


def residual_nbytes(config: LogQuantConfig, value_dim: int, layer: int) -> int:
    """Bytes of what layer ``layer`` keeps of dropped tokens for one KV head of one sequence: float32 sums.

    Raises:
        FileNotFoundError, ValueError: as :func:`logquant.residual.trained.residual_of`.
    """
    trained = residual_of(config)
    features = None if trained is None else trained.features(layer, torch.device("cpu"))
    return 0 if features is None else features.rank * (value_dim + 1) * torch.float32.itemsize


def position_dtype(length: int) -> torch.dtype:
    """The smallest type that holds positions below ``length``."""
    return torch.int16 if length <= torch.iinfo(torch.int16).max else torch.int32


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a value holds: in dictionaries, in lists, in tensors that are made of others."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from tensors_in([getattr(value, name) for name in names])
        else:
            yield value
