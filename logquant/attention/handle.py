"""Tensors without storage that stand for the keys or the values of a view.

A transformers attention function gets ``(module, query, key, value, mask, ...)`` but not the cache. So a cache layer's
``update`` hands out :class:`KVHandle` objects in place of keys and values: tensors with the right shape, dtype and
device, which know the view to attend to. Three consumers understand them:

* the attention function ``"logquant"`` (forward.py) calls the fused operator;
* transformers' ``"sdpa"`` calls ``F.scaled_dot_product_attention``, which the handle intercepts: the same operator;
* anything else touches the handle with some torch function, which then dequantises, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .call import AttentionCall
from .view import View

_METADATA = frozenset(
    {
        Tensor.dim,
        Tensor.is_complex,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
        Tensor.__len__,
    }
    | {
        getattr(Tensor, name).__get__
        for name in [
            "device",
            "dtype",
            "is_cpu",
            "is_cuda",
            "is_meta",
            "is_nested",
            "is_quantized",
            "is_sparse",
            "layout",
            "ndim",
            "requires_grad",
            "shape",
        ]
    }
)


@functools.cache
def _warn_dense() -> None:
    warnings.warn(
        "the LogQuant cache is dequantised at every step, because the model's attention implementation knows only "
        'plain tensors; model.set_attn_implementation("logquant") (or "sdpa") attends to it directly. Padding is kept '
        "like tokens unless logquant.enable(model) or cache.set_padding() tells where it is",
        RuntimeWarning,
        stacklevel=5,
    )


class KVHandle(Tensor):
    """Stands for the keys or the values of a view.

    Args:
        kv_view: the view.
        part: 0: keys, 1: values.
        repeats: how often each head is repeated, as attention without grouped queries wants it.
        unmerged: 0, or how many copies of each head lie in a dimension of their own, after that of the heads: what
            ``repeat_kv`` of transformers goes through on its way.
    """

    kv_view: View
    part: int
    repeats: int
    unmerged: int

    @staticmethod
    def __new__(cls, kv_view: View, part: int, repeats: int = 1, unmerged: int = 0) -> KVHandle:
        like = (kv_view.keys, kv_view.values)[part]
        batch, heads, _, dim = like.shape
        copies = (unmerged,) if unmerged else ()
        shape = (batch, heads * repeats, *copies, kv_view.length, dim)
        handle: KVHandle = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        handle.kv_view, handle.part, handle.repeats, handle.unmerged = kv_view, part, repeats, unmerged
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({'values' if self.part else 'keys'}, shape={list(self.shape)}, dtype={self.dtype})"

    def dense(self) -> Tensor:
        """The tensor that this one stands for."""
        x = self.kv_view.dense()[self.part]
        if self.repeats > 1:
            x = x.repeat_interleave(self.repeats, 1)
        return x.unsqueeze(2).expand(-1, -1, self.unmerged, -1, -1) if self.unmerged else x

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            out = _intercept_sdpa(*args, **kwargs)
            if out is not None:
                return out
        if isinstance(args[0], KVHandle) and (handle := _repeated(func, *args, **kwargs)) is not None:
            return handle
        return _call_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _call_dense(func, args, kwargs or {})


_ALL = slice(None)


def _repeated(func: Any, handle: KVHandle, *args: Any, **kwargs: Any) -> KVHandle | None:
    """The handle for what ``func`` makes of one where it only repeats heads, as ``repeat_kv`` does in three steps."""
    if kwargs:
        return None
    view, part, repeats, copies = handle.kv_view, handle.part, handle.repeats, handle.unmerged
    if func is Tensor.contiguous and not args:
        return handle
    if func is Tensor.to and args == (handle.dtype,):  # some models bring keys to the dtype of values
        return handle
    if func is Tensor.__getitem__ and not copies and args == ((_ALL, _ALL, None, _ALL, _ALL),):
        return KVHandle(view, part, repeats, unmerged=1)
    if func not in (Tensor.expand, Tensor.reshape) or not copies or repeats > 1:
        return None
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args
    before = tuple(handle.shape)
    if func is Tensor.expand and copies == 1 and len(shape) == 5 and shape[:2] + shape[3:] == before[:2] + before[3:]:
        return KVHandle(view, part, unmerged=shape[2])
    if func is Tensor.reshape and shape == (before[0], before[1] * copies, *before[3:]):
        return KVHandle(view, part, repeats=copies)
    return None


@torch.compiler.disable
def _call_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on the dequantised tensors that handles among its arguments stand for."""
    views = []

    def dense(handle: KVHandle) -> Tensor:
        view = handle.kv_view
        view.check_current()
        views.append(view)
        if view.new == 1 and not view.plain:
            _warn_dense()
        return handle.dense()

    args, kwargs = tree_map_only(KVHandle, dense, (args, kwargs))
    out = func(*args, **kwargs)
    for view in views:
        view.observe(None)
    return out


@torch.compiler.disable
def _intercept_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``F.scaled_dot_product_attention`` on handles, or None where the fused operator does not compute the same."""
    if not (isinstance(key, KVHandle) and isinstance(value, KVHandle) and key.kv_view is value.kv_view):
        return None
    view = key.kv_view
    if isinstance(query, KVHandle) or key.unmerged or value.unmerged or key.repeats != value.repeats:
        return None
    if view.plain:
        view.check(attn_mask)
        out = F.scaled_dot_product_attention(
            query, key.dense(), value.dense(), attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        view.observe(AttentionCall(query, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale))
        return out
    # SDPA broadcasts a single head.
    fits = query.dim() == 4 and (query.shape[1] == key.shape[1] or key.shape[1] == 1 or enable_gqa)
    if dropout_p or (is_causal and query.shape[2] != view.length) or not fits:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return view.attend(AttentionCall(query, attn_mask, scale, causal=is_causal))


def handles(view: View) -> tuple[KVHandle, KVHandle]:
    """For the keys and the values of a view: what a layer's ``update`` returns."""
    return KVHandle(view, 0), KVHandle(view, 1)
