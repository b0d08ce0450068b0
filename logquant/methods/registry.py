"""Caches by name, as the command line takes them: ``logquant``, ``recent:window=128``, ``kivi:bits=4``, ``full``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from ..cache.cache import LogQuantCache
from ..cache.layer import LogQuantLayer
from ..cache.sizes import tensors_in
from ..config import LogQuantConfig
from ..quantizer.calibration import with_calibration
from . import H2O, HQQ, KIVI, OSCAR, Baseline, Partial, Quanto, Streaming, TurboQuant
from .layers.base import BaselineLayer, Packed
from .layers.evicting import EvictingLayer
from .quanto import packed_of

Settings = LogQuantConfig | Baseline | Quanto

# What makes the settings that a name stands for; "full" quantises nothing.
NAMES: dict[str, Callable[..., Settings] | None] = {
    "logquant": LogQuantConfig,
    "paper": LogQuantConfig.paper,
    "recent": functools.partial(LogQuantConfig, rule="recent"),
    "partial": Partial,
    "kivi": KIVI,
    "oscar": OSCAR,
    "turboquant": TurboQuant,
    "quanto": Quanto,
    "hqq": HQQ,
    "streaming": Streaming,
    "h2o": H2O,
    "full": None,
}


@dataclass(frozen=True)
class CacheSpec:
    """A named cache.

    Args:
        name: what it is called in tables and files.
        settings: how it is made; None is transformers' full-precision ``DynamicCache``.
    """

    name: str
    settings: Settings | None

    @property
    def quantization(self) -> LogQuantConfig | None:
        """The settings of a LogQuant cache, None for others."""
        return self.settings if isinstance(self.settings, LogQuantConfig) else None

    @property
    def is_baseline(self) -> bool:
        """Whether it is neither a LogQuant cache nor the full one."""
        return self.settings is not None and self.quantization is None

    def make(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model with this configuration.

        Raises:
            ImportError: a cache of a package that is not installed.
            ValueError: a model that this kind of cache does not fit.
        """
        if self.settings is None:
            return DynamicCache(config=config)
        if isinstance(self.settings, LogQuantConfig):
            return LogQuantCache(config, self.settings)
        return self.settings.make(config)

    def replace(self, **fields: float | str) -> CacheSpec:
        """The same cache with other settings.

        Raises:
            ValueError: settings that it does not have, or invalid ones.
        """
        if not fields:
            return self
        base, *_ = self.name.partition(":")
        given = _given(self.name) | fields
        return parse_cache(base + ":" + ",".join(f"{key}={value}" for key, value in given.items()))


def _fields(name: str) -> dict[str, Any]:
    """The settings that can be written after a name, and their types, as text."""
    make = NAMES[name]
    if make is None:
        return {}
    fields: Any = dataclasses.fields(type(make()))  # type: ignore[arg-type]
    return {field.name: field.type for field in fields if field.name != "rule"}


def _given(text: str) -> dict[str, float | str]:
    """The settings written after the colon."""
    name, _, settings = text.partition(":")
    fields = _fields(name)
    given: dict[str, float | str] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if not fields:
            raise ValueError(f"cache {name!r} has no settings, got {key}")
        if key not in fields:
            raise ValueError(f"cache {text!r}: a setting must be one of {', '.join(fields)}, got {key!r}")
        if "str" in fields[key]:
            given[key] = value
            continue
        number, what = (float, "number") if "float" in fields[key] else (int, "whole number")
        try:
            given[key] = number(value)
        except ValueError:
            raise ValueError(f"cache {text!r}: {key} must be a {what}, got {value!r}") from None
    return given


def parse_cache(text: str) -> CacheSpec:
    """The cache that a name stands for: ``NAME[:KEY=VALUE,...]``, keys being fields of its settings.

    Raises:
        FileNotFoundError: a setting names a file that is not there.
        ValueError: an unknown name or key, or an invalid setting.
    """
    name, _, _ = text.partition(":")
    if name not in NAMES:
        raise ValueError(f"cache must be one of {', '.join(NAMES)}, got {name!r}")
    make, given = NAMES[name], _given(text)
    if make is None:
        return CacheSpec(name, None)
    try:
        settings = make(**given)
        return CacheSpec(text, with_calibration(settings) if isinstance(settings, LogQuantConfig) else settings)
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


# --------------------------------------------------------------------------------------------------- what caches hold
def cache_nbytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, ours or transformers'."""
    if isinstance(cache, LogQuantCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in tensors_in(vars(layer)))


def _packed(layer: Any) -> list[Packed]:
    """What a layer holds quantised."""
    if isinstance(layer, LogQuantLayer):
        if not layer.is_initialized or not layer.rows.packed:
            return []
        packed, fmt = layer.rows.packed, layer.format
        batch, heads, _, words = layer.held.storage.pages.shape
        elements = batch * heads * packed * (fmt.head_dim + fmt.value_dim)
        return [Packed(batch * heads * (packed // fmt.page_tokens) * words * 4, elements, packed)]
    if isinstance(layer, BaselineLayer):
        return layer.packed()
    return packed_of(layer) if isinstance(layer, QuantizedLayer) else []


def packed_bits_per_element(cache: Cache) -> float | None:
    """Bits a quantised key or value element takes, measured from codes and parameters in use and from column maps.

    None where nothing is quantised.
    """
    nbytes = elements = 0
    for layer in cache.layers:
        parts = _packed(layer)
        nbytes += sum(part.nbytes for part in parts)
        elements += sum(part.elements for part in parts)
        if parts and isinstance(layer, LogQuantLayer):
            nbytes += layer.map_nbytes
    return 8 * nbytes / elements if elements else None


def token_nbytes(cache: Cache, batch: int = 1) -> float | None:
    """Bytes that each further token of a sequence takes in the long run, measured on the tensors of the cache.

    Of layers that quantise, those of a quantised token; none of layers that forget as many tokens as come; of others,
    those of an exact token.

    Args:
        cache: with tokens.
        batch: sequences it holds.

    Returns:
        Bytes in all layers, or None where a layer that quantises has not yet done so.
    """
    total = 0.0
    layer: Any
    for layer in cache.layers:
        if parts := _packed(layer):
            total += sum(part.nbytes / part.tokens for part in parts) / batch
        elif isinstance(layer, EvictingLayer) or getattr(layer, "is_sliding", False):
            continue
        elif isinstance(layer, LogQuantLayer | BaselineLayer | QuantizedLayer):
            return None
        elif isinstance(layer, DynamicLayer):
            held = sum(t.nbytes for t in tensors_in(vars(layer)))
            total += held / max(1, layer.get_seq_length()) / batch
    return total
