"""What a forward pass of a batch reads and writes: a pure function of how many tokens each request has and gets.

A query at position t sees the tokens of its own page t // 64 up to itself and of the two pages before exactly, all
earlier pages packed, and the sinks exactly. So what it sees depends on its position alone: not on how the scheduler cut
a prompt, on what else was in the batch, or on whether a prefix was found in the cache.

Queries are attended in *rows*: those of one request within one page, which all see the same pages.

Everything that depends on numbers alone is computed on the CPU, where vLLM has them, once for all layers; only block
tables are looked up on the device, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .layout import EXACT, PAGE, BlockLayout, Ints


class Batch(NamedTuple):
    """A batch as vLLM gives it.

    Attributes:
        starts: int ``[requests + 1]``, on the CPU: the first query of each request, and the end of the last.
        lengths: int ``[requests]``, on the CPU: tokens of each request, this step's included.
        packed: int32 ``[requests, n]``, the block table of packed tokens.
        exact: int32 ``[requests, n]``, that of exact tokens; blocks that have been given back are not looked up.
        slots: int64 ``[>= queries]``, where each token's exact keys and values go: block times PAGE, plus place.
    """

    starts: Ints
    lengths: Ints
    packed: Tensor
    exact: Tensor
    slots: Tensor


class Rows(NamedTuple):
    """Rows with as many queries, or padded to as many: one call of ``attend``.

    Attributes:
        tokens: int64 ``[R, L]``, the query tokens, those of padding being any; None: row i is token i, and L is 1.
        flat: int64 ``[n]``, of the ``R * L`` queries those that are real; None: all are.
        out: int64 ``[n]``, their tokens; None: as ``tokens``.
        window: int64 ``[R, H, N]``, the exact tokens of each row and KV head (``Pool.tokens``): sinks, then others.
        pages: int32 ``[R, P]``, the packed ones (``Pool.store``).
        positions: int32 ``[1, P * PAGE + N]``: 0 for tokens of pages, the slot for those of windows.
        query_positions: int32 ``[R, L]``, the slot of its own token, -1 for padding; None: its row ends there.
        lengths: int32 ``[R, 2]``: pages and window slots in use.
    """

    tokens: Tensor | None
    flat: Tensor | None
    out: Tensor | None
    window: Tensor
    pages: Tensor
    positions: Tensor
    query_positions: Tensor | None
    lengths: Tensor


class Due(NamedTuple):
    """Pages to be made, n of them, of all requests.

    Attributes:
        source: int64 ``[n]``, the exact block of each page's tokens.
        block, page: int64 ``[n]``, where the page goes.
        tokens: int64 ``[n, queries]``, the query tokens that say how, where they are of this step.
        here: bool ``[n, queries]``, whether they are; others were kept.
        seen: bool ``[n, queries, PAGE]``, which of the page's tokens each of them may see and count: no sinks.
        first: int64 ``[k]``, which of the n pages are the first of a sequence, with the sinks; None: none is.
    """

    source: Tensor
    block: Tensor
    page: Tensor
    tokens: Tensor
    here: Tensor
    seen: Tensor
    first: Tensor | None


class Kept(NamedTuple):
    """Queries of this step that say how a page of a later one is quantised.

    Attributes:
        tokens: int64 ``[n]``.
        block, slot: int64 ``[n]``, where they are kept (``Pool.queries``).
    """

    tokens: Tensor
    block: Tensor
    slot: Tensor


class Step(NamedTuple):
    """A forward pass of a batch.

    Attributes:
        tokens: query tokens.
        block, place: int64 ``[tokens]``, where each token's exact keys and values go.
        due: the pages to make, or None.
        kept: the queries to keep, or None.
        rows: what attends, in at most two calls.
    """

    tokens: int
    block: Tensor
    place: Tensor
    due: Due | None
    kept: Kept | None
    rows: tuple[Rows, ...]

    @staticmethod
    def of(batch: Batch, layout: BlockLayout, heads: int) -> Step:
        """The step of a batch.

        Args:
            batch: of vLLM.
            layout: of the blocks.
            heads: KV heads.
        """
        count = int(batch.starts[-1])
        # Those of a batch that is there for its shape alone are -1: they go to block 0, which holds nothing.
        slots = batch.slots[:count].clamp_min(0).long()
        computed = batch.lengths - np.diff(batch.starts)
        rows = _Rows.of(batch, computed)
        single = rows.queries == 1
        parts = [rows] if single.all() or not single.any() else [rows.where(single), rows.where(~single)]
        return Step(
            count,
            slots // PAGE,
            slots % PAGE,
            _due(batch, computed, layout),
            _kept(batch, computed, layout),
            tuple(part.on_device(batch, layout, heads, count) for part in parts if len(part.request)),
        )


def _ranges(counts: Ints) -> tuple[Ints, Ints]:
    """For each of so many things the index of its count, and its number among those: [2, 3] gives 00111 and 01012."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def to_device(array: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    """Numbers on the device of another tensor, without waiting for it."""
    numbers = torch.from_numpy(np.ascontiguousarray(array))
    # From pageable memory a GPU would copy only when it has nothing else to do, and the CPU would wait.
    return (numbers.pin_memory() if like.is_cuda else numbers).to(like.device, non_blocking=True)


class _Rows(NamedTuple):
    """Rows as numbers: of each the request, the page of its queries, their first position, number and first token."""

    request: Ints
    own: Ints
    position: Ints
    queries: Ints
    token: Ints

    @staticmethod
    def of(batch: Batch, computed: Ints) -> _Rows:
        first, last = computed // PAGE, (batch.lengths - 1) // PAGE
        request, i = _ranges(np.where(batch.lengths > computed, last - first + 1, 0))
        own = first[request] + i
        position = np.maximum(own * PAGE, computed[request])
        queries = np.minimum((own + 1) * PAGE, batch.lengths[request]) - position
        return _Rows(request, own, position, queries, batch.starts[request] + position - computed[request])

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Rows:
        return _Rows(*(x[chosen] for x in self))

    def on_device(self, batch: Batch, layout: BlockLayout, heads: int, count: int) -> Rows:
        rows, most = len(self.request), int(self.queries.max())
        like, request = batch.packed, to_device(self.request, batch.packed)

        # The window: the sinks, once they are in no exact block of the row any more, and the tokens after the pages.
        packed = np.maximum(self.own - (EXACT - 1), 0)[:, None]  # pages of each row
        sinks = np.where(packed > 0, layout.sinks, 0)
        first = packed * PAGE - sinks  # what slot 0 would hold, were there no sinks
        slot = np.arange(layout.sinks + min(EXACT, self.own.max() + 1) * PAGE)
        is_sink, token = slot < sinks, first + slot
        number = np.where(is_sink, 0, np.minimum(token // PAGE, self.own[:, None]))
        place = np.where(is_sink, slot + PAGE - layout.sinks, token % PAGE)
        exact = batch.exact[request[:, None], to_device(number, like)]
        block = torch.where(to_device(is_sink, like), batch.packed[request, :1], exact).long()
        head = torch.arange(heads, device=like.device)[:, None]
        window = (block[:, None] * heads + head) * PAGE + to_device(place, like)[:, None]

        # The pages.
        pages = np.arange(packed.max())
        used = pages < packed
        owner = batch.packed[request[:, None], to_device(np.where(used, pages // layout.pages, 0), like)]
        within = np.where(used, pages % layout.pages * (layout.fmt.words // layout.unit), 0).astype(np.int32)
        table = owner * (heads * layout.words // layout.unit) + to_device(within, like)

        # A query sees all pages, but for what stands there for the sinks, and the window up to its own token.
        in_pages = np.zeros(len(pages) * PAGE, np.int64)
        in_pages[layout.sink_slots[: len(in_pages)]] = -1
        positions = np.concatenate([in_pages, slot])[None]
        lengths = np.concatenate([packed, (self.position + self.queries)[:, None] - first], 1)

        tokens = flat = out = query_positions = None
        if most > 1:
            i = np.arange(most)
            real = i < self.queries[:, None]
            every = self.token[:, None] + i
            own = self.position[:, None] + i - first
            query_positions = to_device(np.where(real, own, -1).astype(np.int32), like)
            tokens = to_device(np.where(real, every, self.token[:, None]), like)
            flat, out = to_device(np.flatnonzero(real), like), to_device(every[real], like)
        elif rows < count or (self.token[1:] < self.token[:-1]).any():
            tokens = to_device(self.token[:, None], like)
        return Rows(
            tokens,
            flat,
            out,
            window,
            table,
            to_device(positions.astype(np.int32), like),
            query_positions,
            to_device(lengths.astype(np.int32), like),
        )


def _due(batch: Batch, computed: Ints, layout: BlockLayout) -> Due | None:
    """The pages that can be made once this step's tokens are there."""
    # When c pages of tokens are full, page c - 3 is made; when they end a block, its last three are.
    request, i = _ranges(batch.lengths // PAGE - computed // PAGE)
    full = computed[request] // PAGE + 1 + i
    page = full[:, None] - EXACT + np.arange(EXACT)
    ends = full % layout.pages == 0
    made = (page // layout.pages == (full[:, None] - 1) // layout.pages) & ((np.arange(EXACT) == 0) | ends[:, None])
    which, k = np.nonzero(made)
    if not len(which):
        return None
    request, full, page = request[which], full[which], page[which, k]
    position = full[:, None] * PAGE - layout.queries + np.arange(layout.queries)
    here = position >= computed[request][:, None]
    token = np.where(here, batch.starts[request][:, None] + position - computed[request][:, None], 0)
    of_page = page[:, None] * PAGE + np.arange(PAGE)
    seen = (of_page[:, None] <= position[..., None]) & (of_page >= layout.sinks)[:, None]
    first = np.flatnonzero(page == 0) if layout.sinks else np.empty(0)
    like = batch.packed
    at = to_device(request, like)
    return Due(
        batch.exact[at, to_device(page, like)].long(),
        batch.packed[at, to_device(page // layout.pages, like)].long(),
        to_device(page % layout.pages, like),
        to_device(token, like),
        to_device(here, like),
        to_device(seen, like),
        to_device(first, like) if len(first) else None,
    )


def _kept(batch: Batch, computed: Ints, layout: BlockLayout) -> Kept | None:
    """The newest queries, if a page waits for them and those that follow."""
    asking, full = np.arange(len(computed)), batch.lengths // PAGE  # the page that is being filled has this number
    if layout.drafts:
        # If the tokens that begin another page are taken back, then the page before is being filled again.
        short = (computed // PAGE < full) & (batch.lengths - computed <= layout.most_drafts + 1)
        asking = np.concatenate([asking, np.flatnonzero(short)])
        full = np.concatenate([full, computed[short] // PAGE])
    after = full % layout.pages + 1  # of its block
    waits = (after >= EXACT) | (after == layout.pages)
    begin = (full + 1) * PAGE - layout.queries
    first, end = np.maximum(begin, computed[asking]), np.minimum((full + 1) * PAGE, batch.lengths[asking])
    which, i = _ranges(np.where(waits, np.maximum(end - first, 0), 0))
    if not len(which):
        return None
    request, position = asking[which], first[which] + i
    like = batch.packed
    block = batch.packed[to_device(request, like), to_device(full[which] // layout.pages, like)].long()
    token = batch.starts[request] + position - computed[request]
    return Kept(to_device(token, like), block, to_device(position - begin[which], like))
