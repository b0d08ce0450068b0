"""``LogQuantCache``: the cache of section 4 of LogQuant for models of transformers v5.

The rule lives in :mod:`logquant.window`, the arithmetic in :mod:`logquant.ops`, what attention sees of a layer in
:mod:`logquant.attention`; this file moves tokens between the exact window and the packed pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from . import ops
from .attention import KVHandle, KVView
from .config import LogQuantConfig
from .reference import DTYPES, PageFormat
from .window import Slots


class LogQuantLayer(CacheLayerMixin):
    """The keys and values of one layer: between 2W and 3W exact tokens, the others in pages.

    Args:
        config: what to keep exact and how to store the rest.
        slots: the empty slots that the layers of a cache share.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    def __init__(self, config: LogQuantConfig, slots: Slots) -> None:
        super().__init__()
        self.config = config
        self._empty = slots
        self.reset()

    def __repr__(self) -> str:
        return f"LogQuantLayer(tokens={self.slots.tokens}, packed={self.slots.packed}, exact={self.slots.exact})"

    # ------------------------------------------------------------------------------------------------- storage
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.format: PageFormat = self.config.page_format(head_dim, value_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window_k = key_states.new_empty(batch, heads, 0, head_dim)
        self.window_v = value_states.new_empty(batch, heads, 0, value_states.shape[-1])
        self.pages = key_states.new_empty(batch, heads, 0, self.format.words, dtype=torch.int32)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first update")
        return self.window_k.shape[0]

    @property
    def _pages_used(self) -> int:
        return self.slots.packed // self.format.page_tokens

    def _pages_with_room_for(self, pages: int) -> Tensor:
        """The page store, or a larger copy of it. The first one fits exactly, later ones grow by an eighth."""
        if pages <= self.pages.shape[2]:
            return self.pages
        used = self._pages_used
        capacity = pages + pages // 8 if used else pages
        batch, heads, _, words = self.pages.shape
        store = self.pages.new_empty(batch, heads, capacity, words)
        store[:, :, :used] = self.pages[:, :, :used]
        return store

    # -------------------------------------------------------------------------------------------------- update
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, evict and quantise what the rule says, and return what attention is to see.

        A first prompt attends to its own exact keys and values. Later tokens get handles
        (:class:`logquant.attention.KVHandle`); several tokens at once attend to what was exact before they came, so
        quantisation shows only from the next step on.

        Args:
            key_states: ``[B, H, n, D]``, float32, float16 or bfloat16.
            value_states: ``[B, H, n, Dv]``, same dtype and device.

        Returns:
            Keys and values of all tokens, as tensors or handles.

        Raises:
            TypeError: another dtype than before, or one that is not supported.
            ValueError: another shape or device than before. The layer is unchanged after either.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # What generate may take back (speculative decoding) stays exact until it has decided.
        count, recallable = key_states.shape[2], self.config.window if self.record_past else 0
        before, after = self.slots, self.slots.append(count, recallable)
        if before.tokens == 0:
            self._move_in_bulk(key_states, value_states, after, *before.moves(count, self.device, recallable))
            self._commit(after)
            return key_states, value_states
        newly_packed = after.packed - before.packed
        if newly_packed == 0 or (newly_packed == self.config.window and count == 1):
            self._reserve_window(before.exact + count)
            self.window_k[:, :, before.exact : before.exact + count] = key_states
            self.window_v[:, :, before.exact : before.exact + count] = value_states
            if newly_packed:
                self._evict(before.exact + count)
            self._commit(after)
            exact_k, exact_v = self.window_k[:, :, : after.exact], self.window_v[:, :, : after.exact]
            view = self._view(exact_k, exact_v, after, count)
        else:
            exact_k = torch.cat([self.window_k[:, :, : before.exact], key_states], 2)
            exact_v = torch.cat([self.window_v[:, :, : before.exact], value_states], 2)
            self._move_in_bulk(exact_k, exact_v, after, *before.moves(count, self.device, recallable))
            self._commit(after)
            view = self._view(exact_k, exact_v, before, count)
        return KVHandle(view, 0), KVHandle(view, 1)

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

    def _reserve_window(self, tokens: int) -> None:
        """Make room for ``tokens`` exact tokens."""
        if tokens <= self.window_k.shape[2]:
            return
        capacity = max(tokens, self.config.window_slots(tokens))
        grown = [w.new_empty(*w.shape[:2], capacity, w.shape[3]) for w in (self.window_k, self.window_v)]
        for new, old in zip(grown, (self.window_k, self.window_v), strict=True):
            new[:, :, : self.slots.exact] = old[:, :, : self.slots.exact]
        self.window_k, self.window_v = grown

    def _evict(self, tokens: int) -> None:
        """One step of the rule on a full window of ``tokens`` tokens, in place."""
        page = self._pages_used
        self.pages = self._pages_with_room_for(page + self.config.window // self.format.page_tokens)
        slots = self.config.evicted_slots
        ops.evict_(
            self.window_k,
            self.window_v,
            self.pages,
            self.format,
            page=page,
            tokens=tokens,
            start=slots.start,
            step=slots.step,
            count=self.config.window,
        )

    def _move_in_bulk(self, exact_k: Tensor, exact_v: Tensor, after: Slots, leaving: Tensor, staying: Tensor) -> None:
        """Of the tokens exact so far and new ones, pack those that leave and keep those that stay (indices)."""
        used = self._pages_used
        store = self.pages
        if len(leaving):
            pages = ops.quantize(exact_k, exact_v, self.format, index=leaving[None])
            store = pages
            if used:
                store = self._pages_with_room_for(used + pages.shape[2])
                store[:, :, used : used + pages.shape[2]] = pages
        # All that may run out of memory comes before the first write to the window.
        stay_k, stay_v = exact_k.index_select(2, staying), exact_v.index_select(2, staying)
        self._reserve_window(after.exact)
        self.pages = store
        self.window_k[:, :, : after.exact] = stay_k
        self.window_v[:, :, : after.exact] = stay_v

    def _commit(self, slots: Slots) -> None:
        self.slots = slots
        self._version += 1

    def _view(self, exact_k: Tensor, exact_v: Tensor, slots: Slots, queries: int) -> KVView:
        """What the newest ``queries`` tokens attend to: the packed tokens of ``slots``, and all others exactly."""
        version, tokens = self._version, self.slots.tokens
        return KVView(
            self.pages[:, :, : slots.packed // self.format.page_tokens],
            exact_k,
            exact_v,
            self.format,
            tokens=tokens,
            queries=queries,
            positions=lambda device: slots.positions(device, tokens - slots.tokens),
            has_dead_slots=slots.has_dead_slots,
            is_current=lambda: self._version == version,
        )

    # --------------------------------------------------------------------------------- what transformers asks for
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        self.slots = self._empty
        self.record_past = False
        self._version = getattr(self, "_version", 0) + 1
        for name in ("window_k", "window_v", "pages"):
            self.__dict__.pop(name, None)

    def activate_past_recording(self) -> None:
        """Keep the newest W tokens exact until the next :meth:`crop`, so that it can remove them without a trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens.

        Exact tokens leave no trace. Packed ones stay where they are, hidden from attention, and what was packed with
        them stays packed: quantisation cannot be undone.

        Args:
            tokens_to_remove: 0 or negative, as for transformers' own layers.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        if tokens_to_remove:
            self._commit(self.slots.crop(-tokens_to_remove))
        after = self.slots.append(0)
        if after.packed > self.slots.packed:
            exact = slice(0, self.slots.exact)
            moves = self.slots.moves(0, self.device)
            self._move_in_bulk(self.window_k[:, :, exact], self.window_v[:, :, exact], after, *moves)
        self._commit(after)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the layer; all or none if one of the calls fails."""
        if self.is_initialized:
            self.window_k, self.window_v, self.pages = (
                function(self.window_k),
                function(self.window_v),
                function(self.pages),
            )
            self._version += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_tensors(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_tensors(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_tensors(lambda t: t.to(self.device, non_blocking=True))

    # ------------------------------------------------------------------------------------------------ accounting
    @property
    def nbytes(self) -> int:
        """Bytes of the tensors this layer holds."""
        return sum(t.nbytes for t in (self.window_k, self.window_v, self.pages)) if self.is_initialized else 0

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes of the same tokens in a ``DynamicCache``."""
        if not self.is_initialized:
            return 0
        batch, heads, _, head_dim = self.window_k.shape
        return batch * heads * self.slots.tokens * (head_dim + self.window_v.shape[3]) * self.dtype.itemsize


class LogQuantCache(Cache):
    """A KV cache that keeps old tokens in 2 bits and a few hundred exact ones, dense near the end.

    Use it where a ``DynamicCache`` would be used; layers with full attention are LogQuant layers, all others (sliding
    windows, linear attention) what transformers would have made::

        cache = LogQuantCache(model.config)
        model.generate(**inputs, past_key_values=cache)

    Args:
        config: the model's configuration.
        quantization: what to keep exact and how to store the rest.
        **options: fields of :class:`logquant.LogQuantConfig` given directly, as in ``LogQuantCache(config, bits=4)``.

    Raises:
        TypeError: ``quantization`` together with ``options``, or an unknown option.
        ValueError: an invalid option, or a head dimension that pages cannot hold.
    """

    def __init__(self, config: PreTrainedConfig, quantization: LogQuantConfig | None = None, **options: Any) -> None:
        if quantization is not None and options:
            raise TypeError(f"give either quantization or its fields, got both: {', '.join(options)}")
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be the model's configuration (model.config), got {type(config).__name__}")
        self.quantization = quantization or LogQuantConfig(**options)
        head_dim = getattr(config.get_text_config(decoder=True), "head_dim", None)
        if head_dim:
            self.quantization.page_format(head_dim)
        slots = Slots(self.quantization.window, self.quantization.rule, self.quantization.sink_tokens)
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                LogQuantLayer(self.quantization, slots) if type(layer) is DynamicLayer else layer for layer in layers
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the cache holds."""
        own = [layer for layer in self.layers if isinstance(layer, LogQuantLayer)]
        shared = {id(layer.slots): layer.slots.nbytes for layer in own}
        return sum(layer.nbytes for layer in own) + sum(shared.values()) + self._other_nbytes

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes a ``DynamicCache`` holds after the same tokens."""
        own = [layer for layer in self.layers if isinstance(layer, LogQuantLayer)]
        return sum(layer.full_precision_nbytes for layer in own) + self._other_nbytes

    @property
    def _other_nbytes(self) -> int:
        others = [layer for layer in self.layers if not isinstance(layer, LogQuantLayer)]
        return sum(t.nbytes for layer in others for t in vars(layer).values() if isinstance(t, Tensor))
