"""Plain steps of decoding: a token comes to each row and attends without a mask, and none leaves the window.

Most steps are such ones. What the layer has to note of each is kept here until somebody looks at the layer, which then
learns of all of them as if they had come at once: that is the same as one by one, for no token moves in between. The
newest one stays uncommitted, as after any update.

What is here never changes, but for what attends to a step: another one follows it. So whatever interrupts a step or a
look, even another look, the layer holds either what it held before or what it is to hold.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.fused import fused_attention
from ..attention.units import AS_THEY_ARE
from ..attention.view import KVView, PackedLayer, View, refuse_stale
from ..recall.reading import Recall
from .chosen import ChosenRows
from .held import Held
from .sizes import window_capacity
from .storage import Allocator
from .uncommitted import Exact, Uncommitted

# Fewer are not worth the start.
FEWEST = 4


class Start:
    """What a layer held before the first of some plain steps.

    Args:
        held: that; all is committed.
        recall: what the layer reads of its pages; None: all.
        room: how many tokens can come.
    """

    def __init__(self, held: Held, recall: Recall | None, room: int) -> None:
        storage, self.rows, self.chosen = held.storage, held.rows, held.chosen
        self.window_k, self.window_v, self.severed = storage.window_k, storage.window_v, storage.severed
        self.pages, self.fmt, self.key_map = storage.used_pages(self.rows), storage.format, held.advice.key_map
        self.kept_queries = held.advice.needed(allocated=0 not in self.rows.packed_counts)
        self.recall, self.reading = recall, None
        if recall is not None:
            self.reading = recall.reading(self.pages, self.fmt, self.key_map, self.rows.packed_counts)
        self.room = room
        batch, heads, _, dim = self.window_k.shape
        self.key_shape = torch.Size((batch, heads, 1, dim))
        self.value_shape = torch.Size((batch, heads, 1, self.window_v.shape[3]))

    @staticmethod
    def of(held: Held, recall: Recall | None) -> Start | None:
        """None if no plain steps can follow, or too few."""
        storage, rows = held.storage, held.rows
        room = min(storage.window_k.shape[2], window_capacity(storage.config)) - rows.exact
        plain = rows.alike and not rows.reserved and not rows.undecided and storage.units == AS_THEY_ARE
        return Start(held, recall, room) if plain and room >= FEWEST and not storage.in_graph else None

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tokens that come make a step."""
        window = self.window_k
        return (
            keys.dtype == values.dtype == window.dtype
            and keys.device == values.device == window.device
            and keys.shape == self.key_shape
            and values.shape == self.value_shape
        )

    def first(self, keys: Tensor, values: Tensor) -> PlainStep:
        """The first step, of tokens that fit."""
        return PlainStep(self, 1, keys, values, self.chosen and self.chosen.given)


class PlainStep:
    """The token of each row that came last, and what the layer has not been told of those before it.

    Args:
        start: what the layer held before the first.
        came: how many have come.
        keys, values: of the newest, ``[B, H, 1, D]`` and ``[B, H, 1, Dv]``, as they came; written into the window.
        given: what queries before the newest have given to the exact tokens, ``[B, H, exact]``; None if nobody asks.
        queries: the newest ones before that, as many as are needed, ``[B, Hq, 1, D]`` each.
        scores: their scale and softcap.

    Attributes:
        heard: what has attended, and what the exact tokens have been given then.
    """

    __slots__ = "came", "given", "heard", "keys", "queries", "scores", "start", "states", "values"

    def __init__(
        self,
        start: Start,
        came: int,
        keys: Tensor,
        values: Tensor,
        given: Tensor | None,
        queries: tuple[Tensor, ...] = (),
        scores: tuple[float, float] | None = None,
    ) -> None:
        end = start.rows.exact + came
        self.keys, self.values = start.window_k.narrow(2, 0, end), start.window_v.narrow(2, 0, end)
        self.keys.narrow(2, end - 1, 1).copy_(keys)
        self.values.narrow(2, end - 1, 1).copy_(values)
        self.start, self.came, self.states = start, came, (keys, values)
        self.given, self.queries, self.scores = given, queries, scores
        self.heard: tuple[AttentionCall, Tensor | None] | None = None

    def goes_on_with(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tokens that come make another step."""
        return self.heard is not None and self.came < self.start.room and self.start.fits(keys, values)

    def next(self, keys: Tensor, values: Tensor) -> PlainStep:
        """The step after this one, of tokens that it goes on with."""
        assert self.heard is not None
        start, (call, given) = self.start, self.heard
        queries = (*self.queries, call.query.clone())[-start.kept_queries :] if start.kept_queries else ()
        return PlainStep(start, self.came + 1, keys, values, given, queries, (call.scale, call.softcap))

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Attention of the newest token to all tokens, ``[B, Hq, 1, Dv]``; None if this makes it no plain step."""
        query, mask, scale, softcap, _, causal, _ = call
        if mask is not None or causal or query.shape[2] > 1 or torch.is_grad_enabled():
            return None
        if self.scores not in (None, (scale, softcap)):
            return None
        if (queries := self.queries) and (queries[-1].shape != query.shape or queries[-1].dtype != query.dtype):
            return None
        start = self.start
        tensors = start.pages, self.keys, self.values
        out, _, given = fused_attention(
            call, *tensors, start.fmt, self.given, reading=start.reading, key_map=start.key_map
        )
        self.heard = AttentionCall(query.detach() if query.requires_grad else query, None, scale, softcap), given
        return out

    def tell(self, held: Held, allocator: Allocator) -> Uncommitted:
        """Tell what a layer holds of all tokens but the newest, unless it knows, and return that.

        Args:
            held: what was there before the first, perhaps with some of those that have come.
            allocator: of page stores.
        """
        call, given = self.heard or (None, None)
        newest = Uncommitted(Exact(self.keys, self.values, in_window=True), self.states, call, given=given)
        if earlier := self.start.rows.length + self.came - 1 - held.rows.length:
            keys, values = (x[:, :, :-1] for x in (self.keys, self.values))
            states = keys[:, :, -earlier:], values[:, :, -earlier:]
            call = None
            if self.queries and self.scores is not None:
                call = AttentionCall(torch.cat(self.queries[-earlier:], 2), None, *self.scores)
            held.take(Uncommitted(Exact(keys, values, in_window=True), states, call, given=self.given), None, allocator)
        return newest

    def view(self, layer: PackedLayer) -> KVView:
        """What the newest token attends to, where that is not plain."""
        start = self.start
        rows = start.rows.append(self.came - 1) if self.came > 1 else start.rows
        return KVView(
            layer,
            self.keys,
            self.values,
            1,
            start.pages,
            start.fmt,
            key_map=start.key_map,
            rows=rows if start.chosen is None else ChosenRows(rows, start.chosen),
            plain=False,
            severed=start.severed,
            given=self.given,
            recall=start.recall,
        )


class SteppingLayer(PackedLayer, Protocol):
    """A layer that takes plain steps.

    Attributes:
        plain_step: the newest one, until somebody looks.
    """

    plain_step: PlainStep | None

    @property
    def length(self) -> int:
        """Positions, those of uncommitted tokens included."""
        ...


class PlainToken(View):
    """The token of a plain step, and all before it.

    Args:
        layer: whose it is.
        step: that step.
    """

    plain = False
    layer: SteppingLayer

    def __init__(self, layer: SteppingLayer, step: PlainStep) -> None:
        super().__init__(layer, *step.states, 1)
        self.step, self._version, self._length = step, layer.version, layer.length

    @property
    def length(self) -> int:
        return self._length

    @cached_property
    def _view(self) -> KVView:
        """The same for attention that is not plain."""
        self.check_current()
        return self.step.view(self.layer)

    def check_current(self) -> None:
        if self._version != self.layer.version:
            refuse_stale()

    def check(self, mask: Tensor | None) -> None:
        self._view.check(mask)

    def attend(self, call: AttentionCall) -> Tensor:
        self.check_current()
        out = self.step.attend(call) if self.layer.plain_step is self.step else None
        return self._view.attend(call) if out is None else out

    def observe(self, call: AttentionCall | None) -> None:
        self.layer.observe(self._view, call)

    def dense(self) -> tuple[Tensor, Tensor]:
        return self._view.dense()
