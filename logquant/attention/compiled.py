"""``torch.compile`` of a model that decodes into a LogQuant cache.

The tracer sees two operators for each layer: one gives the new keys and values to the layer, one attends. What they do
to the layer is Python and stays out of the graph, so nothing in the graph depends on how long the context is. The layer
is named by a *layer id*, a small tensor on the CPU that the first operator hands to the second in place of keys and
values, and not by a number, for then every new cache would be compiled anew. Attention implementations other than
``"logquant"`` do not know layer ids: for them an operator gives the new tokens to the layer and dequantises all.

For the same reason neither operator may be part of a CUDA graph, whose replays run no Python: their tag says so, and
``torch.compile(mode="reduce-overhead")`` captures what lies between them. The layer keeps copies of what it is given,
and nothing of masks: what a CUDA graph has written is overwritten by its next replay, and the compiler may reuse memory
before that.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from .call import AttentionCall
from .view import View, refuse_stale


class UpdatedLayer(Protocol):
    """A layer whose ``update`` returns handles.

    Attributes:
        compiled_view: what its last update is to be attended to with, until the next one.
    """

    compiled_view: View | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]: ...


_layers: weakref.WeakValueDictionary[int, UpdatedLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def layer_id_of(layer: UpdatedLayer, value_dim: int) -> Tensor:
    """A new id of a layer: int64 ``[value_dim]``, for the shape of attention's output depends on that."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.full((value_dim,), number)


def is_layer_id(key: Tensor) -> bool:
    """Whether this came from :func:`update_layer` and not from a model."""
    return key.dtype == torch.int64 and key.dim() == 1


@torch.library.custom_op("logquant::update_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def update_layer(key_states: Tensor, value_states: Tensor, layer_id: Tensor) -> Tensor:
    """Append tokens to a layer; the result stands for the keys and values of all tokens."""
    layer = _layers[int(layer_id[0])]
    keys, _ = layer.update(key_states.clone(), value_states.clone())
    layer.compiled_view = keys.kv_view  # type: ignore[attr-defined]
    return layer_id.clone()


@update_layer.register_fake
def _(key_states: Tensor, value_states: Tensor, layer_id: Tensor) -> Tensor:
    return torch.empty_like(layer_id)


@functools.cache
def _warn_dense() -> None:
    warnings.warn(
        "torch.compile: the LogQuant cache is dequantised at every step, because the model's attention implementation "
        'knows only plain tensors; model.set_attn_implementation("logquant") before compiling attends to it directly. '
        "Padding is kept like tokens unless logquant.enable(model) or cache.set_padding() tells where it is",
        RuntimeWarning,
        stacklevel=3,
    )


@torch.library.custom_op("logquant::read_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def read_layer(key_states: Tensor, value_states: Tensor, layer_id: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Append tokens to a layer; the keys and values of all tokens, which are then ``length``, as plain tensors."""
    layer = _layers[int(layer_id[0])]
    keys, _ = layer.update(key_states.clone(), value_states.clone())
    view: View = keys.kv_view  # type: ignore[attr-defined]
    if not view.plain:
        _warn_dense()
    dense = [x.clone() for x in view.dense()]
    view.observe(None)
    return dense[0], dense[1]


@read_layer.register_fake
def _(key_states: Tensor, value_states: Tensor, layer_id: Tensor, length: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, dim = key_states.shape
    value_dim = value_states.shape[-1]
    return key_states.new_empty(batch, heads, length, dim), value_states.new_empty(batch, heads, length, value_dim)


@torch.library.custom_op("logquant::attend_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_layer(
    query: Tensor,
    layer_id: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention over a layer, ``[B, L, Hq, Dv]``; see :meth:`logquant.attention.view.KVView.attend`."""
    view = _layers[int(layer_id[0])].compiled_view
    if view is None:
        refuse_stale()
    out = view.attend(AttentionCall(query.clone(), mask, scale, softcap, sinks, causal))
    return out.transpose(1, 2).contiguous()


@attend_layer.register_fake
def _(
    query: Tensor,
    layer_id: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], layer_id.shape[0])
