"""Caches by name, as the command line takes them: ``logquant``, ``recent:window=128``, ``full``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from .cache import LogQuantCache, LogQuantLayer
from .config import LogQuantConfig

# What makes the settings that a name stands for; "full" quantises nothing.
NAMES: dict[str, Callable[..., LogQuantConfig] | None] = {
    "logquant": LogQuantConfig,
    "paper": LogQuantConfig.paper,
    "recent": functools.partial(LogQuantConfig, rule="recent"),
    "full": None,
}
_KEYS = [field.name for field in dataclasses.fields(LogQuantConfig) if field.name != "rule"]


@dataclass(frozen=True)
class CacheSpec:
    """A named cache.

    Args:
        name: what it is called in tables and files.
        quantization: its settings; None is transformers' full-precision ``DynamicCache``.
    """

    name: str
    quantization: LogQuantConfig | None

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model with this configuration."""
        if self.quantization is None:
            return DynamicCache(config=config)
        return LogQuantCache(config, self.quantization)

    def replace(self, **fields: float) -> CacheSpec:
        """The same cache with other settings.

        Raises:
            ValueError: settings for ``full``, or invalid ones.
        """
        if not fields:
            return self
        if self.quantization is None:
            raise ValueError(f"cache 'full' has no settings, got {', '.join(fields)}")
        given = _given(self.name) | fields
        base, *_ = self.name.partition(":")
        make = NAMES[base]
        assert make is not None
        name = base + ":" + ",".join(f"{key}={value}" for key, value in given.items())
        return CacheSpec(name, make(**given))


def _given(text: str) -> dict[str, float]:
    """The settings written after the colon."""
    _, _, settings = text.partition(":")
    given: dict[str, float] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in _KEYS:
            raise ValueError(f"cache {text!r}: a setting must be one of {', '.join(_KEYS)}, got {key!r}")
        number, what = (float, "number") if key == "key_columns" else (int, "whole number")
        try:
            given[key] = number(value)
        except ValueError:
            raise ValueError(f"cache {text!r}: {key} must be a {what}, got {value!r}") from None
    return given


def parse_cache(text: str) -> CacheSpec:
    """The cache that a name stands for: ``NAME[:KEY=NUMBER,...]``, keys being fields of ``LogQuantConfig``.

    Raises:
        ValueError: an unknown name or key, or an invalid setting.
    """
    name, _, _ = text.partition(":")
    if name not in NAMES:
        raise ValueError(f"cache must be one of {', '.join(NAMES)}, got {name!r}")
    make, given = NAMES[name], _given(text)
    if make is None:
        return CacheSpec(name, None).replace(**given)
    try:
        return CacheSpec(text, make(**given))
    except ValueError as error:
        raise ValueError(f"cache {text!r}: {error}") from None


def parse_caches(text: str) -> list[CacheSpec]:
    """Several caches, separated by commas; ``key=value`` after a comma belongs to the cache before it.

    Raises:
        ValueError: as :func:`parse_cache`, or the same cache twice.
    """
    names: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in part and ":" not in part and names:
            names[-1] += ("," if ":" in names[-1] else ":") + part
        else:
            names.append(part)
    if not names:
        raise ValueError(f"caches must name at least one of {', '.join(NAMES)}, got {text!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"caches must differ, got {text!r}")
    return [parse_cache(name) for name in names]


def cache_nbytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, ours or transformers'."""
    if isinstance(cache, LogQuantCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor))


def packed_bits_per_element(cache: Cache) -> float | None:
    """Bits a quantised key or value element takes, measured from the pages in use and the column maps.

    None where nothing is quantised.
    """
    bits = elements = 0
    for layer in cache.layers:
        if isinstance(layer, LogQuantLayer) and layer.is_initialized:
            packed = layer.rows.packed
            batch, heads, _, words = layer.pages.shape
            bits += batch * heads * (packed // layer.format.page_tokens) * words * 32
            bits += 8 * layer.key_map.nbytes if layer.key_map is not None else 0
            elements += batch * heads * packed * (layer.format.head_dim + layer.format.value_dim)
    return bits / elements if elements else None
