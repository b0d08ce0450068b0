"""What one attention call sees of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..format import PageFormat
from .exact import exact_attention

if TYPE_CHECKING:
    from ..cache.layout import Rows

# Beyond this many query tokens (chunked prefill) it is faster on a CPU to dequantise once and use matrix products.
MAX_FUSED_QUERIES = 16
# On a GPU csrc/cuda/attend_prefill.cu dequantises in shared memory, for 16-bit models up to this dim.
MAX_PREFILL_DIM = 256


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
