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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import compiled, ops
from .reference import PageFormat
from .window import Rows

# Beyond this many query tokens (chunked prefill) it is faster on a CPU to dequantise once and use matrix products.
MAX_FUSED_QUERIES = 16
# On a GPU csrc/cuda/attend_prefill.cu dequantises in shared memory, for 16-bit models up to this dim.
MAX_PREFILL_DIM = 256
# Scores held at once by the plain-torch path for models with a softcap or attention sinks.
_SCORES_AT_ONCE = 1 << 24


class Attended(NamedTuple):
    """What attended to a view: queries ``[B, Hq, L, D]``, the mask by column or None, scale and softcap of scores."""

    query: Tensor
    mask: Tensor | None
    scale: float
    softcap: float = 0.0


class KVView:
    """What one attention call sees of a layer: packed tokens, exact tokens, and the column of each.

    Args:
        pages: int32 ``[B, H, P, words]``.
        window_k: ``[B, H, N, D]``: each row's exact tokens, then the new ones.
        window_v: ``[B, H, N, Dv]``.
        fmt: the page format.
        key_map: the column map of the pages, or None.
        rows: where the tokens are that came before.
        new: how many columns are new; those attend.
        is_current: tells whether the layer still holds what it held when it made this view.
        observed: called after each attention with what attended: queries and mask, or nothing if that is not known.
        parts: None, or called before each attention with its mask: if not all of the new columns are to see the same,
            some of them at a time and the view that they are to see instead of this one, in order.
    """

    def __init__(
        self,
        pages: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        *,
        key_map: Tensor | None,
        rows: Rows,
        new: int,
        is_current: Callable[[], bool],
        observed: Callable[[Attended | None], None],
        parts: Callable[[Tensor | None], Iterable[tuple[slice, KVView]]] | None,
    ) -> None:
        self.pages, self.window_k, self.window_v, self.fmt = pages, window_k, window_v, fmt
        self.key_map = key_map
        self.rows, self.new = rows, new
        self.is_current, self.observed, self.parts = is_current, observed, parts
        self._dense: tuple[Tensor, Tensor] | None = None

    @property
    def columns(self) -> int:
        """Length of the sequences, padding included."""
        return self.rows.columns + self.new

    @property
    def is_prompt(self) -> bool:
        """Whether all tokens are new and see each other as they are: then keys and values are plain tensors."""
        return self.rows.columns == 0 and self.parts is None

    def check_current(self) -> None:
        """Refuse if the layer was updated since (RuntimeError)."""
        if not self.is_current():
            raise RuntimeError("these keys and values are stale: their LogQuant cache layer was updated since")

    def check(self, mask: Tensor | None) -> None:
        """Refuse what this view cannot show.

        Raises:
            RuntimeError: the layer was updated since.
            ValueError: the mask asks for padding, which is not kept.
        """
        self.check_current()
        self.rows.real_columns(mask, self.new, self.window_k.shape[0])

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
            q: queries; the last L columns.
            mask: ``[1 or B, 1 or Hq, 1 or L, T]`` by column, boolean (True: seen) or an additive float.
            scale: factor of the scores.
            softcap: 0, or the cap of the scores.
            sinks: ``[Hq]``, attention sinks.
            causal: whether a query sees only columns up to its own; goes without a mask.

        Returns:
            ``[B, Hq, L, Dv]``.

        Raises:
            RuntimeError, ValueError: as :meth:`check`; the layer is unchanged then.
        """
        self.check(mask)
        outs = []
        if self.parts is not None and q.shape[2] == self.new and (causal or mask is not None):
            for part, view in self.parts(mask):
                seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
                seen = None if seen is None else seen[..., : view.columns]
                outs.append(view.attend(q[:, :, part], seen, scale, softcap=softcap, sinks=sinks, causal=causal))
        out = torch.cat(outs, 2) if outs else self._attend(q, mask, scale, softcap=softcap, sinks=sinks, causal=causal)
        self.observed(Attended(q.detach(), mask, scale, softcap))
        return out

    def _attend(
        self, q: Tensor, mask: Tensor | None, scale: float, *, softcap: float, sinks: Tensor | None, causal: bool
    ) -> Tensor:
        queries = q.shape[2]
        if self.is_prompt or not self._is_fused(q):
            keys, values = (x.to(q.dtype) for x in self.dense())
            if causal and queries != self.columns:
                causal, mask = False, torch.ones(queries, self.columns, dtype=torch.bool, device=q.device)
                mask = mask.tril(self.columns - queries)[None, None]
            return exact_attention(q, keys, values, mask, scale, softcap=softcap, sinks=sinks, causal=causal)
        query_positions = None
        if causal:
            first = self.columns - queries
            query_positions = torch.arange(first, self.columns, dtype=torch.int32, device=q.device)[None]
        by_position = mask is not None or causal or not self.rows.alike
        out, _ = ops.attend(
            q,
            self.pages,
            self.window_k,
            self.window_v,
            self.fmt,
            scale=scale,
            softcap=softcap,
            key_map=self.key_map,
            mask=mask,
            positions=self.rows.positions(q.device, self.new) if by_position else None,
            query_positions=query_positions,
            sinks=None if sinks is None else sinks.float(),
            lengths=self.rows.lengths(q.device, self.fmt.page_tokens, self.window_k.shape[2]),
        )
        return out

    def _is_fused(self, q: Tensor) -> bool:
        if q.dtype != self.window_k.dtype:
            return False
        if q.shape[2] <= MAX_FUSED_QUERIES:
            return True
        prefills = q.is_cuda and q.dtype != torch.float32 and ops.has_cuda_kernels()
        return prefills and max(self.fmt.head_dim, self.fmt.value_dim) <= MAX_PREFILL_DIM

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, by column; 0 where padding was."""
        if self.is_prompt:
            return self.window_k, self.window_v
        if self._dense is None:
            slot_of = self._slot_of_column()
            packed = ops.dequantize(self.pages, self.fmt, dtype=self.window_k.dtype, key_map=self.key_map)
            both = []
            for parts in zip(packed, (self.window_k, self.window_v), strict=True):
                slots = torch.cat(parts, 2)
                if self.rows.alike:
                    both.append(slots.index_select(2, slot_of[0]))
                    continue
                # One more slot, of zeros, stands for padding.
                index = torch.where(slot_of < 0, slots.shape[2], slot_of)[:, None, :, None]
                both.append(F.pad(slots, (0, 0, 0, 1)).gather(2, index.expand(*slots.shape[:2], -1, slots.shape[3])))
            self._dense = both[0], both[1]
        return self._dense

    def _slot_of_column(self) -> Tensor:
        """The slot of each column's token, int64 ``[1 or B, T]``; -1 where there is none."""
        positions = self.rows.positions(self.window_k.device, self.new).long()
        # Empty slots go to a column of their own, which is cut off.
        column = torch.where(positions < 0, self.columns, positions)
        slot_of = torch.full((len(column), self.columns + 1), -1, device=column.device)
        slots = torch.arange(column.shape[1], device=column.device).expand_as(column)
        return slot_of.scatter_(1, column, slots)[:, :-1]


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
    """Stands for the keys or the values of a view; see the module's docstring.

    Args:
        kv_view: the view.
        part: 0: keys, 1: values.
        repeats: how often each head is repeated, as attention without grouped queries wants it.
        unmerged: 0, or how many copies of each head lie in a dimension of their own, after that of the heads: what
            ``repeat_kv`` of transformers goes through on its way.
    """

    kv_view: KVView
    part: int
    repeats: int
    unmerged: int

    @staticmethod
    def __new__(cls, kv_view: KVView, part: int, repeats: int = 1, unmerged: int = 0) -> KVHandle:
        like = (kv_view.window_k, kv_view.window_v)[part]
        batch, heads, _, dim = like.shape
        copies = (unmerged,) if unmerged else ()
        shape = (batch, heads * repeats, *copies, kv_view.columns, dim)
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


def _call_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on the dequantised tensors that handles among its arguments stand for."""
    views = []

    def dense(handle: KVHandle) -> Tensor:
        view = handle.kv_view
        view.check_current()
        views.append(view)
        if view.new == 1 and not view.is_prompt:
            _warn_dense()
        return handle.dense()

    args, kwargs = tree_map_only(KVHandle, dense, (args, kwargs))
    out = func(*args, **kwargs)
    for view in views:
        view.observed(None)
    return out


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
    if view.is_prompt:
        view.check(attn_mask)
        out = F.scaled_dot_product_attention(
            query, key.dense(), value.dense(), attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        view.observed(Attended(query.detach(), attn_mask, query.shape[-1] ** -0.5 if scale is None else scale))
        return out
    # SDPA broadcasts a single head.
    fits = query.dim() == 4 and (query.shape[1] == key.shape[1] or key.shape[1] == 1 or enable_gqa)
    if dropout_p or (is_causal and query.shape[2] != view.columns) or not fits:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return view.attend(query, attn_mask, scale, causal=is_causal)


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
        ValueError: dropout with a softcap, sinks or a cache.
    """
    is_causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    view = key.kv_view if isinstance(key, KVHandle) else None
    if view is None and compiled.is_ticket(key):
        return compiled.attend_layer(query, key, attention_mask, scale, softcap or 0.0, s_aux, causal), None
    if (view is None or view.is_prompt) and not softcap and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"the logquant attention has no dropout, got {dropout}; call model.eval()")
    if (bias := kwargs.get("position_bias")) is not None:
        attention_mask, causal = create_position_bias_mask(bias, attention_mask, causal, query, key), False
    softcap = softcap or 0.0
    if view is not None:
        out = view.attend(query, attention_mask, scale, softcap=softcap, sinks=s_aux, causal=causal)
    else:
        out = exact_attention(query, key, value, attention_mask, scale, softcap=softcap, sinks=s_aux, causal=causal)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("logquant", logquant_attention_forward)
# Without this, masks silently become None: padding and causality would be ignored.
AttentionMaskInterface.register("logquant", sdpa_mask)
