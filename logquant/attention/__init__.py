"""Attention over a LogQuant cache, for models of transformers.

A transformers attention function gets ``(module, query, key, value, mask, ...)`` but not the cache. So a cache layer's
``update`` hands out :class:`KVHandle` objects in place of keys and values: tensors with the right shape, dtype and
device but no storage, which know the :class:`KVView` to attend to. Three consumers understand them:

* the attention function registered here as ``"logquant"`` calls the fused operator;
* transformers' ``"sdpa"`` calls ``F.scaled_dot_product_attention``, which the handle intercepts: the same operator;
* anything else touches the handle with some torch function, which then dequantises, with one warning.
"""

from .. import compat as compat  # first: it refuses a transformers that is too old
from .forward import logquant_attention_forward

__all__ = ["logquant_attention_forward"]
