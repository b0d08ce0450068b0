"""What caches hold: bytes, bits of a quantised element, bytes of a further token; ours and transformers' alike."""

from __future__ import annotations

import functools
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from ..cache.cache import LogQuantCache
from ..cache.layer import LogQuantLayer
from ..cache.sizes import tensors_in
from .layers.base import HoldsPacked, Packed


def commit(cache: Cache) -> None:
    """Have the tokens that came last take their places, where a cache has such as wait for it: ours."""
    if isinstance(cache, LogQuantCache):
        cache.commit()


def cache_nbytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, ours or transformers'."""
    if isinstance(cache, LogQuantCache):
        return cache.nbytes
    return sum(t.nbytes for layer in cache.layers for t in tensors_in(vars(layer)))


def packed_bits_per_element(cache: Cache) -> float | None:
    """Bits a quantised key or value element takes, measured: codes and parameters in use, column maps, positions.

    Positions are those of quantised tokens where the rule ``attention`` keeps them. None where nothing is quantised.
    """
    parts = [part for layer in cache.layers for part in packed_in(layer) or ()]
    nbytes = sum(part.nbytes + part.fixed_nbytes for part in parts)
    elements = sum(part.elements for part in parts)
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
        parts = packed_in(layer)
        if parts:
            total += sum(part.nbytes / part.tokens for part in parts) / batch
        elif parts is not None:
            return None
        elif _keeps_all(layer):
            held = sum(t.nbytes for t in tensors_in(vars(layer)))
            total += held / max(1, layer.get_seq_length()) / batch
    return total


def _keeps_all(layer: Any) -> bool:
    """Whether a layer that does not quantise holds every token that has come."""
    return isinstance(layer, DynamicLayer) and not layer.is_sliding and not getattr(layer, "forgets", False)


@functools.singledispatch
def packed_in(layer: object) -> list[Packed] | None:
    """What a layer holds quantised, as it says itself or as an adapter below does; None where it never quantises."""
    return layer.packed() if isinstance(layer, HoldsPacked) else None


@packed_in.register
def _of_logquant(layer: LogQuantLayer) -> list[Packed]:
    if not layer.is_initialized or not layer.rows.packed:
        return []
    packed, fmt = layer.rows.packed, layer.format
    batch, heads, _, words = layer.held.storage.pages.shape
    elements = batch * heads * packed * (fmt.head_dim + fmt.value_dim)
    nbytes = batch * heads * (packed // fmt.page_tokens) * words * layer.held.storage.pages.itemsize
    if chosen := layer.held.chosen:  # tokens that attention has chosen are at positions which nothing else tells
        nbytes += chosen.packed[:, :packed].nbytes
    return [Packed(nbytes, elements, packed, layer.map_nbytes)]


@packed_in.register
def _of_transformers(layer: QuantizedLayer) -> list[Packed]:
    exact = layer.keys
    tokens = layer.get_seq_length() - (0 if exact is None or exact.dim() < 4 else exact.shape[-2])
    parts = []
    for quantized in (layer._quantized_keys, layer._quantized_values):
        if quantized is not None:
            elements = layer._dequantize(quantized).numel()
            parts.append(Packed(sum(t.nbytes for t in tensors_in(quantized)), elements, tokens))
    return parts
