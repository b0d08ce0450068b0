"""``StaticLayer``: a layer of fixed size, whose steps need no Python.

The host knows only that steps *may* have been taken (:attr:`StaticLayer.pending`); how many, it reads from the device
when it looks at what is held. Then it learns of them as if the tokens had just come and attended, all at once, which is
the same as one by one as long as no token had to leave the window in between: :meth:`StaticLayer.make_room` sees to it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.handle import handles
from ..attention.steps import NewToken, Steps
from ..attention.view import KVView, View
from ..config import LogQuantConfig
from .held import Held
from .layer import LogQuantLayer
from .layout import Rows
from .shared import Shared
from .sizes import packed_tokens, window_capacity
from .storage import Storage, check_states
from .uncommitted import Exact, Uncommitted


class StaticLayer(LogQuantLayer):
    """A LogQuant layer with room for ``max_length`` positions.

    Args:
        config, shared, rows, index: as for :class:`LogQuantLayer`.
        max_length: N.

    Attributes:
        steps: the tensors of a step; None until they are needed.
        can_take_steps: whether they are as the host knows the layer, so that steps may be taken.
        taken: steps since the host looked last, but for compiled ones.
        pending: whether steps may have been taken that the host has not seen.
    """

    is_compileable = True
    _steps_plainly = False

    def __init__(self, config: LogQuantConfig, shared: Shared, rows: Rows, index: int, max_length: int) -> None:
        self.max_length = max_length
        self.steps: Steps | None = None
        self._holders: Collection[Storage] = ()
        self._query_heads = 0  # until they are known
        super().__init__(config, shared, rows, index)

    def reset(self) -> None:
        """Forget all tokens; tensors stay where they are, so that a compiled step serves the next text, too."""
        self.pending = self.can_take_steps = False
        self.taken = 0
        super().reset()
        self.published_version = -1

    # ----------------------------------------------------------------------------------------- what the host sees
    def _look(self) -> None:
        if self.pending:
            self._catch_up()

    @torch.compiler.disable
    def _catch_up(self) -> None:
        steps, held = self.steps, self._held
        assert steps is not None
        self.pending = False
        before, total = held.rows, int(steps.seen[0])
        new = total - before.length
        if not new:
            return
        if before.exact + new > steps.window_k.shape[2]:
            self.pending = True
            raise RuntimeError(
                f"{new} steps were taken where the window had room for {steps.window_k.shape[2] - before.exact}: call "
                "cache.make_room() between steps. Tokens are lost: reset() the cache and feed it the sequence again"
            )
        keys, values = (w[:, :, : before.exact + new] for w in (steps.window_k, steps.window_v))
        # Of the new tokens by themselves only the number counts here: in a batch with padding they lie elsewhere.
        uncommitted = Uncommitted(Exact(keys, values, in_window=True), (keys[:, :, -new:], values[:, :, -new:]))
        if steps.queries_known:
            if steps.queries.shape[2]:
                uncommitted.call = AttentionCall(steps.newest(total, new), None, steps.scale, steps.softcap)
            if held.chosen is not None:
                uncommitted.given = steps.attention[:, :, : before.exact + new].clone()
        try:
            moved = held.take(uncommitted, None, self.shared.allocator)
        except BaseException:
            self.pending = True
            raise
        self._length, self.taken = total, 0
        if moved:
            self.version += 1
            self._publish()

    def settle(self) -> None:
        """Let host and device know the same: steps that were taken, and whatever else has become of the tokens."""
        if not self.is_initialized or self.speculation is not None:
            return
        self.commit()
        if self.published_version != self.version:
            self._publish()

    def _publish(self) -> None:
        """Write to the device what the host knows; tensors stay where they are if their shapes do."""
        held, rows = self._held, self._held.rows
        self.can_take_steps = False
        if not rows.length or held.storage.in_graph:
            return
        steps = self._with_buffers(held)
        batch, page_tokens = len(steps.lengths), self.format.page_tokens
        if held.advice.queries is not None:
            self._query_heads = held.advice.queries.parts[0].shape[1]
        wanted = held.advice.needed(allocated=0 not in rows.packed_counts)
        if self._query_heads and steps.queries.shape[2] < wanted:
            steps.keep_queries(self._query_heads, wanted)
        table, first = held.layout.positions(self.device), steps.positions.shape[1] - steps.window_k.shape[2]
        steps.positions[:, : rows.packed] = table[:, : rows.packed]
        steps.positions[:, first : first + rows.exact] = table[:, rows.packed :]
        used = [[slots.packed // page_tokens, slots.exact] for slots in rows.each(batch)]
        steps.lengths.copy_(torch.tensor(used, dtype=torch.int32))
        steps.seen.fill_(rows.length)
        if held.chosen is not None:
            steps.attention.zero_()
            steps.attention[:, :, : held.chosen.given.shape[2]] = held.chosen.given
        if steps.key_map is not None and held.advice.key_map is not None:
            steps.key_map.copy_(held.advice.key_map)
        steps.units, self._length = held.storage.units, rows.length
        self.published_version, self.can_take_steps = self.version, True
        self.shared.steps_left = 0

    def _with_buffers(self, held: Held) -> Steps:
        """The steps' tensors, of which the layer's window and page store are some."""
        storage, rows, steps = held.storage, held.rows, self.steps
        slots = window_capacity(self.config)
        pages = packed_tokens(self.config, self.max_length) // self.format.page_tokens
        window_k, window_v, store = storage.window_k, storage.window_v, storage.pages
        if steps is not None and not steps.fits(window_k, window_v):
            steps = None
        if steps is None or window_k is not steps.window_k:
            own = (None, None) if steps is None else (steps.window_k, steps.window_v)
            window_k, window_v = (
                _copied(x, mine, slots, rows.exact) for x, mine in zip((window_k, window_v), own, strict=True)
            )
        if steps is None or store is not steps.pages:
            mine = None if steps is None else steps.pages
            if any(other is not storage and other.pages is mine for other in self._holders):
                mine = None  # a copy of this cache holds it
            store = _copied(store, mine, pages, rows.packed // self.format.page_tokens)
        storage.replace(store, window_k, window_v)
        self._holders = storage.holders
        if steps is None:
            counts = held.chosen is not None
            made = Steps(
                self.format, self.max_length, store, window_k, window_v, counts=counts, key_map=held.advice.key_map
            )
            self.steps = steps = made
        elif store is not steps.pages:
            steps.pages = store
            steps.fix()
        return steps

    # -------------------------------------------------------------------------------------------------- tokens come
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._with_buffers(self._held)

    def can_step(self, key_states: Tensor) -> bool:
        """Whether these can come without the host; never with gradients, for which the host has to look after."""
        return self.can_take_steps and key_states.shape[2] == 1 and not torch.is_grad_enabled()

    def step(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        """A token of each row comes, and will be appended when it is attended to.

        Returns:
            What stands for all keys and values; where a model is being compiled, an object that only the attention
            function ``"logquant"`` understands.

        Raises:
            as :meth:`update`, where nothing is compiled.
        """
        self._begin_step(key_states, value_states)
        assert self.steps is not None
        token = NewToken(self, self.steps, key_states, value_states)
        return (token, token) if torch.compiler.is_compiling() else handles(token)

    def append_step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A token of each row comes; the keys and values of all N positions, as plain tensors."""
        self._begin_step(key_states, value_states)
        assert self.steps is not None
        return NewToken(self, self.steps, key_states, value_states).dense()

    def _begin_step(self, key_states: Tensor, value_states: Tensor) -> None:
        if not torch.compiler.is_compiling():
            check_states(key_states, value_states, self._held.storage)
            # Steps that were compiled are missing here, in all layers alike.
            self.shared.arrive(self._index, self._length + self.taken)
            self.taken += 1
        self.pending = True

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self.check_length(key_states.shape[2])
        self.can_take_steps = False
        return super()._update(key_states, value_states)

    def check_length(self, new: int) -> None:
        """Refuse (ValueError) more positions than there is room for."""
        if (total := self.length + new) > self.max_length:
            raise ValueError(
                f"max_length of this LogQuant cache is {self.max_length} positions, and it would hold {total}: make it "
                "with a larger one, or cache.resize(max_length)"
            )

    def append(self, keys: Tensor, values: Tensor) -> KVView:
        view = super().append(keys, values)
        self.published_version = -1
        return view

    def observe(self, view: View, call: AttentionCall | None) -> None:
        super().observe(view, call)
        if call is not None and call.query.shape[2] == view.new:
            self._query_heads = call.query.shape[1]
        if view.new > 1 and self.steps is not None:
            self.settle()

    def make_room(self) -> int:
        """Between steps: tokens that are due leave the window. Returns how many steps can be taken until the next time.

        Raises:
            ValueError: all N positions are held.
        """
        self.settle()
        if not self.is_initialized:
            return 0
        self.check_length(1)
        return min(window_capacity(self.config) - self.rows.exact, self.max_length - self._length)

    def resize(self, max_length: int) -> None:
        """Have room for another number of positions; what is held is copied."""
        if self.is_initialized:
            self.commit()
        self.max_length, self.steps, self.can_take_steps, self.published_version = max_length, None, False, -1
        self.settle()

    # ------------------------------------------------------------------------------------- what transformers asks for
    @property
    def length(self) -> int:
        if self.pending:
            self._catch_up()
        return self._length

    def get_seq_length(self) -> Any:
        """Positions: while steps are taken a tensor, for only the device knows."""
        return self.steps.seen[0].clone() if self.can_take_steps and self.steps is not None else self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.can_take_steps and query_length == 1 and not torch.is_grad_enabled():
            return self.max_length, 0
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    # ------------------------------------------------------------------------------------------ what changes the rest
    @property
    def record_past(self) -> bool:
        return self.speculation is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if self.is_initialized:
            self.settle()
        LogQuantLayer.record_past.fset(self, value)  # type: ignore[attr-defined]
        self.can_take_steps = False
        self.settle()

    def crop(self, tokens_to_remove: int) -> None:
        """As of any layer, but the token of the last step has taken its place, and with it those that were due then."""
        super().crop(tokens_to_remove)
        self.settle()

    def _select_rows(self, indices: Tensor) -> None:
        super()._select_rows(indices)
        self.settle()

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self.settle()

    def restore(self, rows: Rows | None, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        if rows is not None and rows.length > self.max_length:
            raise ValueError(
                f"max_length must be at least the {rows.length} positions of the file, got {self.max_length}"
            )
        super().restore(rows, tensors, described)
        self.settle()

    def copy(self) -> LogQuantLayer:
        if self.pending:
            self._catch_up()
        twin = super().copy()
        assert isinstance(twin, StaticLayer)
        twin.steps, twin.can_take_steps, twin.published_version, twin._holders = None, False, -1, ()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {"steps": None, "can_take_steps": False, "published_version": -1}
        return state | {"_holders": ()}

    @property
    def nbytes(self) -> int:
        steps = self.steps
        if steps is None:
            return super().nbytes
        own = steps.positions, steps.lengths, steps.attention, steps.queries, steps.seen, steps.key_map
        return super().nbytes + sum(t.nbytes for t in own if t is not None)


def _copied(x: Tensor, into: Tensor | None, room: int, used: int) -> Tensor:
    """``x`` with ``room`` of its third dimension, of which ``used`` hold something; in ``into``, if that is given."""
    if into is None:
        with torch.inference_mode(False), torch.no_grad():
            into = x.new_zeros(*x.shape[:2], max(room, used), *x.shape[3:])
    into[:, :, :used] = x[:, :, :used]
    return into
