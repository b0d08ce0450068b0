"""``LogQuantLayer``: the keys and values of one layer of a model.

Tokens *come* with ``update``, *attend*, and are then *committed*: they take their places in the window or in pages, as
the rule says. In between they are exact, for which of them are padding is known only when they are attended to.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..attention import compiled
from ..attention.call import AttentionCall
from ..attention.gradients import records
from ..attention.handle import handles
from ..attention.view import KVView, View
from ..config import LogQuantConfig
from .contents import LayerContents
from .drafts import Speculation
from .held import Held
from .layout import Rows
from .plain_steps import PlainStep, PlainToken, Start
from .recompute import Recompute, Step, in_backward
from .shared import Shared
from .sizes import window_capacity
from .slots import Slots
from .storage import NO_GRAPH, check_states
from .uncommitted import Exact, Uncommitted


class LogQuantLayer(LayerContents):
    """The keys and values of one layer: between 2W and 3W exact tokens, the others in pages.

    Args:
        config: what to keep exact and how to store the rest.
        shared: what the layers of a cache have in common.
        rows: the empty rows that the layers of a cache share.
        index: which layer of the model it is.
    """

    def __init__(
        self, config: LogQuantConfig, shared: Shared | None = None, rows: Rows | None = None, index: int = 0
    ) -> None:
        # Not super().__init__(): keys and values are properties here.
        self.config = config
        self._index = index
        self.recall = config.recall_spec(index)
        self.shared = shared or Shared()
        self._steps_plainly = self._steps_plainly and config.prune is config.evict is None
        self._empty = rows or Rows((Slots.empty(config),))
        self.version = 0
        self.recompute = Recompute()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        # Positions, those of uncommitted tokens included: a plain number, so that torch.compile need not look further.
        self._length = 0
        self.plain_step = None
        self.uncommitted = None
        self.compiled_view: View | None = None
        self.speculation: Speculation | None = None
        self.version += 1
        self.shared.forget()
        self.recompute.forget()
        self.__dict__.pop("_held", None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.format = self.config.page_format(key_states.shape[-1], value_states.shape[-1])
        if (budget := self._empty.slots[0].budget) is not None:
            budget.check(self.format.nbytes)
        keys = key_states.to(self.dtype)
        self.held = Held.empty(self.config, self.format, self._empty, self._index, keys, value_states)
        self._layer_id = compiled.layer_id_of(self, value_states.shape[-1])
        self.is_initialized = True

    # ------------------------------------------------------------------------------------------------- tokens come
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, and return what attention is to see.

        A first prompt attends to its own exact keys and values. Later tokens attend to what was there before they
        came, and exactly to each other: the rule is applied to them afterwards. After :meth:`activate_past_recording`
        they are speculative, and attend to what each would find if they came one by one. All are held in the dtype of
        the first values: under autocast, keys may come in another.

        Args:
            key_states: ``[B, H, n, D]``, float32, float16 or bfloat16.
            value_states: ``[B, H, n, Dv]`` on the same device.

        Returns:
            Handles for the keys and values of all tokens (:class:`logquant.attention.handle.KVHandle`); in a model that
            is being compiled the layer's id (:mod:`logquant.attention.compiled`).

        Raises:
            TypeError: a dtype that is not supported.
            ValueError: another shape or device than before. The layer is unchanged after either.
            RuntimeError: an earlier call was interrupted while it moved tokens: :meth:`reset` helps. Earlier layers of
                the cache hold more tokens: :meth:`LogQuantCache.rewind` helps. The tokens come in a backward pass
                (``torch.utils.checkpoint``) that has not seen them before.
        """
        if torch.compiler.is_compiling():
            if not self.is_initialized:
                handled: tuple[Tensor, Tensor] = self._update_uncompiled(key_states, value_states)
                return handled
            layer_id = compiled.update_layer(key_states, value_states, self._layer_id)
            return layer_id, layer_id
        return self._update(key_states, value_states)

    @torch.compiler.disable
    def _update_uncompiled(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if (step := self.plain_step) is not None and self._may_step and step.goes_on_with(key_states, value_states):
            self.shared.arrive(self._index, self._length)
            return handles(self._plain_token(step.next(key_states, value_states)))
        check_states(key_states, value_states, self.held.storage if self.is_initialized else None)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        as_they_came = key_states.dtype == value_states.dtype == self.dtype
        if not as_they_came:
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        if in_backward():
            return handles(self.recompute.again(key_states, value_states, self._length))
        self.shared.arrive(self._index, self._length)
        if self.speculation is not None:
            self.speculation.begin(self, key_states.shape[2], self.shared.speculative)
            return handles(self.append(key_states, value_states))
        after_step = self._steps_plainly and (last := self.uncommitted) is not None and last.is_step
        self.commit()
        may_be_plain = after_step and as_they_came and key_states.shape[2] == 1 and self._may_step
        if may_be_plain and (start := Start.of(self.held, self._indexed_recall)) is not None:
            return handles(self._plain_token(start.first(key_states, value_states)))
        return handles(self.append(key_states, value_states))

    @property
    def _may_step(self) -> bool:
        """Whether the token that comes is for good, and no gradient asks what becomes of it."""
        return self.speculation is None and not torch.is_grad_enabled() and not in_backward()

    def _plain_token(self, step: PlainStep) -> PlainToken:
        """The token of a plain step comes: all at once, so that nothing comes in between."""
        version, length = self.version + 1, self._length + 1
        vars(self).update(plain_step=step, compiled_view=None, version=version, _length=length)
        return PlainToken(self, step)

    def append(self, keys: Tensor, values: Tensor) -> KVView:
        """New tokens come, uncommitted, where there are no such; returns what they attend to."""
        rows, new, storage = self.rows, keys.shape[2], self.held.storage
        # Neither is so in a plain step.
        traced = torch.is_grad_enabled() or storage.graph_start != NO_GRAPH
        recorded = traced and self._record(keys, values)
        in_window = rows.length > 0 and rows.exact + new <= window_capacity(self.config) + rows.reserved
        in_window = in_window and not (traced and (recorded or storage.in_graph))
        states = (keys.detach(), values.detach()) if traced and not recorded else (keys, values)
        seen, held = (keys, values), states
        if rows.length > 0:
            seen = held = storage.append(rows, *states, in_window=in_window)
        self.version += 1
        self._length, self.compiled_view = rows.length + new, None
        self.uncommitted = Uncommitted(Exact(*held, in_window), states)
        return self._view(*seen, new)

    def _record(self, keys: Tensor, values: Tensor) -> bool:
        """Whether autograd records what becomes of new tokens: a backward pass may then want it computed anew."""
        storage = self.held.storage
        recorded = records(keys, values, storage.window_k, storage.window_v)
        if recorded:
            before = Step(storage.snapshot(), self.rows, self.held.layout, self.held.advice.key_map, (keys, values))
            self.recompute.record(before)
            storage.graph_start = min(storage.graph_start, self.rows.length)
        elif not storage.in_graph:
            self.recompute.forget()
            storage.graph_start = NO_GRAPH
        return recorded

    # ------------------------------------------------------------------------------------------------- they attend
    def attend(self, view: KVView, call: AttentionCall) -> Tensor:
        """Attention of new tokens to a view of this layer, ``[B, Hq, L, Dv]``."""
        out = view.compute(call) if self.speculation is None else self.speculation.attend(self, view, call)
        self.observe(view, call)
        return out

    def observe(self, view: View, call: AttentionCall | None) -> None:
        """Learn what has attended to the uncommitted tokens; None if it does not tell its queries."""
        if not isinstance(view, KVView) or not view.is_current or (uncommitted := self.uncommitted) is None:
            return
        if call is not None:
            query, lse = call.query.detach(), view.lse
            if view.new == 1 < query.shape[2]:  # query heads that came as queries of their KV head
                query = query.flatten(1, 2).unsqueeze(2)
                lse = None if lse is None else lse.flatten(1, 2).unsqueeze(2)
            uncommitted.masked = call.mask is not None
            uncommitted.real = self.rows.real_positions(call.mask, view.new, len(view.keys))
            uncommitted.call = AttentionCall(query, None, call.scale, call.softcap, lse=lse)
            uncommitted.given = view.given_after if uncommitted.real is None else None
        # A prompt takes its place at once, lest every layer's exact prompt be held at the same time. In the window the
        # new tokens cost nothing, and there the view must last: some models attend to it again. Speculative tokens that
        # came with a prompt would leave their mark on its pages: crop says which they are.
        if not (uncommitted.exact.in_window or self.rows.reserved):
            self.commit()

    # ----------------------------------------------------------------------------------------- they take their places
    def commit(self) -> None:
        """New tokens take their places, those that the rule says in pages."""
        if not self.is_initialized:
            return
        self.held.check_intact()
        if self.uncommitted is None:
            return
        if self.held.take(self.uncommitted, self._real_positions(self.uncommitted), self.shared.allocator):
            self.version += 1
        self.uncommitted = None

    def reserve(self, tokens: int) -> None:
        """From now on the rule leaves that many of the newest tokens alone."""
        if self.is_initialized:
            self.held.rows = self.held.rows.reserving(tokens)

    # -------------------------------------------------------------------------------- tokens are taken back, rows move
    def activate_past_recording(self) -> None:
        """The tokens that come are speculative until the next :meth:`crop`, which can remove them without a trace.

        The newest W stay exact until then. Those after a prompt see, and leave in the layer, what they would if they
        came one by one, as long as each update is followed by a crop.
        """
        self.record_past = True

    @property
    def record_past(self) -> bool:
        """Whether tokens are speculative; transformers sets it to False where assisted generation ends."""
        return self.speculation is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._look()
        if value:
            if self.config.evict is not None:
                raise ValueError("evict drops tokens for good, so none may be speculative; decode without drafts")
            self.speculation = self.speculation or Speculation()
        elif self.speculation is not None:
            self.speculation.end(self)
            self.speculation = None

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse (ValueError) a :meth:`crop` that would bring back tokens which have been dropped."""
        if self.is_initialized:
            committed = -tokens_to_remove - (self.uncommitted.new if self.uncommitted else 0)
            if committed > 0:
                after = self.rows.crop(committed)
                if self.held.ragged is not None:
                    self.held.ragged.check_crop(self.rows, after)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` positions.

        The layer then holds what it would hold had they never come, with one exception: quantisation cannot be undone,
        so tokens that would still be exact, but were packed meanwhile, come back as they were packed. None are if the
        positions came with the last :meth:`update`, or since :meth:`activate_past_recording` and are W at most.

        Args:
            tokens_to_remove: 0 or negative, as for transformers' own layers.

        Raises:
            ValueError: a positive number, or tokens would have to come back that KV heads have dropped, or put into
                clusters. The layer is unchanged then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        self.held.check_intact()
        self.check_crop(tokens_to_remove)
        uncommitted, kept, remove = self.uncommitted, 0, -tokens_to_remove
        real = None
        if uncommitted is not None:
            real = self._real_positions(uncommitted)
            kept = max(0, uncommitted.new - remove)
            remove -= uncommitted.new - kept
            self.uncommitted = None
        if uncommitted is not None or remove:
            self.version += 1
        try:
            self.version += self.held.crop(remove, self.shared.allocator)
        finally:
            self._length = self.rows.length
        if uncommitted is None or not kept:
            return
        # What is uncommitted comes once more, without what was removed.
        parts: tuple[slice, ...] = (slice(0, kept),)
        if self.speculation is not None:
            self.speculation.tokens = max(0, self.speculation.tokens - (uncommitted.new - kept))
            parts = self.speculation.parts(self.rows, kept, None if real is None else real[:, :kept])
        keys, values = uncommitted.states
        for part in parts:
            self.append(keys[:, :, part], values[:, :, part])
            assert self.uncommitted is not None
            self.uncommitted.call, self.uncommitted.real = uncommitted.known(part)
            self.commit()

    def _select_rows(self, indices: Tensor) -> None:
        if not len(indices):
            self.reset()
        elif self.is_initialized:
            self.commit()
            rows = self.rows if self.rows.alike else self.rows.select(indices.tolist())
            self.held = self.held.map(lambda t: t.index_select(0, indices.to(t.device)), rows)
            self.version += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows: an index, several, a slice or a mask. Without any row, the layer is empty."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size)
            self._select_rows(rows[indices.cpu() if isinstance(indices, Tensor) else indices, ...].reshape(-1))

    def offload(self) -> None:
        """Move the pages to the CPU's memory; the exact tokens stay."""
        if self.config.evict is not None:
            raise ValueError("evict keeps pages where the exact tokens are: a cache with it cannot be offloaded")
        if self.is_initialized:
            self.held.storage.offload()

    def prefetch(self) -> None:
        """Move offloaded pages back."""
        if self.is_initialized:
            self.held.storage.prefetch()

    def to(self, device: torch.device | str) -> None:
        """Move all tensors to ``device``; tokens that come next must be there."""
        if self.is_initialized:
            self.commit()
            self.held = self.held.map(lambda t: t.to(device), self.rows)
            self.device = self.held.storage.window_k.device
            self.version += 1

    # ----------------------------------------------------------------------------------------------- copies and files
    def copy(self) -> LogQuantLayer:
        """A copy of what is committed, in which nothing is speculative."""
        self._look()
        twin = type(self).__new__(type(self))
        twin.__dict__.update(
            self.__dict__, _uncommitted=None, compiled_view=None, speculation=None, recompute=Recompute()
        )
        twin.shared = Shared(padding=self.shared.padding)
        if self.is_initialized:
            twin.held = self.held.copy()
            twin.reserve(0)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> LogQuantLayer:
        """An independent layer, committed as this one is then. Both share the page store until one writes to it."""
        self.commit()
        memo[id(self)] = twin = self.copy()
        twin.shared = copy.deepcopy(self.shared, memo)
        twin.speculation = copy.deepcopy(self.speculation, memo)
        if self.is_initialized:
            twin.reserve(self.rows.reserved)
            twin._layer_id = compiled.layer_id_of(twin, len(self._layer_id))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self.commit()
        state = {name: value for name, value in self.__dict__.items() if name != "_layer_id"}
        return state | {"compiled_view": None, "recompute": Recompute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self._layer_id = compiled.layer_id_of(self, self.format.value_dim)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file needs to hold this layer again, committed: tensors by name, and what JSON can hold.

        Where the tokens are is not in it: that is the same for all layers of a cache.
        """
        described: dict[str, Any] = {"is_initialized": self.is_initialized, "record_past": self.record_past}
        if not self.is_initialized:
            return {}, described
        self.commit()
        tensors, of_queries = self.held.state()
        return tensors, described | of_queries

    def restore(self, rows: Rows | None, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        """Hold what another layer held: the inverse of :meth:`state`.

        Args:
            rows: where the tokens are.
            tensors, described: what :meth:`state` gave.

        Raises:
            ValueError: tensors that are missing, or do not fit each other, the layer's settings or ``rows``.
        """
        if described["is_initialized"]:
            held = Held.restored(self.config, rows, self._index, tensors, described)
            self.lazy_initialization(held.storage.window_k, held.storage.window_v)
            self.held, self._length = held, held.rows.length
            self.version += 1
        self.record_past = described["record_past"]
