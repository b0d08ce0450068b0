"""What new tokens attend to: the keys and values of a layer, as they are when the tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..format import PageFormat
from ..recall.reading import Reading, Recall, with_sinks
from .call import AttentionCall
from .exact import exact_attention
from .fused import fused_attention
from .gradients import records, refusing_gradients
from .units import AS_THEY_ARE, Units, scaled

# Beyond this many query tokens (chunked prefill) it is faster on a CPU to dequantise once and use matrix products.
MAX_FUSED_QUERIES = 16
# On a GPU csrc/cuda/attend_prefill.cu dequantises in shared memory, for 16-bit models up to this dim.
MAX_PREFILL_DIM = 256


class Observer(Protocol):
    """A layer that learns what attends to it."""

    def observe(self, view: View, call: AttentionCall | None) -> None:
        """``call`` has attended to ``view``; None if a function has read it that does not tell its queries."""


class View:
    """Keys and values that attention may take as plain tensors.

    Args:
        layer: whose they are; it learns what attends to them.
        keys, values: ``[B, H, T, D]`` and ``[B, H, T, Dv]``, the new tokens last.
        new: how many tokens are new; those attend.
    """

    # Whether all tokens are as they came, so that any attention over plain tensors is right.
    plain = True

    def __init__(self, layer: Observer, keys: Tensor, values: Tensor, new: int) -> None:
        self.layer, self.keys, self.values, self.new = layer, keys, values, new

    @property
    def length(self) -> int:
        """Positions, padding included."""
        return self.keys.shape[2]

    def check_current(self) -> None:
        """Refuse if the layer has changed since (RuntimeError); plain tensors do not."""

    def check(self, mask: Tensor | None) -> None:
        """Refuse what this view cannot show; plain tensors show all."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]`` by position."""
        return self.keys, self.values

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over all tokens of the view, ``[B, Hq, L, Dv]``; the layer learns of it."""
        out = exact_attention(call, *self.dense())
        self.observe(call)
        return out

    def observe(self, call: AttentionCall | None) -> None:
        """Tell the layer what has attended, where that was not :meth:`attend`."""
        self.layer.observe(self, call)


def refuse_stale() -> NoReturn:
    """Refuse (RuntimeError) keys and values that a layer has gone on from."""
    raise RuntimeError("these keys and values are stale: their LogQuant cache layer was updated since")


def unpacked(
    pages: Tensor, fmt: PageFormat, dtype: torch.dtype, key_map: Tensor | None, *, severed: bool
) -> tuple[Tensor, Tensor]:
    """The tokens of pages, :func:`logquant.ops.dequantize`; through those that are ``severed`` no gradient flows."""
    keys, values = ops.dequantize(pages, fmt, dtype=dtype, key_map=key_map)
    if severed and torch.is_grad_enabled():
        return refusing_gradients(keys), refusing_gradients(values)
    return keys, values


class Layout(Protocol):
    """Where the tokens of each row are (:class:`logquant.cache.layout.Rows`)."""

    @property
    def length(self) -> int: ...
    @property
    def packed_counts(self) -> tuple[int, ...]: ...
    @property
    def alike(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    def all_seen(self, mask: Tensor) -> Tensor: ...
    def positions(self, device: torch.device, new: int = 0) -> Tensor: ...
    def lengths(self, device: torch.device, page_tokens: int, window_tokens: int) -> Tensor | None: ...
    def real_positions(self, mask: Tensor | None, new: int, batch: int) -> Tensor | None: ...


class RaggedPages(Protocol):
    """Pages of which each KV head has its own number (:class:`logquant.cache.ragged.Ragged`)."""

    def attend(
        self,
        q: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        *,
        positions: Tensor | None,
        packed: int,
        key_map: Tensor | None,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]: ...


class LeftOver(Protocol):
    """What is left of tokens that were dropped (:class:`logquant.residual.state.Residual`)."""

    def join(self, query: Tensor, out: Tensor, lse: Tensor) -> Tensor: ...


class PackedLayer(Observer, Protocol):
    """A layer whose older tokens are in pages."""

    version: int

    def attend(self, view: KVView, call: AttentionCall) -> Tensor:
        """As :meth:`KVView.attend`, which has checked the call."""
        ...


class KVView(View):
    """Packed tokens, exact tokens, and the position of each.

    Args:
        layer: whose they are.
        keys: ``[B, H, N, D]``: each row's exact tokens, then the new ones.
        values: ``[B, H, N, Dv]``.
        new: how many positions are new; those attend.
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        key_map: the bit allocation of keys, or None.
        rows: where the tokens are that came before.
        plain: whether all tokens are new and see each other as they are.
        units: those that pages and exact tokens are in.
        severed: whether packed tokens came with a gradient, which is lost.
        given: float32 ``[B, H, exact]``, what queries have given to exact tokens that came before; None if nobody asks.
        recall: which of the pages are read by few queries; None: all.
        ragged: pages of which each KV head has its own number; None: ``pages``.
        residual: what is left of tokens that were dropped, if something is.

    Attributes:
        given_after: ``[B, H, N]``, the same of all exact tokens once the operator that counts it has attended to this
            view; else None.
        lse: ``[B, Hq, L]``, the log-sum-exp of the scores of queries that have attended to ragged pages.
    """

    layer: PackedLayer

    def __init__(
        self,
        layer: PackedLayer,
        keys: Tensor,
        values: Tensor,
        new: int,
        pages: Tensor,
        fmt: PageFormat,
        *,
        key_map: Tensor | None,
        rows: Layout,
        plain: bool,
        units: Units = AS_THEY_ARE,
        severed: bool = False,
        given: Tensor | None = None,
        recall: Recall | None = None,
        ragged: RaggedPages | None = None,
        residual: LeftOver | None = None,
    ) -> None:
        super().__init__(layer, keys, values, new)
        self.pages, self.fmt, self.key_map, self.rows = pages, fmt, key_map, rows
        self.plain, self.units, self.severed = plain, units, severed
        self.given, self.recall, self.ragged, self.residual = given, recall, ragged, residual
        self.given_after: Tensor | None = None
        self.lse: Tensor | None = None
        self.version = layer.version
        self._dense: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return self.rows.length + self.new

    @property
    def is_current(self) -> bool:
        """Whether the layer still holds what it held when it made this view."""
        return self.version == self.layer.version

    @property
    def complete(self) -> bool:
        """Whether all tokens that have come are still there, in the same places of all KV heads."""
        return self.rows.complete and (self.ragged is None or not max(self.rows.packed_counts))

    def check_current(self) -> None:
        if not self.is_current:
            refuse_stale()

    def check(self, mask: Tensor | None) -> None:
        """Refuse what this view cannot show.

        Raises:
            RuntimeError: the layer was updated since.
            ValueError: the mask asks for padding, which is not kept; or hides tokens where each KV head has
                chosen among them.
        """
        self.check_current()
        self.rows.real_positions(mask, self.new, self.keys.shape[0])
        if mask is not None and not self.complete and not self.rows.all_seen(mask).all():
            raise ValueError(
                "attention_mask must show all tokens that came before, and add nothing to their scores: with prune, "
                "evict or order=clusters each KV head has chosen among them"
            )

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over all tokens of the view, ``[B, Hq, L, Dv]``; the layer learns of it.

        Raises:
            RuntimeError, ValueError: as :meth:`check`; the layer is unchanged then.
        """
        self.check(call.mask)
        return self.layer.attend(self, call)

    def compute(self, call: AttentionCall) -> Tensor:
        """The same, without telling the layer: by the fused operator, or over dequantised tensors."""
        q, queries, causal = call.query, call.query.shape[2], call.causal
        residual = None if self.plain or self.complete else self.residual
        if residual is not None and records(q, self.keys, self.values):
            raise RuntimeError("residual computes no gradients: call the model under torch.no_grad()")
        if self.ragged is not None and not self.plain:
            out, lse = self._attend_ragged(call, self.ragged)
            if residual is None:
                return out
            # The operator has one sink for all rows, so it has not counted these.
            lse = lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[None, :, None])
            return residual.join(q, out, lse)
        if residual is not None:
            return self._attend_with(residual, call)
        if self.plain or not self._is_fused(queries) or records(q, self.keys, self.values):
            if not self.rows.complete:
                return self._attend_by_slot(call)
            keys, values = (x.to(q.dtype) for x in self.dense())
            if causal and queries != self.length:
                seen = torch.ones(queries, self.length, dtype=torch.bool, device=q.device)
                call = call._replace(causal=False, mask=seen.tril(self.length - queries)[None, None])
            return exact_attention(call, keys, values)
        out, _, given_after = self._attend_fused(*next(self._parts(call, queries)), self.given)
        if given_after is not None:
            self.given_after = given_after
        return out

    def _parts(self, call: AttentionCall, most: int) -> Iterator[tuple[AttentionCall, Tensor | None]]:
        """At most so many queries at a time, and their positions int32 ``[1, n]`` if they see only those before."""
        q, mask, queries = call.query, call.mask, call.query.shape[2]
        at = None
        if call.causal:
            at = torch.arange(self.length - queries, self.length, dtype=torch.int32, device=q.device)[None]
        if queries <= most:
            yield call, at
            return
        for first in range(0, queries, most):
            own = slice(first, first + most)
            own_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, own]
            yield call._replace(query=q[:, :, own], mask=own_mask), None if at is None else at[:, own]

    def _attend_fused(
        self, call: AttentionCall, at: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """:func:`fused_attention` of queries ``at`` these positions, None: each sees all."""
        q, mask = call.query, call.mask
        by_position = mask is not None or call.causal or not self.rows.alike
        return fused_attention(
            call,
            self.pages,
            self.keys,
            self.values,
            self.fmt,
            given,
            units=self.units,
            reading=self._reading(mask, q.shape[2]),
            key_map=self.key_map,
            mask=mask,
            positions=self.rows.positions(q.device, self.new) if by_position else None,
            query_positions=at,
            lengths=self.rows.lengths(q.device, self.fmt.page_tokens, self.keys.shape[2]),
        )

    def _attend_with(self, residual: LeftOver, call: AttentionCall) -> Tensor:
        """Attention by the fused operator, which alone tells the log-sum-exp, and what is left of dropped tokens."""
        queries = call.query.shape[2]
        at_once = self._is_fused(queries)
        outs = []
        for own, at in self._parts(call, queries if at_once else MAX_FUSED_QUERIES):
            out, lse, given_after = self._attend_fused(own, at, self.given if at_once else None)
            assert lse is not None
            outs.append(residual.join(own.query, out, lse))
        if at_once and given_after is not None:
            self.given_after = given_after
        return outs[0] if at_once else torch.cat(outs, 2)

    def _attend_ragged(self, call: AttentionCall, ragged: RaggedPages) -> tuple[Tensor, Tensor]:
        """Attention where KV heads have pages of their own, and its log-sum-exp without sinks."""
        q, mask, scale, softcap, sinks, causal, _ = call
        if records(q, self.keys, self.values):
            raise RuntimeError("evict computes no gradients: call the model under torch.no_grad()")
        by_position = mask is not None or causal or not self.rows.alike
        outs, found = [], []
        for own, at in self._parts(call, MAX_FUSED_QUERIES):
            out, lse = ragged.attend(
                own.query.to(self.keys.dtype),
                self.keys,
                self.values,
                self.fmt,
                positions=self.rows.positions(q.device, self.new) if by_position else None,
                packed=max(self.rows.packed_counts),
                key_map=self.key_map,
                mask=own.mask,
                query_positions=at,
                scale=self.units.scale(scale),
                softcap=softcap,
            )
            found.append(lse)
            outs.append(out if sinks is None else with_sinks(out, lse, sinks))
        self.lse = torch.cat(found, 2)
        out = torch.cat(outs, 2)
        if self.units.value:
            out = scaled(out, self.units.value)
        return out if out.dtype == q.dtype else out.to(q.dtype), self.lse

    def _attend_by_slot(self, call: AttentionCall) -> Tensor:
        """Attention over dequantised tokens slot by slot, where not every position has one."""
        q, mask, *_ = call
        packed = unpacked(self.pages, self.fmt, self.keys.dtype, self.key_map, severed=self.severed)
        both = (torch.cat(parts, 2) for parts in zip(packed, (self.keys, self.values), strict=True))
        keys, values = (x.to(q.dtype) for x in self.units.outside(*both))
        positions = self.rows.positions(q.device, self.new)[:, None, None]
        seen = positions >= 0
        if not self.rows.alike:
            # Anything may lie in empty slots, and a weight of 0 does not hide a NaN.
            keys, values = (x.where(seen.mT, 0) for x in (keys, values))
        if call.causal:
            asks = torch.arange(self.length - q.shape[2], self.length, device=q.device)
            seen = seen & (positions <= asks[:, None])
        if mask is not None:
            index = positions.long().clamp_min(0).expand(max(len(mask), len(positions)), *mask.shape[1:3], -1)
            mask = mask.expand(len(index), -1, -1, -1).gather(3, index)
            seen = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        return exact_attention(call._replace(mask=seen, causal=False), keys, values)

    def _reading(self, mask: Tensor | None, queries: int) -> Reading | None:
        """Of some of the pages; None if all are read."""
        if self.recall is None or not self.pages.shape[2] or queries > MAX_FUSED_QUERIES:
            return None
        all_seen = None if mask is None else self.rows.all_seen(mask)
        return self.recall.reading(self.pages, self.fmt, self.key_map, self.rows.packed_counts, all_seen)

    def _is_fused(self, queries: int) -> bool:
        if queries <= MAX_FUSED_QUERIES:
            return True
        prefills = self.keys.is_cuda and self.keys.dtype != torch.float32 and ops.has_cuda_kernels()
        return prefills and max(self.fmt.head_dim, self.fmt.value_dim) <= MAX_PREFILL_DIM

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, by position; 0 where padding was.

        Raises:
            RuntimeError: some tokens have been dropped, or KV heads have them in other places.
        """
        if self.plain:
            return self.keys, self.values
        if not self.complete:
            raise RuntimeError(
                "with prune, evict or order=clusters each KV head of this LogQuant cache has chosen among tokens, so "
                "there are no keys and values of all positions: attention must be "
                'model.set_attn_implementation("logquant") (or "sdpa"), which goes by what is there'
            )
        if self._dense is None:
            slot_of = self._slot_of_position()
            packed = unpacked(self.pages, self.fmt, self.keys.dtype, self.key_map, severed=self.severed)
            both = []
            for parts in zip(packed, (self.keys, self.values), strict=True):
                slots = torch.cat(parts, 2)
                if len(slot_of) == 1 and self.rows.alike:
                    both.append(slots.index_select(2, slot_of[0]))
                    continue
                # One more slot, of zeros, stands for padding.
                index = torch.where(slot_of < 0, slots.shape[2], slot_of)[:, None, :, None]
                both.append(F.pad(slots, (0, 0, 0, 1)).gather(2, index.expand(*slots.shape[:2], -1, slots.shape[3])))
            self._dense = self.units.outside(both[0], both[1])
        return self._dense

    def _slot_of_position(self) -> Tensor:
        """The slot of each position's token, int64 ``[1 or B, T]``; -1 where there is none."""
        positions = self.rows.positions(self.keys.device, self.new).long()
        # Empty slots go to a position of their own, which is cut off.
        position = torch.where(positions < 0, self.length, positions)
        slot_of = torch.full((len(position), self.length + 1), -1, device=position.device)
        slots = torch.arange(position.shape[1], device=position.device).expand_as(position)
        return slot_of.scatter_(1, position, slots)[:, :-1]
