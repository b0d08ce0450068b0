"""Plain steps of decoding: a token comes to each row and attends without a mask, and none leaves the window.

Most steps are such ones. What the layer has to note of each is kept here until somebody looks at the layer, which then
learns of all of them as if they had come at once: that is the same as one by one, for no token moves in between. The
newest one stays uncommitted, as after any update.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.units import AS_THEY_ARE
from ..attention.view import KVView, Observer, View, fused_attention
from .held import Held
from .sizes import window_capacity
from .storage import Allocator
from .uncommitted import Exact, Uncommitted

# Fewer are not worth the start.
FEWEST = 4


class PlainSteps:
    """Plain steps that a layer has not been told of.

    Args:
        held: what the layer holds.
        room: how many tokens can come.
    """

    def __init__(self, held: Held, room: int) -> None:
        storage, rows, advice = held.storage, held.rows, held.advice
        self._held, self._exact, self._room = held, rows.exact, room
        self._window_k, self._window_v = storage.window_k, storage.window_v
        self._pages, self._fmt, self._key_map = storage.used_pages(rows), storage.format, advice.key_map
        # What the exact tokens have been given, before the newest query and after it.
        self._given = held.chosen and held.chosen.given
        self._given_after: Tensor | None = None
        # Of the tokens before the newest.
        self._queries: deque[Tensor] = deque(maxlen=advice.needed(allocated=0 not in rows.packed_counts))
        self._came = 0
        # Of the newest: keys and values up to it, its own, and what has attended to it.
        self._keys, self._values = self._window_k, self._window_v
        self._states = self._keys, self._values
        self._call: AttentionCall | None = None

    @staticmethod
    def after(held: Held) -> PlainSteps | None:
        """The steps that may follow, if some will."""
        storage, rows = held.storage, held.rows
        room = min(storage.window_k.shape[2], window_capacity(storage.config)) - rows.exact
        plain = rows.alike and not rows.reserved and not rows.undecided and storage.units == AS_THEY_ARE
        return PlainSteps(held, room) if plain and room >= FEWEST and not storage.in_graph else None

    def continued_by(self, keys: Tensor, values: Tensor) -> bool:
        """Whether tokens that come make another plain step."""
        if self._came == self._room or (self._came and self._call is None):
            return False
        window = self._window_k
        return (
            keys.dtype == values.dtype == window.dtype
            and keys.device == values.device == window.device
            and keys.shape == (*window.shape[:2], 1, window.shape[3])
            and values.shape == (*window.shape[:2], 1, self._window_v.shape[3])
        )

    def take(self, keys: Tensor, values: Tensor) -> None:
        """The next token of each row comes, ``[B, H, 1, D]`` and ``[B, H, 1, Dv]``."""
        query = self._call.query.clone() if self._call is not None and self._queries.maxlen else None
        end = self._exact + self._came + 1
        window_k, window_v = self._window_k.narrow(2, 0, end), self._window_v.narrow(2, 0, end)
        window_k.narrow(2, end - 1, 1).copy_(keys)
        window_v.narrow(2, end - 1, 1).copy_(values)
        if query is not None:
            self._queries.append(query)
        if self._came:
            self._given = self._given_after
        self._came += 1
        self._keys, self._values, self._states = window_k, window_v, (keys, values)
        self._call = self._given_after = None

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Attention of the newest token to all tokens, ``[B, Hq, 1, Dv]``; None if this is no plain step."""
        query, _, scale, softcap, *_ = call
        if call.mask is not None or call.causal or query.shape[2] > 1 or torch.is_grad_enabled():
            return None
        if (queries := self._queries) and (queries[-1].shape != query.shape or queries[-1].dtype != query.dtype):
            return None
        if self._came == 1:
            self._scores = scale, softcap
        elif self._scores != (scale, softcap):
            return None
        out, given = fused_attention(
            call, self._pages, self._keys, self._values, self._fmt, self._given, key_map=self._key_map
        )
        self._call, self._given_after = AttentionCall(query, None, scale, softcap), given
        return out

    def told(self, allocator: Allocator) -> Uncommitted:
        """Tell what the layer holds of all tokens but the newest, which is returned. Nothing may come after that.

        Args:
            allocator: of page stores.
        """
        newest = Uncommitted(
            Exact(self._keys, self._values, in_window=True), self._states, self._call, given=self._given_after
        )
        if earlier := self._came - 1:
            keys, values = (x[:, :, :-1] for x in (self._keys, self._values))
            states = keys[:, :, -earlier:], values[:, :, -earlier:]
            call = AttentionCall(torch.cat(tuple(self._queries), 2), None, *self._scores) if self._queries else None
            before = Uncommitted(Exact(keys, values, in_window=True), states, call, given=self._given)
            self._held.take(before, None, allocator)
        return newest


class SteppingLayer(Observer, Protocol):
    """A layer that takes plain steps."""

    version: int

    @property
    def length(self) -> int:
        """Positions, those of uncommitted tokens included."""
        ...

    def attend_plainly(self, call: AttentionCall) -> Tensor:
        """Attention of the newest token."""
        ...

    def newest(self) -> KVView:
        """What the newest token attends to."""
        ...


class PlainToken(View):
    """The token of a plain step, and all before it.

    Args:
        layer: whose it is.
        keys, values: ``[B, H, 1, D]`` and ``[B, H, 1, Dv]``, as they came.
    """

    plain = False
    layer: SteppingLayer

    def __init__(self, layer: SteppingLayer, keys: Tensor, values: Tensor) -> None:
        super().__init__(layer, keys, values, 1)
        self._version, self._length = layer.version, layer.length

    @property
    def length(self) -> int:
        return self._length

    def check_current(self) -> None:
        if self._version != self.layer.version:
            raise RuntimeError("these keys and values are stale: their LogQuant cache layer was updated since")

    def attend(self, call: AttentionCall) -> Tensor:
        """As :meth:`KVView.attend`."""
        self.check_current()
        return self.layer.attend_plainly(call)

    def dense(self) -> tuple[Tensor, Tensor]:
        """As :meth:`KVView.dense`."""
        return self.layer.newest().dense()
