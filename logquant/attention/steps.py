"""Decoding in tensors of fixed size and address: what a compiled model or a CUDA graph holds of a cache layer.

A step appends a token and attends, in one operator (:func:`logquant.ops.decode_step_`), and says nothing to the host:
neither the graph nor its inputs depend on how long the context is. The layer learns of its steps between them
(:mod:`logquant.cache.static`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..format import PageFormat
from ..modes import lasting
from ..ops.reference import append_
from .call import AttentionCall
from .exact import exact_attention
from .units import AS_THEY_ARE, scaled
from .view import Observer, View, refuse_stale

# The tensors that are written in place by a step, or between steps.
_TENSORS = ("pages", "window_k", "window_v", "positions", "lengths", "attention", "queries", "seen", "key_map")


class Steps:
    """A layer's tokens on the device, and the steps that have been taken.

    Args:
        fmt: the page format.
        max_length: N, positions there is room for.
        pages: int32 ``[B, H, P, words]``.
        window_k, window_v: ``[B, H, S, D]`` and ``[B, H, S, Dv]``.
        counts: whether what the window's slots are given is counted.
        key_map: int16 ``[B, H, C]``, for its shape; None: the format needs none.

    Attributes:
        positions, lengths, attention, queries, seen: as for :func:`logquant.ops.decode_step_`.
        scale, softcap: of the scores; as of the last step.
        queries_known: whether they are, of the steps that have been taken.
    """

    @lasting
    def __init__(
        self,
        fmt: PageFormat,
        max_length: int,
        pages: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        *,
        counts: bool,
        key_map: Tensor | None,
    ) -> None:
        batch, heads, slots, _ = window_k.shape
        self.fmt, self.max_length, self.units = fmt, max_length, AS_THEY_ARE
        self.pages, self.window_k, self.window_v = pages, window_k, window_v
        self.positions = pages.new_full((batch, pages.shape[2] * fmt.page_tokens + slots), -1)
        self.lengths = pages.new_zeros(batch, 2)
        self.attention = window_k.new_zeros(batch, heads, slots if counts else 0, dtype=torch.float32)
        self.queries = window_k.new_zeros(batch, heads, 0, fmt.head_dim)
        self.seen = pages.new_zeros(batch, dtype=torch.int64)
        self.key_map = None if key_map is None else key_map.clone(memory_format=torch.contiguous_format)
        self.scale, self.softcap, self.queries_known = 1.0, 0.0, False
        self.fix()

    def fix(self) -> None:
        """Tell the compiler that the tensors stay where they are, so that a CUDA graph may write to them."""
        for tensor in map(vars(self).get, _TENSORS):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def fits(self, window_k: Tensor, window_v: Tensor) -> bool:
        """Whether the tokens of such a window can be held here."""
        pairs = (self.window_k, window_k), (self.window_v, window_v)
        return all(
            (a.shape[:2], a.shape[3], a.dtype, a.device) == (b.shape[:2], b.shape[3], b.dtype, b.device)
            for a, b in pairs
        )

    @lasting
    def keep_queries(self, heads: int, count: int) -> None:
        """From now on the newest ``count`` queries of so many heads are kept; nothing changes if they are already."""
        if self.queries.shape[1:3] != (heads, count):
            batch, _, _, dim = self.window_k.shape
            self.queries = self.window_k.new_zeros(batch, heads, count, dim)
            torch._dynamo.mark_static_address(self.queries)

    def newest(self, seen: int, count: int) -> Tensor:
        """The queries of the last ``count`` of ``seen`` positions, ``[B, Hq, count, D]``, as far as they are kept."""
        count = min(count, self.queries.shape[2])
        slots = torch.arange(seen - count, seen, device=self.queries.device) % max(1, self.queries.shape[2])
        return self.queries.index_select(2, slots)

    def attend(self, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
        """Append the token of ``keys`` ``[B, H, 1, D]`` and ``values``, and attend: ``[B, Hq, 1, Dv]``."""
        self.scale, self.softcap, self.queries_known = call.scale, call.softcap, True
        tensors = self.positions, self.lengths, self.attention, self.queries, self.seen
        out = ops.decode_step_(
            self._own(call.query),
            keys,
            values,
            self.pages,
            self.window_k,
            self.window_v,
            *tensors,
            self.fmt,
            **self._options(call),
        )
        return self._outside(out, call)

    def attend_again(self, call: AttentionCall) -> Tensor:
        """Attend to what is there, ``[B, Hq, 1, Dv]``, as layers do that share the keys and values of another."""
        positions = None if call.mask is None else self.positions
        both: dict[str, Any] = {"positions": positions, "lengths": self.lengths}
        query = self._own(call.query)
        out, _ = ops.attend(query, self.pages, self.window_k, self.window_v, self.fmt, **both, **self._options(call))
        return self._outside(out, call)

    def _options(self, call: AttentionCall) -> dict[str, Any]:
        """What both operators are told besides."""
        return {
            "scale": self.units.scale(call.scale),
            "softcap": call.softcap,
            "key_map": self.key_map,
            "mask": call.mask,
            "sinks": None if call.sinks is None else call.sinks.float(),
        }

    def _own(self, query: Tensor) -> Tensor:
        return query if query.dtype == self.window_k.dtype else query.to(self.window_k.dtype)

    def _outside(self, out: Tensor, call: AttentionCall) -> Tensor:
        out = scaled(out, self.units.value)
        return out if out.dtype == call.query.dtype else out.to(call.query.dtype)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append the token of ``keys`` ``[B, H, 1, D]`` and ``values``, of whose query nothing is known."""
        self.queries_known = False
        written = self.window_k, self.window_v, self.positions, self.lengths, self.queries[:, :, :0], self.seen
        append_(keys, keys, values, *written)

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, N, D]`` and values ``[B, H, N, Dv]`` by position, 0 where there is none."""
        packed = ops.dequantize(self.pages, self.fmt, dtype=self.window_k.dtype, key_map=self.key_map)
        slots, in_pages = self.positions.shape[1], packed[0].shape[2]
        slot = torch.arange(slots, device=self.pages.device)
        pages, window = self.lengths[:, :1] * self.fmt.page_tokens, self.lengths[:, 1:]
        used = torch.where(slot < in_pages, slot < pages, slot - in_pages < window) & (self.positions >= 0)
        # Empty slots go to a position of their own, which is cut off.
        position = torch.where(used, self.positions, self.max_length).long().clamp_max(self.max_length)
        slot_of = torch.full((len(position), self.max_length + 1), slots, device=slot.device)
        slot_of = slot_of.scatter(1, position, slot.expand_as(position))[:, None, : self.max_length, None]
        both = []
        for parts in zip(packed, (self.window_k, self.window_v), strict=True):
            # One more slot, of zeros, stands for what is not there.
            x = F.pad(torch.cat(parts, 2), (0, 0, 0, 1))
            both.append(x.gather(2, slot_of.expand(-1, x.shape[1], -1, x.shape[3])))
        return self.units.outside(both[0], both[1])


class SteppingLayer(Observer, Protocol):
    """A layer that takes steps.

    Attributes:
        taken: another number after each step, where nothing is compiled.
    """

    taken: int


class NewToken(View):
    """The token that came last to a layer, and all before it: appended where it is attended to.

    Its positions are all N that there is room for, as those of the mask that goes with it.

    Args:
        layer: whose it is.
        steps: of the layer.
        keys, values: ``[B, H, 1, D]`` and ``[B, H, 1, Dv]``, as they came.
    """

    plain = False
    layer: SteppingLayer

    def __init__(self, layer: SteppingLayer, steps: Steps, keys: Tensor, values: Tensor) -> None:
        super().__init__(layer, keys, values, 1)
        self.steps, self._appended = steps, False
        self._taken = None if torch.compiler.is_compiling() else layer.taken

    @property
    def length(self) -> int:
        return self.steps.max_length

    def check_current(self) -> None:
        if self._taken is not None and self._taken != self.layer.taken:
            refuse_stale()

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention to this token and all before it, ``[B, Hq, 1, Dv]``.

        Raises:
            RuntimeError: the layer was updated since, or its window has no room.
        """
        self.check_current()
        query, mask = call.query, call.mask
        if (grouped := query.shape[2] > 1) and mask is not None and mask.shape[1] > 1:
            return exact_attention(call, *self.dense())
        if grouped:  # query heads that came as queries of their KV head
            mask = None if mask is None else mask[:, :, :1]
            call = call._replace(query=query.flatten(1, 2).unsqueeze(2), mask=mask)
        call = call._replace(causal=False)
        if self._appended:
            out = self.steps.attend_again(call)
        else:
            self._appended = True
            out = self.steps.attend(*self._inside(), call)
        return out.squeeze(2).unflatten(1, query.shape[1:3]) if grouped else out

    def dense(self) -> tuple[Tensor, Tensor]:
        if not self._appended:
            self._appended = True
            self.steps.append(*self._inside())
        return self.steps.dense()

    def _inside(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the layer holds them."""
        dtype = self.steps.window_k.dtype
        keys, values = self.keys, self.values
        if keys.dtype != dtype or values.dtype != dtype:
            keys, values = keys.to(dtype), values.to(dtype)
        return self.steps.units.inside(keys, values)
