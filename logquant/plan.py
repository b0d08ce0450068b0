"""What a cache takes for a model, from the model's configuration alone: ``logquant plan``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache.sizes import choice_nbytes, head_nbytes, index_nbytes, residual_nbytes, window_capacity
from .config import LogQuantConfig
from .methods.registry import CacheSpec, parse_cache

_MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class HeadShape:
    """The KV heads of a layer of a model.

    Args:
        count: KV heads.
        dim: channels of a key.
        group: query heads of a KV head.
        value_dim: channels of a value.
        asked: query heads of a KV head whose queries the cache is told; 0 where keys are made of latents.
    """

    count: int
    dim: int
    group: int
    value_dim: int
    asked: int


@dataclass(frozen=True)
class Plan:
    """What fits into a budget with one cache.

    Args:
        cache: its name.
        nbytes: bytes of one sequence.
        batch: sequences that fit.
        longest: tokens that fit if there is one sequence.
    """

    cache: str
    nbytes: int
    batch: int
    longest: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def head_shape(config: PreTrainedConfig, layer: int = 0) -> HeadShape:
    """The KV heads of an attention layer of a model, as its configuration says, also what it says of low rank.

    Raises:
        ValueError: a model with latent attention (DeepSeek's): what it caches depends on the version of transformers.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"config must be of a model that caches keys and values, got {text.model_type}, which may not")
    heads: int = text.num_attention_heads
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
    group = heads // kv_heads
    low: dict[str, Any] = getattr(text, "lowrank", None) or {}
    value_dim = low["values"][layer] if low else head_dim
    if low and (latents := low["keys"][layer]) is not None:
        return HeadShape(kv_heads, latents // kv_heads, group, value_dim, asked=0)
    return HeadShape(kv_heads, head_dim, group, value_dim, asked=group)


def sequence_nbytes(
    spec: CacheSpec, config: PreTrainedConfig, tokens: int, itemsize: int, *, decoding: bool = False
) -> int:
    """Bytes that a cache holds for one sequence after a prompt of ``tokens`` tokens.

    Args:
        spec: the cache, LogQuant or full.
        config: the model's configuration.
        tokens: tokens seen.
        itemsize: bytes of an exact element.
        decoding: count the pages that the store of a cache which has decoded may have to spare.

    Raises:
        ValueError: another cache, or one with ``evict``; a layer that is neither full nor sliding-window attention,
            whose size the configuration alone does not tell; or as :func:`head_shape`.
    """
    if spec.is_baseline:
        raise ValueError(f"cache must be full, logquant or one with its settings, got {spec.name!r}")
    if spec.quantization is not None and spec.quantization.evict is not None:
        raise ValueError(f"cache must be one without evict, of which the text says how much stays, got {spec.name!r}")
    nbytes, layers = 0, DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        kept, shape = tokens, head_shape(config, i)
        if type(layer) is DynamicSlidingWindowLayer:
            kept = min(tokens, layer.sliding_window - 1)
        elif type(layer) is not DynamicLayer:
            raise ValueError(f"layer {i} must be full or sliding-window attention, got {type(layer).__name__}")
        if type(layer) is DynamicLayer and spec.quantization is not None:
            own = spec.quantization.of_layer(i, len(layers))
            nbytes += _layer_nbytes(own, shape, tokens, i, itemsize, decoding=decoding)
        else:
            nbytes += shape.count * kept * (shape.dim + shape.value_dim) * itemsize
    return nbytes


def _layer_nbytes(
    config: LogQuantConfig, shape: HeadShape, tokens: int, layer: int, itemsize: int, *, decoding: bool
) -> int:
    """Bytes of one layer of a LogQuant cache."""
    dims = shape.dim, shape.value_dim
    head = head_nbytes(config, tokens, *dims, itemsize, decoding=decoding, query_heads=shape.asked)
    head += index_nbytes(config, tokens, shape.dim, layer) + residual_nbytes(config, shape.value_dim, layer)
    return shape.count * head + choice_nbytes(config, tokens, shape.count, shape.dim, decoding=decoding)


def pays_from(spec: CacheSpec, config: PreTrainedConfig, itemsize: int) -> int:
    """The least tokens from which on a LogQuant cache that decodes takes fewer bytes than the full one.

    Args:
        spec: a LogQuant cache.
        config: the model's configuration.
        itemsize: bytes of an exact element.

    Raises:
        ValueError: another cache, a model without full attention, or as :func:`sequence_nbytes`.
    """
    if spec.quantization is None:
        raise ValueError(f"cache must be logquant or one with its settings, got {spec.name!r}")
    if all(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        raise ValueError(f"config must be of a model with full attention in some layer, got {config.model_type}")
    quantization, full = spec.quantization, parse_cache("full")

    def smaller(tokens: int) -> bool:
        held, plain = (sequence_nbytes(each, config, tokens, itemsize, decoding=True) for each in (spec, full))
        return held < plain

    # Before the first eviction there are as many exact tokens and room for more. From one to the next, what is held
    # grows by less than the full cache; a store that grows by a page to spare may be the larger one again, but not for
    # 32 pages.
    evictions = itertools.count(window_capacity(quantization), quantization.window)
    least, in_a_row = window_capacity(quantization), 0
    while in_a_row < 64:
        tokens = next(evictions)
        in_a_row += 1
        if not smaller(tokens):
            till = tokens + quantization.window
            least, in_a_row = next(filter(smaller, range(tokens, till)), till), 0
    return least


def plan(spec: CacheSpec, config: PreTrainedConfig, *, budget: int, tokens: int, itemsize: int) -> Plan:
    """How many sequences of a length fit into a number of bytes, and how long a single one may be.

    Args:
        spec: the cache, LogQuant or full.
        config: the model's configuration.
        budget: bytes for keys and values.
        tokens: tokens of each sequence, prompt and generated.
        itemsize: bytes of an exact element.

    Raises:
        ValueError: a budget or length that is not positive, or as :func:`sequence_nbytes`.
    """
    for name, value in (("budget", budget), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    def nbytes(count: int) -> int:
        return sequence_nbytes(spec, config, count, itemsize, decoding=True)

    return Plan(spec.name, nbytes(tokens), budget // nbytes(tokens), largest(lambda n: nbytes(n) <= budget))


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to 2^40 that fits, if every smaller one does."""
    low, high = 0, _MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
