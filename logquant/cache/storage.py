"""The tensors of a layer: the exact window and the page store, their growth, and who shares them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from ..attention.units import AS_THEY_ARE, Units
from ..attention.view import unpacked
from ..config import LogQuantConfig
from ..format import DTYPES, PageFormat
from ..modes import lasting
from ..recall.index import PageIndex
from ..residual.state import Residual
from .layout import Rows
from .sizes import store_pages, window_slots

NO_GRAPH = sys.maxsize
Shape = tuple[tuple[int, ...], torch.dtype]


class Allocator:
    """Allocates the stores of all layers together, for the first layer that packs a prompt.

    Small tensors that live long, made one by one between the large ones of each layer's computation, would keep torch's
    allocator from giving those back.

    Args:
        settings: those of each layer; layers that follow each other with equal ones are expected to need equal stores.
    """

    def __init__(self, settings: Iterable[object] = ()) -> None:
        runs = [len(list(run)) for _, run in groupby(settings)]
        # Of each layer how many follow with its settings, itself among them, if it is the first of them.
        self._runs = [count if i == 0 else 0 for count in runs for i in range(count)]
        self._taken = 0
        self._key: tuple[torch.device, list[Shape]] | None = None
        self._stores: list[list[Tensor]] = []

    @lasting
    def take(self, like: Tensor, shapes: list[Shape]) -> list[Tensor]:
        """New tensors of these shapes and dtypes on the device of ``like``: a page store, and then others."""
        key = like.device, shapes
        run = self._runs[self._taken] if self._taken < len(self._runs) else 0
        self._taken += 1
        if run or self._key != key:
            self._stores = []
            self._key, self._stores = key, [self._new(like, shapes) for _ in range(run)]
        return self._stores.pop() if self._stores else self._new(like, shapes)

    def _new(self, like: Tensor, shapes: list[Shape]) -> list[Tensor]:
        (pages, _), *windows = shapes
        return [self.pages(like, pages), *(like.new_empty(shape, dtype=dtype) for shape, dtype in windows)]

    def pages(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A new page store, int32, on the device of ``like``."""
        return like.new_empty(shape, dtype=torch.int32)

    def forget(self) -> None:
        """The next layer that asks is the first one."""
        self._key, self._stores, self._taken = None, [], 0


class Storage:
    """Exact tokens ``window_k`` ``[B, H, slots, D]``, ``window_v`` ``[B, H, slots, Dv]`` and ``pages`` int32
    ``[B, H, pages, words]``; where tokens are in them is for :class:`Rows` to say.

    Copies share the page store until one of them writes to it.

    Args:
        config: the cache's settings.
        fmt: the page format.
        window_k, window_v, pages: the tensors.
        units: those that keys and values are in.
        index: of the pages, where a query chooses among them by one; it may be of more pages than hold tokens.
        residual: what is left of dropped tokens, where something is to be.

    Attributes:
        graph_start: the first position whose token belongs to a graph of autograd.
        severed: whether such tokens are in the pages, through which no gradient flows.
    """

    def __init__(
        self,
        config: LogQuantConfig,
        fmt: PageFormat,
        window_k: Tensor,
        window_v: Tensor,
        pages: Tensor,
        units: Units = AS_THEY_ARE,
        index: PageIndex | None = None,
        residual: Residual | None = None,
    ) -> None:
        self.config, self.format = config, fmt
        self.window_k, self.window_v = window_k, window_v
        self.units, self.index, self.residual = units, index, residual
        self.graph_start = NO_GRAPH
        self.severed = False
        self._own(pages)

    @staticmethod
    @lasting
    def empty(config: LogQuantConfig, fmt: PageFormat, keys: Tensor, values: Tensor, layer: int) -> Storage:
        """For tokens like these of layer ``layer``, ``[B, H, n, D]`` and ``[B, H, n, Dv]``."""
        batch, heads, _, head_dim = keys.shape
        return Storage(
            config,
            fmt,
            keys.new_empty(batch, heads, 0, head_dim),
            values.new_empty(batch, heads, 0, values.shape[-1]),
            keys.new_empty(batch, heads, 0, fmt.words, dtype=torch.int32),
            index=PageIndex.empty(keys) if _keeps_means(config, layer) else None,
            residual=Residual.empty(config, layer, keys, values),
        )

    def _own(self, pages: Tensor) -> None:
        """``pages`` becomes this storage's page store, and nobody else's."""
        if (sharers := getattr(self, "_sharers", None)) is not None:
            sharers.discard(self)
        self.pages = pages
        self._sharers: weakref.WeakSet[Storage] = weakref.WeakSet([self])

    def replace(self, pages: Tensor, window_k: Tensor, window_v: Tensor) -> None:
        """Other tensors, some of which may be those that are here."""
        if pages is not self.pages:
            self._own(pages)
        self.window_k, self.window_v = window_k, window_v

    @property
    def holders(self) -> weakref.WeakSet[Storage]:
        """Those that hold this page store now; the set goes on to say so when this one holds another."""
        return self._sharers

    def used_pages(self, rows: Rows) -> Tensor:
        """The pages that hold tokens, int32 ``[B, H, P, words]``."""
        pages = rows.packed // self.format.page_tokens
        return self.pages if pages == self.pages.shape[2] else self.pages[:, :, :pages]

    # ------------------------------------------------------------------------------------------------------- growth
    def pages_with_room(self, rows: Rows, packed: int, allocator: Allocator) -> Tensor:
        """The page store if it has room for ``packed`` tokens and is nobody else's, or a larger copy that is."""
        pages = packed // self.format.page_tokens
        if pages <= self.pages.shape[2] and len(self._sharers) == 1:
            return self.pages
        return self._larger_pages(rows, pages, allocator)

    @lasting
    def _larger_pages(self, rows: Rows, pages: int, allocator: Allocator) -> Tensor:
        batch, heads, _, words = self.pages.shape
        used = rows.packed // self.format.page_tokens
        store = allocator.pages(self.pages, (batch, heads, store_pages(pages), words))
        store[:, :, :used] = self.pages[:, :, :used]
        return store

    @property
    def in_graph(self) -> bool:
        """Whether exact tokens belong to a graph of autograd, so that nothing may be written over them."""
        return self.window_k.requires_grad or self.window_v.requires_grad

    def window_with_room(self, rows: Rows, tokens: int, apart: bool = False) -> tuple[Tensor, Tensor]:
        """The window if it has room for ``tokens`` tokens and need not be ``apart``, or a (larger) copy."""
        slots = self.window_k.shape[2]
        if tokens <= slots and not apart:
            return self.window_k, self.window_v
        return self._larger_window(rows, tokens)

    @lasting
    def _larger_window(self, rows: Rows, tokens: int) -> tuple[Tensor, Tensor]:
        slots = self.window_k.shape[2]
        capacity = slots if tokens <= slots else max(tokens, window_slots(self.config, tokens))
        used = min(rows.exact, self.window_k.shape[2])
        grown_k, grown_v = (w.new_empty(*w.shape[:2], capacity, w.shape[3]) for w in (self.window_k, self.window_v))
        grown_k[:, :, :used] = self.window_k[:, :, :used]
        grown_v[:, :, :used] = self.window_v[:, :, :used]
        return grown_k, grown_v

    def append(self, rows: Rows, keys: Tensor, values: Tensor, *, in_window: bool) -> tuple[Tensor, Tensor]:
        """Write new tokens right after each row's exact ones.

        Args:
            rows: where tokens are.
            keys, values: the new tokens, as they came.
            in_window: into the window itself; else into tensors of their own, which hold a copy of it.

        Returns:
            Keys ``[B, H, exact + n, D]`` and values ``[B, H, exact + n, Dv]``.
        """
        tokens = rows.exact + keys.shape[2]
        if self.units != AS_THEY_ARE:
            keys, values = self.units.inside(keys, values)
        if in_window:
            window_k, window_v = self.window_with_room(rows, tokens)
            into_k, into_v = window_k[:, :, :tokens], window_v[:, :, :tokens]
        else:
            into_k, into_v = (x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in (keys, values))
            into_k[:, :, : rows.exact] = self.window_k[:, :, : rows.exact]
            into_v[:, :, : rows.exact] = self.window_v[:, :, : rows.exact]
        _write_after(into_k, keys, rows)
        _write_after(into_v, values, rows)
        if in_window:
            self.window_k, self.window_v = window_k, window_v
        return into_k, into_v

    # ---------------------------------------------------------------------------------------------- copies and moves
    @lasting
    def copy(self) -> Storage:
        """A storage with a window of its own and the same page store."""
        return self._with(self.window_k.clone(), self.window_v.clone(), self.pages, self.index, self.residual)

    def snapshot(self) -> Storage:
        """A storage with the same tensors; nothing is written over what it holds of the pages."""
        return self._with(self.window_k, self.window_v, self.pages, self.index, self.residual)

    def _with(
        self,
        window_k: Tensor,
        window_v: Tensor,
        pages: Tensor,
        index: PageIndex | None,
        residual: Residual | None,
    ) -> Storage:
        """Another storage with these tensors; it shares the page store, if that is the same."""
        twin = Storage(self.config, self.format, window_k, window_v, pages, self.units, index, residual)
        twin.graph_start, twin.severed = self.graph_start, self.severed
        if pages is self.pages:
            twin._sharers = self._sharers
            self._sharers.add(twin)
        return twin

    @lasting
    def map(self, function: Callable[[Tensor], Tensor]) -> Storage:
        """Another storage, with ``function`` applied to every tensor."""
        index = self.index and self.index.map(function)
        residual = self.residual and self.residual.map(function)
        return self._with(function(self.window_k), function(self.window_v), function(self.pages), index, residual)

    @lasting
    def crop(
        self, before: Rows, after: Rows, sources: list[Tensor], key_map: Tensor | None, allocator: Allocator
    ) -> None:
        """Hold the tokens of ``after``, a crop of ``before``: those that are packed and come back are dequantised.

        Args:
            before, after: where tokens are, and where they will be.
            sources: for each exact token of ``after`` the slot that holds it in ``before``, of each row or of all.
            key_map: the bit allocation of the keys.
            allocator: of a smaller page store.
        """
        page_tokens, batch = self.format.page_tokens, self.window_k.shape[0]
        device, dtype = self.window_k.device, self.window_k.dtype
        rows = before.each(len(sources))
        pages_left = after.packed // page_tokens
        store, windows = self.pages, (self.window_k, self.window_v)
        if 2 * pages_left < store.shape[2]:
            left = store[:, :, :pages_left]
            store = allocator.pages(store, tuple(left.shape)).copy_(left)
        index = self.index
        if index is not None and pages_left < index.pages:
            index = index.resized(pages_left)
        if any((source < held.packed).any() for held, source in zip(rows, sources, strict=True)):
            window_k, window_v = (w.clone() for w in self.window_with_room(before, after.exact))
            for row, (held, source) in enumerate(zip(rows, sources, strict=True)):
                of = slice(0, batch) if len(sources) == 1 else slice(row, row + 1)
                returns = (source < held.packed).nonzero().squeeze(1)
                pages, place = (source[returns] // page_tokens).unique(return_inverse=True)
                place = (place * page_tokens + source[returns] % page_tokens).to(device)
                used = self.pages[of].index_select(2, pages.to(self.pages.device)).to(device)
                own_map = None if key_map is None else key_map[of]
                packed = unpacked(used, self.format, dtype, own_map, severed=self.severed)
                stays = (source[source >= held.packed] - held.packed).to(device)
                to_return, to_stay = returns.to(device), (source >= held.packed).nonzero().squeeze(1).to(device)
                for window, old, back in zip((window_k, window_v), (self.window_k, self.window_v), packed, strict=True):
                    window[of].index_copy_(2, to_stay, old[of].index_select(2, stays))
                    window[of].index_copy_(2, to_return, back.index_select(2, place))
            windows = window_k, window_v
        self.index = index
        # Only a crop of everything brings back what was dropped.
        self.residual = self.residual and self.residual.keeping([slots.evicted > 0 for slots in after.slots])
        self.replace(store, *windows)

    @lasting
    def offload(self) -> None:
        """Move the pages to the CPU's memory; the exact tokens stay."""
        self._own(self.pages.to("cpu", non_blocking=True))

    @lasting
    def prefetch(self) -> None:
        """Move offloaded pages back."""
        if self.pages.device != self.window_k.device:
            self._own(self.pages.to(self.window_k.device, non_blocking=True))

    def state(self, rows: Rows) -> dict[str, Tensor]:
        """The parts of the tensors that hold something, by name."""
        pages, *windows = self.used_pages(rows), *(w[:, :, : rows.exact] for w in (self.window_k, self.window_v))
        index = self.index and self.index.resized(pages.shape[2])
        if not rows.alike:
            # Slots of shorter rows are empty: whatever lies there is nobody's business.
            pages, *windows = (t.clone() for t in (pages, *windows))
            for row, slots in enumerate(rows.slots):
                for of_pages in (pages, *(index or ())):
                    of_pages[row, :, slots.packed // self.format.page_tokens :] = 0
                for window in windows:
                    window[row, :, slots.exact :] = 0
        tensors = dict(zip(("pages", "window_k", "window_v"), (pages, *windows), strict=True))
        tensors |= self.residual.state() if self.residual else {}
        return tensors | (index.state() if index else {})

    @staticmethod
    def restored(
        config: LogQuantConfig,
        rows: Rows | None,
        layer: int,
        tensors: Mapping[str, Tensor],
        units: Units = AS_THEY_ARE,
    ) -> Storage:
        """What :meth:`state` gave.

        Raises:
            ValueError: tensors that do not fit each other, the cache's settings or ``rows``.
        """
        if missing := sorted({"pages", "window_k", "window_v"} - tensors.keys()):
            raise ValueError(f"a layer must have pages, window_k and window_v, lacks {', '.join(missing)}")
        pages, window_k, window_v = (tensors[name] for name in ("pages", "window_k", "window_v"))
        if any(t.dim() != 4 for t in (pages, window_k, window_v)):
            raise ValueError("pages, window_k and window_v must have four dimensions")
        fmt = config.page_format(window_k.shape[3], window_v.shape[3])
        batch, heads, exact, _ = window_k.shape
        if not (
            rows is not None
            and (rows.alike or len(rows.slots) == batch)
            and exact == rows.exact
            and window_v.shape[:3] == window_k.shape[:3]
            and pages.shape == (batch, heads, 0 if config.evict else rows.packed // fmt.page_tokens, fmt.words)
            and pages.dtype == torch.int32
            and window_k.dtype == window_v.dtype
            and window_k.dtype in DTYPES
        ):
            raise ValueError(
                f"pages {list(pages.shape)}, window_k {list(window_k.shape)} and window_v {list(window_v.shape)} do "
                "not fit each other and the settings of the cache"
            )
        index = PageIndex.restored(tensors, pages, fmt.head_dim) if _keeps_means(config, layer) else None
        residual = Residual.empty(config, layer, window_k, window_v)
        residual = residual and residual.restored(tensors)
        return Storage(config, fmt, window_k, window_v, pages, units, index, residual)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_sharers"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._own(self.pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; a page store that copies share counts for each."""
        others = sum(part.nbytes for part in (self.index, self.residual) if part)
        return self.window_k.nbytes + self.window_v.nbytes + self.pages.nbytes + others


def _keeps_means(config: LogQuantConfig, layer: int) -> bool:
    """Whether a layer chooses among its pages by their mean keys."""
    spec = config.recall_spec(layer)
    return spec is not None and spec.uses_means


def _write_after(into: Tensor, new: Tensor, rows: Rows) -> None:
    """Write new tokens right after each row's exact ones."""
    if rows.alike:
        into[:, :, rows.exact : rows.exact + new.shape[2]] = new
        return
    slot = rows.exact_counts(into.device)[:, None] + torch.arange(new.shape[2], device=into.device)
    into[torch.arange(len(into), device=into.device)[:, None], :, slot] = new.transpose(1, 2)


def check_states(key_states: Tensor, value_states: Tensor, held: Storage | None) -> None:
    """Refuse new tokens that cannot be kept.

    Args:
        key_states, value_states: the new tokens.
        held: where those before them are, if there are any.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: another shape or device than before.
    """
    if key_states.dtype not in DTYPES or value_states.dtype not in DTYPES:
        name, bad = ("value", value_states) if key_states.dtype in DTYPES else ("key", key_states)
        raise TypeError(f"{name}_states must be float32, float16 or bfloat16, got {bad.dtype}")
    if value_states.device != key_states.device:
        raise ValueError(
            f"value_states must be on the device of key_states, got {value_states.device} and {key_states.device}"
        )
    if key_states.dim() != 4 or value_states.dim() != 4 or key_states.shape[:3] != value_states.shape[:3]:
        raise ValueError(
            "key_states and value_states must be [batch, heads, tokens, dim] and agree in all but dim, got "
            f"{list(key_states.shape)} and {list(value_states.shape)}"
        )
    if held is None:
        return
    if key_states.device != held.window_k.device:
        raise ValueError(f"key_states must stay on {held.window_k.device}, got {key_states.device}")
    for name, new, window in (("key_states", key_states, held.window_k), ("value_states", value_states, held.window_v)):
        if new.shape[:2] != window.shape[:2] or new.shape[3] != window.shape[3]:
            need = f"[{window.shape[0]}, {window.shape[1]}, tokens, {window.shape[3]}]"
            raise ValueError(f"{name} must be {need} like the tokens before them, got {list(new.shape)}")
