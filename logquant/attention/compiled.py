"""``torch.compile`` of a model that decodes into a LogQuant cache.

The tracer sees two operators for each layer: one gives the new keys and values to the layer, one attends. What they do
to the layer is Python and stays out of the graph, so nothing in the graph depends on how long the context is. The layer
is named by a *ticket*, a small tensor on the CPU that the first operator hands to the second in place of keys and
values, and not by a number, for then every new cache would be compiled anew.

For the same reason neither operator may be part of a CUDA graph, whose replays run no Python: their tag says so, and
``torch.compile(mode="reduce-overhead")`` captures what lies between them. The layer keeps copies of what it is given,
and nothing of masks: what a CUDA graph has written is overwritten by its next replay, and the compiler may reuse memory
before that.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..cache.layer import LogQuantLayer
    from .view import KVView

_layers: weakref.WeakValueDictionary[int, LogQuantLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def ticket_for(layer: LogQuantLayer, value_dim: int) -> Tensor:
    """A new ticket: int64 ``[value_dim]``, for the shape of attention's output depends on that."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.full((value_dim,), number)


def is_ticket(key: Tensor) -> bool:
    """Whether this came from :func:`update_layer` and not from a model."""
    return key.dtype == torch.int64 and key.dim() == 1


@torch.library.custom_op("logquant::update_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def update_layer(key_states: Tensor, value_states: Tensor, ticket: Tensor) -> Tensor:
    """Append tokens to the layer of a ticket; the result stands for the keys and values of all tokens."""
    layer = _layers[int(ticket[0])]
    layer.handles = layer.update(key_states.clone(), value_states.clone())
    return ticket.clone()


@update_layer.register_fake
def _(key_states: Tensor, value_states: Tensor, ticket: Tensor) -> Tensor:
    return torch.empty_like(ticket)


@torch.library.custom_op("logquant::attend_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_layer(
    query: Tensor,
    ticket: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attention over the layer of a ticket, ``[B, L, Hq, Dv]``; see :meth:`logquant.attention.view.KVView.attend`."""
    layer = _layers[int(ticket[0])]
    if layer.handles is None:
        raise RuntimeError("these keys and values are stale: their LogQuant cache layer was updated since")
    view: KVView = layer.handles[0].kv_view  # type: ignore[attr-defined]
    out = view.attend(query.clone(), mask, scale, softcap=softcap, sinks=sinks, causal=causal)
    return out.transpose(1, 2).contiguous()


@attend_layer.register_fake
def _(
    query: Tensor,
    ticket: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], ticket.shape[0])
