"""``LogQuantCache``: the cache of section 4 of LogQuant for models of transformers v5.

The rule lives in :mod:`logquant.rule`, the arithmetic in :mod:`logquant.ops`, what attention sees of a layer in
:mod:`logquant.attention`; this file moves tokens between the exact window and the packed pages.

Which of new tokens are padding is known only when they are attended to, for masks come with attention. So ``update``
keeps them *pending*; :class:`KVView` tells its layer what it was asked, and then, or at the latest
when something else happens to the layer, they take their places.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .. import ops
from ..attention import compiled
from ..attention.handle import KVHandle
from ..attention.view import Attended, KVView
from ..cache.sizes import store_pages, window_capacity, window_slots
from ..config import LogQuantConfig
from ..format import DTYPES, PageFormat
from ..quantizer import columns
from ..quantizer.calibration import calibration_of
from ..quantizer.feedback import Attention, key_weights, value_feedback
from ..quantizer.queries import MAP_QUERIES, QUERIES, Newest
from ..rule import evicted_slots
from .layout import Move, Rows, Slots

# Pages are quantised in portions of about this size, so that a long prompt's never exist twice.
_PORTION_NBYTES = 1 << 20


@dataclass(slots=True)
class _Pending:
    """Tokens that have come but not taken their places.

    Attributes:
        keys, values: ``[B, H, N, D]``: each row's exact tokens, then the new ones.
        states: keys and values of the new ones alone, ``[B, H, new, D]``.
        in_window: whether ``keys`` and ``values`` are the layer's own window.
        recallable: how many of the newest tokens a :meth:`LogQuantLayer.crop` may take back without a trace.
        drafts: how many of the newest columns see, and leave in the layer, what they would if each came by itself.
        attended: what has attended to them, or None. Not its mask: whoever made that may reuse its memory.
        real: what that said of the new columns: bool ``[B, new]``, which of them hold a token; None if all do.
    """

    keys: Tensor
    values: Tensor
    states: tuple[Tensor, Tensor]
    in_window: bool
    recallable: int
    drafts: int
    attended: Attended | None = None
    real: Tensor | None = None

    @property
    def new(self) -> int:
        """Columns that have come."""
        return self.states[0].shape[2]

    def part(self, columns: slice) -> tuple[tuple[Tensor, Tensor], int, Attended | None, Tensor | None]:
        """``states``, ``drafts``, ``attended`` and ``real`` of some of the new columns, all of them drafts or none."""
        keys, values = (x[:, :, columns] for x in self.states)
        drafts = columns.stop - columns.start if columns.start >= self.new - self.drafts else 0
        attended = self.attended
        if attended is not None:
            unknown = self.new - attended.query.shape[2]
            start, stop = (max(0, end - unknown) for end in (columns.start, columns.stop))
            attended = attended._replace(query=attended.query[:, :, start:stop])
        real = None if self.real is None or self.real[:, columns].all() else self.real[:, columns]
        return (keys, values), drafts, attended, real


@dataclass
class _Shared:
    """What the layers of a cache have in common.

    The stores of all layers are allocated together, by the first layer that packs a prompt: small tensors that live
    long, made one by one between the large ones of each layer's computation, would keep the allocator from giving
    those back.
    """

    layers: int = 1
    padding: Tensor | None = None
    drafts: int | None = None
    _key: object = None
    _stores: list[list[Tensor]] = field(default_factory=list)

    def take_stores(self, like: Tensor, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """New tensors of these shapes and dtypes on the device of ``like``."""
        key = like.device, shapes
        if self._key is None:
            made = [[like.new_empty(shape, dtype=dtype) for shape, dtype in shapes] for _ in range(self.layers)]
            self._key, self._stores = key, made
        if self._key == key and self._stores:
            return self._stores.pop()
        self._stores = []
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in shapes]

    def forget(self) -> None:
        self.padding, self.drafts, self._key, self._stores = None, None, None, []


class LogQuantLayer(CacheLayerMixin):
    """The keys and values of one layer: between 2W and 3W exact tokens, the others in pages.

    Args:
        config: what to keep exact and how to store the rest.
        shared: what the layers of a cache have in common.
        rows: the empty rows that the layers of a cache share.
        index: which layer of the model it is.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True
    _rows: Rows
    _columns: int

    def __init__(
        self, config: LogQuantConfig, shared: _Shared | None = None, rows: Rows | None = None, index: int = 0
    ) -> None:
        # Not super().__init__(): keys and values are properties here.
        self.config = config
        self._index = index
        self._shared = shared or _Shared()
        self._empty = rows or Rows((Slots(config.window, config.rule, config.sinks),))
        self._version = 0
        # What the last update of a compiled model returned, for the attention that follows.
        self.handles: tuple[Tensor, Tensor] | None = None
        self._pending: _Pending | None = None
        self.record_past = False
        self.reset()

    def __repr__(self) -> str:
        if not self.is_initialized:
            return "LogQuantLayer(empty)"
        return f"LogQuantLayer(tokens={self.get_seq_length()}, packed={self.rows.packed}, exact={self.rows.exact})"

    # ------------------------------------------------------------------------------------------------- storage
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.format: PageFormat = self.config.page_format(head_dim, value_states.shape[-1])
        self.key_map = self._first_map(key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window_k = key_states.new_empty(batch, heads, 0, head_dim)
        self.window_v = value_states.new_empty(batch, heads, 0, value_states.shape[-1])
        self.pages = key_states.new_empty(batch, heads, 0, self.format.words, dtype=torch.int32)
        self._own_pages(self.pages)
        # The newest queries, which say how to quantise (quantizer/queries.py); None where not asked for or known.
        self._newest: Newest | None = None
        self._ticket = compiled.ticket_for(self, value_states.shape[-1])
        self.is_initialized = True

    def _first_map(self, like: Tensor) -> Tensor | None:
        """The column map ``[B, H, C]`` for tensors like this one: calibrated, or until one is chosen."""
        if not self.format.has_map:
            return None
        batch, heads = like.shape[:2]
        if (calibration := calibration_of(self.config)) is None:
            return columns.default_map(self.format, batch, heads, like.device)
        return calibration.key_map(self._index, self.format, heads, like.device).expand(batch, -1, -1)

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first update")
        return self.window_k.shape[0]

    @property
    def rows(self) -> Rows:
        """Where the tokens of each row are, after all that have come have taken their places."""
        self._settle()
        return self._rows

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, dequantised, by column; 0 where padding was."""
        rows = self.rows
        window_k, window_v = self.window_k[:, :, : rows.exact], self.window_v[:, :, : rows.exact]
        return self._view(window_k, window_v, rows, 0).dense()

    # transformers' layers have attributes of these names.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """What a ``DynamicLayer`` would hold, as far as it is still known; made anew at every access."""
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.dense()[1] if self.is_initialized else None

    def _own_pages(self, store: Tensor) -> None:
        """``store`` becomes this layer's page store, and nobody else's."""
        if (sharers := getattr(self, "_sharers", None)) is not None:
            sharers.discard(self)
        self.pages = store
        self._sharers: weakref.WeakSet[LogQuantLayer] = weakref.WeakSet([self])

    def _pages_to_write(self, pages: int) -> Tensor:
        """The page store if it has room for ``pages`` and is nobody else's, or a larger copy that is."""
        if pages <= self.pages.shape[2] and len(self._sharers) == 1:
            return self.pages
        used = self._rows.packed // self.format.page_tokens
        batch, heads, _, words = self.pages.shape
        store = self.pages.new_empty(batch, heads, store_pages(pages), words)
        store[:, :, :used] = self.pages[:, :, :used]
        return store

    def _window_with_room_for(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The window if it has room for ``tokens`` tokens, or a larger copy."""
        if tokens <= self.window_k.shape[2]:
            return self.window_k, self.window_v
        capacity = max(tokens, window_slots(self.config, tokens))
        used = min(self._rows.exact, self.window_k.shape[2])
        grown_k, grown_v = (w.new_empty(*w.shape[:2], capacity, w.shape[3]) for w in (self.window_k, self.window_v))
        grown_k[:, :, :used] = self.window_k[:, :, :used]
        grown_v[:, :, :used] = self.window_v[:, :, :used]
        return grown_k, grown_v

    # -------------------------------------------------------------------------------------------------- update
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, and return what attention is to see.

        A first prompt attends to its own exact keys and values. Later tokens attend to what was there before they
        came, and exactly to each other: the rule is applied to them afterwards. After :meth:`activate_past_recording`
        they are drafts, which attend to what each would find if they came one by one.

        Args:
            key_states: ``[B, H, n, D]``, float32, float16 or bfloat16.
            value_states: ``[B, H, n, Dv]``, same dtype and device.

        Returns:
            Handles for the keys and values of all tokens (:class:`KVHandle`); in a model that is
            being compiled tickets (:mod:`logquant.compiled`).

        Raises:
            TypeError: another dtype than before, or one that is not supported.
            ValueError: another shape or device than before. The layer is unchanged after either.
            RuntimeError: an earlier call was interrupted while it moved tokens; :meth:`reset` helps.
        """
        if torch.compiler.is_compiling():
            if not self.is_initialized:
                handles: tuple[Tensor, Tensor] = self._update_uncompiled(key_states, value_states)
                return handles
            ticket = compiled.update_layer(key_states, value_states, self._ticket)
            return ticket, ticket
        return self._update(key_states, value_states)

    @torch.compiler.disable
    def _update_uncompiled(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(key_states, value_states)

    def _update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._pending is not None:
            # No longer the last update, so that a prompt need not stay exact as a whole.
            self._pending.recallable = min(self._pending.recallable, self.config.window)
        self._settle()
        # What generate may take back (speculative decoding) stays exact until it has decided.
        recallable = max(self.config.window, key_states.shape[2]) if self.record_past else 0
        view = self._append((key_states, value_states), recallable, self._drafts_of(key_states.shape[2]))
        return KVHandle(view, 0), KVHandle(view, 1)

    def _drafts_of(self, new: int) -> int:
        """How many of so many new columns are drafts: all after a prompt, if nobody has told."""
        if not self.record_past:
            return 0
        if not self._rows.columns:
            return min(self._shared.drafts or 0, new - 1)
        drafts = self._shared.drafts
        return new if drafts is None or drafts >= new - 1 else drafts

    def _append(
        self,
        states: tuple[Tensor, Tensor],
        recallable: int,
        drafts: int,
        attended: Attended | None = None,
        real: Tensor | None = None,
    ) -> KVView:
        """New tokens come and are pending; what they attend to. The arguments are described at :class:`_Pending`."""
        rows, new = self._rows, states[0].shape[2]
        tokens = rows.exact + new
        in_window = rows.columns > 0 and tokens <= window_capacity(self.config) + recallable
        seen, states = states, (states[0].detach(), states[1].detach())
        held = states
        if rows.columns > 0:
            if in_window:
                window_k, window_v = self._window_with_room_for(tokens)
                keys, values = window_k[:, :, :tokens], window_v[:, :, :tokens]
            else:
                keys, values = (x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in states)
                keys[:, :, : rows.exact] = self.window_k[:, :, : rows.exact]
                values[:, :, : rows.exact] = self.window_v[:, :, : rows.exact]
            self._write_new(keys, states[0], rows)
            self._write_new(values, states[1], rows)
            if in_window:
                self.window_k, self.window_v = window_k, window_v
            seen = held = keys, values
        self._version += 1
        self.handles = None
        self._columns = rows.columns + new
        self._pending = _Pending(*held, states, in_window, recallable, drafts, attended, real)
        return self._view(*seen, rows, new)

    @staticmethod
    def _write_new(into: Tensor, new: Tensor, rows: Rows) -> None:
        """Write new tokens right after each row's exact ones."""
        if rows.alike:
            into[:, :, rows.exact : rows.exact + new.shape[2]] = new
            return
        slot = rows.exact_counts(into.device)[:, None] + torch.arange(new.shape[2], device=into.device)
        into[torch.arange(len(into), device=into.device)[:, None], :, slot] = new.transpose(1, 2)

    def _view(self, keys: Tensor, values: Tensor, rows: Rows, new: int) -> KVView:
        """What the newest ``new`` columns attend to."""
        version = self._version

        def observed(attended: Attended | None) -> None:
            pending = self._pending
            if self._version == version and pending is not None:
                if attended is not None:
                    if new == 1 < attended.query.shape[2]:  # query heads that came as queries of their KV head
                        attended = attended._replace(query=attended.query.flatten(1, 2).unsqueeze(2))
                    pending.real = rows.real_columns(attended.mask, new, len(keys))
                    pending.attended = attended._replace(mask=None)
                # A prompt takes its place at once, lest every layer's exact prompt be held at the same time. In the
                # window the new tokens cost nothing, and there the view must last: some models attend to it again.
                # Drafts that came with a prompt would leave their mark on its pages: crop says which they are.
                if not (pending.in_window or pending.recallable):
                    self._settle()

        def parts(mask: Tensor | None) -> Iterator[tuple[slice, KVView]]:
            return self._parts(mask) if self._version == version else iter(())

        pages = rows.packed // self.format.page_tokens
        return KVView(
            self.pages if pages == self.pages.shape[2] else self.pages[:, :, :pages],
            keys,
            values,
            self.format,
            key_map=self.key_map,
            rows=rows,
            new=new,
            is_current=lambda: self._version == version,
            observed=observed,
            parts=parts if self._pending is not None and self._pending.drafts else None,
        )

    def _parts(self, mask: Tensor | None) -> Iterator[tuple[slice, KVView]]:
        """What drafts see where the rule applies in their midst: a copy of this layer, to which they come by and by.

        Args:
            mask: what they are about to attend with, as for :meth:`KVView.attend`.

        Yields:
            Some of the new columns and the view for their queries; nothing where all see the same.
        """
        pending, rows = self._pending, self._rows
        if pending is None or rows.undecided:
            return
        parts = rows.parts(pending.new, pending.drafts, rows.real_columns(mask, pending.new, self.batch_size))
        if len(parts) == 1:
            return
        copied = self._copy()
        for part in parts:
            copied._settle()
            states, drafts, *_ = pending.part(part)
            yield part, copied._append(states, 0, drafts)

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.dtype not in DTYPES:
            raise TypeError(f"key_states must be float32, float16 or bfloat16, got {key_states.dtype}")
        if value_states.dtype != key_states.dtype or value_states.device != key_states.device:
            raise TypeError(
                f"value_states must have the dtype and device of key_states, got {value_states.dtype} on "
                f"{value_states.device} and {key_states.dtype} on {key_states.device}"
            )
        if key_states.dim() != 4 or value_states.dim() != 4 or key_states.shape[:3] != value_states.shape[:3]:
            raise ValueError(
                "key_states and value_states must be [batch, heads, tokens, dim] and agree in all but dim, got "
                f"{list(key_states.shape)} and {list(value_states.shape)}"
            )
        if not self.is_initialized:
            return
        if key_states.dtype != self.dtype:
            raise TypeError(f"key_states must stay {self.dtype} like the tokens before them, got {key_states.dtype}")
        if key_states.device != self.device:
            raise ValueError(f"key_states must stay on {self.device}, got {key_states.device}")
        for name, new, held in (
            ("key_states", key_states, self.window_k),
            ("value_states", value_states, self.window_v),
        ):
            if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                need = f"[{held.shape[0]}, {held.shape[1]}, tokens, {held.shape[3]}]"
                raise ValueError(f"{name} must be {need} like the tokens before them, got {list(new.shape)}")

    # ------------------------------------------------------------------------------------- tokens take their places
    def _check_intact(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "this LogQuant cache layer is invalid: an earlier call was interrupted while it moved tokens; "
                "reset() the cache and feed it the sequence again"
            )

    def _settle(self, recallable: int = 0) -> None:
        """Pending tokens take their places, those that the rule says in pages.

        Args:
            recallable: leave the rule unapplied to at least that many of the newest tokens.
        """
        self._check_intact()
        if self._pending is None:
            return
        pending, rows = self._pending, self._rows
        new, attended = pending.new, pending.attended
        real = self._real_columns(pending)
        recallable = max(recallable, pending.recallable)
        after = rows.append(new, recallable, real)
        if attended is not None and real is not None and attended.query.shape[2] != new:
            attended = None
        newest = self._newest_with(attended, new, real, recallable)
        kept = self._newest_after(newest, after, recallable)
        if pending.in_window and real is None and after.packed_counts == rows.packed_counts:
            self._rows = after  # the new tokens are where they belong already, as in most steps
        else:
            moves = rows.moves(new, self.device, recallable, real)
            with torch.no_grad():
                self._move(pending.keys, pending.values, pending.in_window, moves, after, newest, real)
        self._newest, self._pending = kept, None

    def _newest_with(self, attended: Attended | None, new: int, real: Tensor | None, recallable: int) -> Newest | None:
        """The newest queries, and as many more as a :meth:`crop` may take back; perhaps in the memory of all."""
        count = self._queries_needed(self._rows)
        if attended is None or attended.query.shape[2] != new or not count:
            return self._newest
        newest = Newest.of(attended.query, real, attended.scale, attended.softcap)
        if self._newest is None:
            return newest.keep(count + recallable)
        return self._newest.then(newest, count + recallable)

    def _newest_after(self, newest: Newest | None, after: Rows, recallable: int) -> Newest | None:
        """Those of the newest queries that rows need from now on, in memory of their own: lest a prompt's many stay."""
        count = self._queries_needed(after)
        if newest is None or not count:
            return None
        if self._newest is None or newest.size > count + recallable:
            return newest.keep(count + recallable).apart()
        return newest

    def _queries_needed(self, rows: Rows) -> int:
        """How many of the newest queries say how to quantise the next tokens that leave."""
        if self._chooses and 0 in rows.packed_counts:
            return MAP_QUERIES
        return QUERIES if self.format.mse_searched else 0

    @property
    def _chooses(self) -> bool:
        """Whether each row has a column map of its own."""
        return self.config.allocates_bits(self.format)

    def _real_columns(self, pending: _Pending) -> Tensor | None:
        """Which of the pending columns hold a token, bool ``[B, new]``; None if all do."""
        rows, batch = self._rows, self.window_k.shape[0]
        if pending.attended is not None:
            return pending.real
        padding, total = self._shared.padding, rows.columns + pending.new
        if padding is None or padding.shape[1] < total:
            return None
        real = padding[:, rows.columns : total].bool().cpu().expand(batch, -1)
        return None if real.all() else real

    def _move(
        self,
        keys: Tensor,
        values: Tensor,
        in_window: bool,
        moves: list[Move],
        after: Rows,
        newest: Newest | None,
        real: Tensor | None = None,
    ) -> None:
        """Carry out ``moves`` on ``keys`` and ``values``, the layer's window or other tensors laid out like it.

        Args:
            keys, values: ``[B, H, N, D]``.
            in_window: whether they are the layer's own window.
            moves: what becomes of the tokens of which rows.
            after: the rows afterwards.
            newest: the newest queries, if known.
            real: which of the new columns hold a token, bool ``[B, new]``; None if all do.
        """
        if in_window and all(len(m.leaving) == 0 and m.staying is None for m in moves):
            self._rows = after
            return
        # All that may run out of memory comes before the first write to what is held.
        steps = [m for m in moves if in_window and m.is_step]
        others = [m for m in moves if not (in_window and m.is_step)]
        if steps:
            self.prefetch()
        store, window_k, window_v = self._stores_for(after, keys, values, in_window)
        key_map = self._chosen_map(keys, moves, newest, real)
        step_options = [self._fit_options(self._attention(keys, m, newest, real), slice(None)) for m in steps]
        for m in others:
            self._quantize_into(store, keys, values, m, key_map, self._attention(keys, m, newest, real))
        stays = [
            (m.rows, self._staying(x[m.rows], m), window)
            for m in others
            if not (in_window and m.staying is None)
            for x, window in ((keys, window_k), (values, window_v))
        ]
        # What is written from here on cannot be undone.
        self._interrupted = True
        for m, options in zip(steps, step_options, strict=True):
            self._evict(store, m, key_map, options)
        for rows, stay, window in stays:
            window[rows, :, : stay.shape[2]] = stay
        if store is not self.pages:
            self._own_pages(store)
        self.window_k, self.window_v, self.key_map = window_k, window_v, key_map
        self._rows = after
        if in_window:
            self._version += 1
        self._interrupted = False

    @staticmethod
    def _tokens_of(keys: Tensor, move: Move, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys of the tokens that a move is about, without padding, in order; and which of them leave."""
        if real is None or move.staying is None:
            return keys[move.rows, :, : move.tokens], move.leaving
        slots = torch.cat([move.leaving, move.staying]).sort().values
        return keys[move.rows].index_select(2, slots), torch.searchsorted(slots, move.leaving).int()

    def _chosen_map(self, keys: Tensor, moves: list[Move], newest: Newest | None, real: Tensor | None) -> Tensor | None:
        """The column map, with those of rows that get their first page chosen from the tokens they have now."""
        first = [m for m in moves if m.packed == 0 and len(m.leaving)]
        if self.key_map is None or not self._chooses or not first:
            return self.key_map
        key_map = self.key_map.clone()
        for m in first:
            attention = self._attention(keys, m, newest, real, MAP_QUERIES)
            if attention is None:
                scores = columns.variances(self._tokens_of(keys, m, real)[0], 2 * self.format.page_tokens)
            else:
                scores = attention.key_scores(self.format.page_tokens)
            key_map[m.rows] = columns.allocate(scores, self.format)
        return key_map

    def _attention(
        self, keys: Tensor, move: Move, newest: Newest | None, real: Tensor | None, queries: int = QUERIES
    ) -> Attention | None:
        """How the newest queries of a move's rows attend to the tokens that leave, if that is known and asked for."""
        if newest is None or not len(move.leaving):
            return None
        tokens, leaving = self._tokens_of(keys, move, real)
        return Attention(newest.keep(queries).together().map(lambda t: t[move.rows]), tokens, leaving)

    def _fit_options(self, attention: Attention | None, tokens: slice) -> dict[str, Tensor]:
        """What the quantiser is told about some of the tokens that leave."""
        if attention is None:
            return {}
        part, options = attention[tokens], {}
        if self.format.key_param_bits == 8:
            options["key_weights"] = key_weights(part, self.format.page_tokens)
        if self.format.value_param_bits == 8:
            options["value_feedback"] = value_feedback(part, self.format.page_tokens)
        return options

    @staticmethod
    def _staying(tokens: Tensor, move: Move) -> Tensor:
        if move.staying is None:
            return tokens[:, :, : move.tokens - len(move.leaving)]
        return tokens.index_select(2, move.staying)

    def _stores_for(self, after: Rows, keys: Tensor, values: Tensor, in_window: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A page store and a window with room for the tokens of ``after``, that hold what they hold now."""
        pages = after.packed // self.format.page_tokens
        if in_window or self._rows.columns:
            store = self._pages_to_write(pages) if after.packed > self._rows.packed else self.pages
            return store, *self._window_with_room_for(after.exact)
        slots = window_slots(self.config, after.exact if after.packed == 0 else window_capacity(self.config))
        shape = keys.shape[:2]
        store, window_k, window_v = self._shared.take_stores(
            keys,
            [
                ((*shape, pages, self.format.words), torch.int32),
                ((*shape, max(slots, after.exact), keys.shape[3]), self.dtype),
                ((*shape, max(slots, after.exact), values.shape[3]), self.dtype),
            ],
        )
        return store, window_k, window_v

    def _quantize_into(
        self,
        store: Tensor,
        keys: Tensor,
        values: Tensor,
        move: Move,
        key_map: Tensor | None,
        attention: Attention | None,
    ) -> None:
        """Quantise the tokens that leave into the pages after the packed ones."""
        page_tokens = self.format.page_tokens
        rows = store[move.rows]
        portion = page_tokens * max(1, _PORTION_NBYTES // (rows.shape[0] * rows.shape[1] * self.format.nbytes))
        for first in range(0, len(move.leaving), portion):
            index = move.leaving[first : first + portion]
            page = (move.packed + first) // page_tokens
            pages = ops.quantize(
                keys[move.rows],
                values[move.rows],
                self.format,
                index=index[None],
                key_map=None if key_map is None else key_map[move.rows],
                **self._fit_options(attention, slice(first, first + portion)),
            )
            rows[:, :, page : page + pages.shape[2]] = pages

    def _evict(self, store: Tensor, move: Move, key_map: Tensor | None, options: dict[str, Tensor]) -> None:
        """One step of the rule on a window, in place."""
        slots = evicted_slots(self.config.rule, self.config.window, self.config.sinks)
        ops.evict_(
            self.window_k[move.rows],
            self.window_v[move.rows],
            store[move.rows],
            self.format,
            page=move.packed // self.format.page_tokens,
            tokens=move.tokens,
            start=slots.start,
            step=slots.step,
            count=self.config.window,
            key_map=None if key_map is None else key_map[move.rows],
            **options,
        )

    # --------------------------------------------------------------------------------- what transformers asks for
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self._rows = self._empty
        self._columns = 0
        self.handles = None
        self._pending = None
        self._interrupted = False
        self.record_past = False
        self._version += 1
        self._shared.forget()
        for name in ("window_k", "window_v", "pages", "key_map", "_newest", "_sharers"):
            self.__dict__.pop(name, None)

    def activate_past_recording(self) -> None:
        """The tokens that come are drafts until the next :meth:`crop`, which can remove them without a trace.

        The newest W stay exact until then. Those after a prompt see, and leave in the layer, what they would if they
        came one by one, as long as each update is followed by a crop.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` columns.

        The layer then holds what it would hold had they never come, with one exception: quantisation cannot be undone,
        so tokens that would still be exact, but were packed meanwhile, come back as they were packed. None are if the
        columns came with the last :meth:`update`, or since :meth:`activate_past_recording` and are W at most.

        Args:
            tokens_to_remove: 0 or negative, as for transformers' own layers.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        self._check_intact()
        pending, kept, remove = self._pending, 0, -tokens_to_remove
        real = None
        if pending is not None:
            real = self._real_columns(pending)
            kept = max(0, pending.new - remove)
            remove -= pending.new - kept
            self._pending, self._columns = None, self._rows.columns
            self._version += 1
        cropped = self._rows.crop(remove) if remove else self._rows
        after, moves = cropped.append(0), cropped.moves(0, self.device)
        if remove:
            self._crop(cropped)
            self._newest = self._newest and self._newest.crop(remove)
            self._version += 1
        # The tokens that are left are here to stay, so the rule is applied to all of them.
        window_k, window_v = (w[:, :, : cropped.exact] for w in (self.window_k, self.window_v))
        with torch.no_grad():
            newest = self._newest_after(self._newest, after, 0)
            self._move(window_k, window_v, True, moves, after, self._newest)
        self._newest = newest
        if pending is None or not kept:
            return
        # What is pending comes once more, without what was removed.
        drafts = max(0, kept - (pending.new - pending.drafts))
        for part in self._rows.parts(kept, drafts, None if real is None else real[:, :kept]):
            states, drafts, attended, own = pending.part(part)
            self._append(states, 0, drafts, attended, own)
            self._settle()

    def _crop(self, after: Rows) -> None:
        before = self._rows
        batch, page_tokens = self.batch_size, self.format.page_tokens
        gone_by = tuple(zip(before.slots, after.slots * (len(before.slots) // len(after.slots)), strict=True))
        sources = [b.exact_before(a) for b, a in gone_by]
        pages_left = after.packed // page_tokens
        store, windows = self.pages, (self.window_k, self.window_v)
        if 2 * pages_left < store.shape[2]:
            store = store[:, :, :pages_left].clone()
        if any((source < b.packed).any() for (b, _), source in zip(gone_by, sources, strict=True)):
            window_k, window_v = (w.clone() for w in self._window_with_room_for(after.exact))
            for row, ((held, _), source) in enumerate(zip(gone_by, sources, strict=True)):
                rows = slice(0, batch) if before.alike else slice(row, row + 1)
                returns = (source < held.packed).nonzero().squeeze(1)
                pages, place = (source[returns] // page_tokens).unique(return_inverse=True)
                place = (place * page_tokens + source[returns] % page_tokens).to(self.device)
                used = self.pages[rows].index_select(2, pages.to(self.pages.device)).to(self.device)
                key_map = None if self.key_map is None else self.key_map[rows]
                packed = ops.dequantize(used, self.format, dtype=self.dtype, key_map=key_map)
                stays = (source[source >= held.packed] - held.packed).to(self.device)
                to_return, to_stay = returns.to(self.device), (source >= held.packed).nonzero().squeeze(1)
                to_stay = to_stay.to(self.device)
                for window, old, unpacked in zip(
                    (window_k, window_v), (self.window_k, self.window_v), packed, strict=True
                ):
                    window[rows].index_copy_(2, to_stay, old[rows].index_select(2, stays))
                    window[rows].index_copy_(2, to_return, unpacked.index_select(2, place))
            windows = window_k, window_v
        if store is not self.pages:
            self._own_pages(store)
        (self.window_k, self.window_v), self._rows, self._columns = windows, after, after.columns

    def _map_tensors(self, function: Callable[[Tensor], Tensor], rows: Rows) -> None:
        """Replace every tensor of the layer; all or none if one of the calls fails."""
        window_k, window_v, pages = function(self.window_k), function(self.window_v), function(self.pages)
        key_map = self.key_map
        if key_map is not None:
            key_map = function(key_map) if self._chooses else self._first_map(window_k)
        newest = self._newest and self._newest.map(function)
        self._own_pages(pages)
        self.key_map, self._newest = key_map, newest
        self.window_k, self.window_v, self._rows = window_k, window_v, rows
        self._version += 1

    def _select_rows(self, indices: Tensor) -> None:
        if self.is_initialized:
            rows = self.rows if self.rows.alike else self.rows.select(indices.tolist())
            self._map_tensors(lambda t: t.index_select(0, indices.to(t.device)), rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select_rows(torch.arange(self.batch_size, device=indices.device)[indices])

    def offload(self) -> None:
        """Move the pages to the CPU's memory; the exact tokens stay."""
        if self.is_initialized:
            self._own_pages(self.pages.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move offloaded pages back."""
        if self.is_initialized and self.pages.device != self.device:
            self._own_pages(self.pages.to(self.device, non_blocking=True))

    def to(self, device: torch.device | str) -> None:
        """Move all tensors to ``device``; tokens that come next must be there."""
        if self.is_initialized:
            self._map_tensors(lambda t: t.to(device), self.rows)
            self.device = self.window_k.device

    def restore(
        self,
        rows: Rows | None,
        pages: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        key_map: Tensor | None = None,
        newest: Newest | None = None,
    ) -> None:
        """Hold what another layer held, as :meth:`LogQuantCache.load` reads it.

        Raises:
            ValueError: tensors that do not fit each other, the layer's settings or ``rows``.
        """
        if any(t.dim() != 4 for t in (pages, window_k, window_v)):
            raise ValueError("pages, window_k and window_v must have four dimensions")
        fmt = self.config.page_format(window_k.shape[3], window_v.shape[3])
        batch, heads, exact, _ = window_k.shape
        fits = (
            rows is not None
            and (rows.alike or len(rows.slots) == batch)
            and exact == rows.exact
            and window_v.shape[:3] == window_k.shape[:3]
            and pages.shape == (batch, heads, rows.packed // fmt.page_tokens, fmt.words)
            and pages.dtype == torch.int32
            and window_k.dtype == window_v.dtype
            and window_k.dtype in DTYPES
        )
        if self.config.allocates_bits(fmt):
            map_shape = None if key_map is None or key_map.dtype != torch.int16 else key_map.shape
            fits = fits and map_shape == (batch, heads, fmt.key_columns)
        if newest is not None:
            fits = fits and newest.fits(batch, heads, fmt.head_dim)
        if not fits or rows is None:
            raise ValueError(
                f"pages {list(pages.shape)}, window_k {list(window_k.shape)} and window_v {list(window_v.shape)} do "
                "not fit each other and the settings of the cache"
            )
        self.lazy_initialization(window_k, window_v)
        self.window_k, self.window_v, self._rows, self._columns = window_k, window_v, rows, rows.columns
        self._own_pages(pages)
        if self._chooses:
            self.key_map = key_map
        self._newest = newest
        self._version += 1

    @property
    def newest_queries(self) -> Newest | None:
        """The newest queries, where they say how to quantise and are known."""
        self._settle()
        return self._newest if self.is_initialized else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LogQuantLayer:
        """An independent layer. Both share the page store until one of them writes to it."""
        self._settle()
        memo[id(self)] = twin = self._copy()
        twin._shared = copy.deepcopy(self._shared, memo)
        if self.is_initialized:
            twin._ticket = compiled.ticket_for(twin, len(self._ticket))
        return twin

    def _copy(self) -> LogQuantLayer:
        """A copy without what is pending, for work within this layer: it shares what is not the layer's alone."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _pending=None, handles=None, _shared=_Shared(padding=self._shared.padding))
        if self.is_initialized:
            made.window_k, made.window_v = self.window_k.clone(), self.window_v.clone()
            self._sharers.add(made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {name: value for name, value in self.__dict__.items() if name not in ("_sharers", "handles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, handles=None)
        if self.is_initialized:
            self._ticket = compiled.ticket_for(self, len(self._ticket))
            self._own_pages(self.pages)

    # ------------------------------------------------------------------------------------------------ accounting
    @property
    def nbytes(self) -> int:
        """Bytes of the tensors this layer holds; a page store that copies share counts for each."""
        self._settle()
        if not self.is_initialized:
            return 0
        held = self.window_k, self.window_v, self.pages, self._newest
        return sum(t.nbytes for t in held if t is not None) + self.map_nbytes

    @property
    def map_nbytes(self) -> int:
        """Bytes of the column maps of this layer's sequences; those of a calibration belong to none of them."""
        if not self.is_initialized or self.key_map is None or not self._chooses:
            return 0
        return self.key_map.nbytes

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes of the same tokens in a ``DynamicCache``."""
        if not self.is_initialized:
            return 0
        batch, heads, _, head_dim = self.window_k.shape
        return batch * heads * self.get_seq_length() * (head_dim + self.window_v.shape[3]) * self.dtype.itemsize
