"""Attention over a LogQuant cache, for models of transformers.

A transformers attention function gets ``(module, query, key, value, mask, ...)`` but not the cache. So a cache layer's
``update`` hands out :class:`KVHandle` objects in place of keys and values: tensors with the right shape, dtype and
device but no storage, which know the :class:`KVView` to attend to. Three consumers understand them:

* the attention function registered here as ``"logquant"`` calls the fused operator;
* transformers' ``"sdpa"`` calls ``F.scaled_dot_product_attention``, which the handle intercepts: the same operator;
* anything else touches the handle with some torch function, which then dequantises, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import ops
from .reference import PageFormat

# Beyond this many query tokens (chunked prefill) it is faster to dequantise once and use matrix products.
MAX_FUSED_QUERIES = 16
# Scores held at once by the plain-torch path for models with a softcap or attention sinks.
_SCORES_AT_ONCE = 1 << 24


class KVView:
    """What one attention call sees of a layer: packed tokens, exact tokens, and the position of each.

    Args:
        pages: int32 ``[B, H, P, words]``.
        window_k: ``[B, H, N, D]``.
        window_v: ``[B, H, N, Dv]``.
        fmt: the page format.
        tokens: how many tokens there are, not counting dead slots.
        queries: how many of them are new; those attend.
        positions: called with a device, gives the position of each slot's token, int32 ``[P * G + N]``.
        has_dead_slots: whether some positions are -1: a token that was removed after it was packed.
        is_current: tells whether the layer still is as it was when it made this view.
    """

    def __init__(
        self,
        pages: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        *,
        tokens: int,
        queries: int,
        positions: Callable[[torch.device], Tensor],
        has_dead_slots: bool,
        is_current: Callable[[], bool],
    ) -> None:
        self.pages, self.window_k, self.window_v, self.fmt = pages, window_k, window_v, fmt
        self.tokens, self.queries, self.has_dead_slots = tokens, queries, has_dead_slots
        self.positions, self.is_current = positions, is_current
        self._dense: tuple[Tensor, Tensor] | None = None

    def _check_current(self) -> None:
        if not self.is_current():
            raise RuntimeError("these keys and values are stale: their LogQuant cache layer was updated since")

    def attend(
        self,
        q: Tensor,
        mask: Tensor | None,
        scale: float,
        *,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention of ``q`` ``[B, Hq, L, D]`` over all tokens of the view.

        Args:
            q: queries; the last L positions.
            mask: ``[1 or B, 1 or Hq, 1 or L, T]`` in logical token order, boolean (True: seen) or an additive float.
            scale: factor of the scores.
            softcap: 0, or the cap of the scores.
            sinks: ``[Hq]``, attention sinks.
            causal: whether a query sees only positions up to its own; goes without a mask.

        Returns:
            ``[B, Hq, L, Dv]``.
        """
        self._check_current()
        queries = q.shape[2]
        if queries > MAX_FUSED_QUERIES or q.dtype != self.window_k.dtype:
            keys, values = self.dense()
            if causal:
                mask = torch.ones(queries, self.tokens, dtype=torch.bool, device=q.device)
                mask = mask.tril(self.tokens - queries)[None, None]
            return exact_attention(q, keys.to(q.dtype), values.to(q.dtype), mask, scale, softcap=softcap, sinks=sinks)
        query_positions = None
        if causal:
            first = self.tokens - queries
            query_positions = torch.arange(first, self.tokens, dtype=torch.int32, device=q.device)[None]
        by_position = mask is not None or causal or self.has_dead_slots
        out, _ = ops.attend(
            q,
            self.pages,
            self.window_k,
            self.window_v,
            self.fmt,
            scale=scale,
            softcap=softcap,
            mask=mask,
            positions=self.positions(q.device)[None] if by_position else None,
            query_positions=query_positions,
            sinks=None if sinks is None else sinks.float(),
        )
        return out

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, in logical token order."""
        if self._dense is None:
            self._check_current()
            order = self.positions(self.window_k.device).long()
            packed = ops.dequantize(self.pages, self.fmt, dtype=self.window_k.dtype)
            both = [torch.cat(parts, 2) for parts in zip(packed, (self.window_k, self.window_v), strict=True)]
            if self.has_dead_slots:
                alive = (order >= 0).nonzero().squeeze(1)
                order, both = order[alive], [x.index_select(2, alive) for x in both]
            keys, values = (torch.empty_like(x).index_copy_(2, order, x) for x in both)
            self._dense = keys, values
        return self._dense


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
def _warn_dense(function: str) -> None:
    warnings.warn(
        f"the LogQuant cache is dequantised at every step, because the model's attention uses it through {function}(); "
        'model.set_attn_implementation("logquant") (or "sdpa") attends to it directly',
        RuntimeWarning,
        stacklevel=5,
    )


class KVHandle(Tensor):
    """Stands for the keys or the values of a view; see the module's docstring."""

    kv_view: KVView
    part: int  # 0: keys, 1: values

    @staticmethod
    def __new__(cls, kv_view: KVView, part: int) -> KVHandle:
        like = (kv_view.window_k, kv_view.window_v)[part]
        shape = (*like.shape[:2], kv_view.tokens, like.shape[3])
        handle: KVHandle = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        handle.kv_view, handle.part = kv_view, part
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({'values' if self.part else 'keys'}, shape={list(self.shape)}, dtype={self.dtype})"

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
        return _call_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _call_dense(func, args, kwargs or {})


def _call_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on the dequantised tensors that handles among its arguments stand for."""

    def dense(handle: KVHandle) -> Tensor:
        if handle.kv_view.queries == 1:
            _warn_dense(getattr(func, "__name__", str(func)))
        return handle.kv_view.dense()[handle.part]

    args, kwargs = tree_map_only(KVHandle, dense, (args, kwargs))
    return func(*args, **kwargs)


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
    if isinstance(query, KVHandle) or dropout_p or is_causal or (query.shape[1] != key.shape[1] and not enable_gqa):
        return None
    return key.kv_view.attend(query, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Plain attention of ``q`` ``[B, Hq, L, D]`` over exact ``k`` ``[B, H, T, D]`` and ``v`` ``[B, H, T, Dv]``.

    Uses ``F.scaled_dot_product_attention`` where that can; with a softcap or sinks it computes blocks of queries in
    float32, so that the scores of a long prompt are never held at once.
    """
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    group = heads // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    block = max(1, _SCORES_AT_ONCE // max(1, batch * heads * tokens))
    out = q.new_empty(batch, heads, queries, v.shape[-1])
    for first in range(0, queries, block):
        rows = slice(first, min(first + block, queries))
        scores = scale * (q[:, :, rows].float() @ keys.mT)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            part = part[..., :tokens]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        elif causal:
            seen = (
                torch.arange(tokens, device=q.device) <= torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            )
            scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1).nan_to_num(0.0) if mask is not None else scores.softmax(-1)
        out[:, :, rows] = (weights @ values).to(q.dtype)
    return out


def logquant_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``"logquant"`` of transformers: fused over a LogQuant cache, exact over plain tensors.

    Raises:
        ValueError: dropout with a softcap or sinks, or a position bias over a cache.
    """
    packed = key.kv_view if isinstance(key, KVHandle) else None
    if packed is None and not softcap and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"the logquant attention has no dropout, got {dropout}; call model.eval()")
    if kwargs.get("position_bias") is not None:
        raise ValueError('position_bias is not supported by the logquant attention; use attn_implementation="sdpa"')
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = softcap or 0.0
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if packed is not None:
        out = packed.attend(query, attention_mask, scale, softcap=softcap, sinks=s_aux, causal=causal)
    else:
        out = exact_attention(query, key, value, attention_mask, scale, softcap=softcap, sinks=s_aux, causal=causal)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("logquant", logquant_attention_forward)
# Without this, masks silently become None: padding and causality would be ignored.
AttentionMaskInterface.register("logquant", sdpa_mask)
