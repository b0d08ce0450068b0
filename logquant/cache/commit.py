"""Tokens take their places: those that the rule says go into pages, the others into the window."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..attention.view import Layout
from ..ops.reference import by_rank
from ..pruning.prompt import Prompt, choose
from ..quantizer.advice import Advice, Leaving
from ..quantizer.feedback import Attention, select
from ..quantizer.queries import MAP_QUERIES, RecentQueries
from ..recall.clusters import clusters
from ..recall.index import PageIndex
from ..rule import evicted_slots
from .chosen import importance_by_head
from .layout import Move, Rows
from .ragged import Ragged
from .sizes import window_capacity, window_slots
from .storage import Allocator, Storage
from .uncommitted import Exact

# Pages are quantised in portions of about this size, so that a long prompt's never exist twice.
_PORTION_NBYTES = 1 << 20
# And their mean keys, and what is left of those that are dropped, of so many tokens at a time, a multiple of a page's.
_PORTION_TOKENS = 1 << 10


class Commit:
    """One change of what a layer holds, in two parts: all that may run out of memory, then the writing.

    Making one quantises into pages that hold nothing yet and copies what stays, so an error leaves the layer as it was.
    :meth:`write` then changes what is held, and cannot be undone.

    Args:
        storage: the layer's tensors.
        exact: exact tokens and new ones, in the layer's own window or laid out like it.
        moves: what becomes of the tokens of which rows.
        before, after: the rows now and afterwards.
        layout: which of their tokens are where now.
        advice: what is known about the tokens.
        given: ``[B, H, N]``, what they have been given by queries, where that is counted.
        padded: whether some of the new positions hold no token.
        allocator: of the stores of all layers.
        asked: the queries of all new positions; None if they are not known.
        ragged: the pages, where ``evict`` drops tokens, and what is known of the exact and new ones.

    Attributes:
        ragged: the same afterwards.

    Raises:
        RuntimeError: KV heads are to choose tokens of a prompt for themselves, and its queries are not known.
    """

    def __init__(
        self,
        storage: Storage,
        exact: Exact,
        moves: list[Move],
        before: Rows,
        after: Rows,
        layout: Layout,
        advice: Advice,
        given: Tensor | None,
        padded: bool,
        allocator: Allocator,
        asked: RecentQueries | None = None,
        ragged: Ragged | None = None,
    ) -> None:
        self._storage, self._given, self.ragged = storage, given, ragged
        self._residual = storage.residual
        keys, values, in_window = exact.keys.detach(), exact.values.detach(), exact.in_window
        moves = [self._by_head(keys, values, m, padded, asked) if m.by_head else m for m in moves]
        # One step of the rule on the window is done in place.
        self._steps = [m for m in moves if in_window and m.is_step and ragged is None]
        others = [m for m in moves if not (in_window and m.is_step and ragged is None)]
        if self._steps:
            storage.prefetch()
        self._make_room(exact, before, after, allocator)
        # One move after the other: what a row's tokens are taken out into, for padding, exists for one row at a time.
        first = (m for m in moves if m.packed == 0 and m.leaving.shape[1])
        self.advice = advice.allocate(self._leaving(keys, m, padded) for m in first)
        self._step_options = [self._options(m, self._attention(keys, m, padded), slice(None)) for m in self._steps]
        if ragged is None:
            for m in moves:
                self._absorb(keys, values, m)
            for m in others:
                self._quantize(self._pages[m.rows], m.packed, keys, values, m, self._attention(keys, m, padded))
        else:
            self.ragged = self._judged(ragged, keys, values, others, after, padded)
        self._index = storage.index and self._indexed(storage.index, keys, moves, after)
        self._stays = [
            (m.rows, _staying(x[m.rows], m), window)
            for m in others
            if not (in_window and m.staying is None)
            for x, window in ((exact.keys, self._window_k), (exact.values, self._window_v))
        ]
        self._severs = exact.in_graph and self._takes_from_graph(exact, moves, before, layout)

    def _takes_from_graph(self, exact: Exact, moves: list[Move], before: Rows, layout: Layout) -> bool:
        """Whether tokens leave that belong to a graph of autograd."""
        batch, _, slots, _ = exact.keys.shape
        positions = layout.positions(torch.device("cpu"), slots - before.exact)[:, before.packed :].expand(batch, -1)
        leaving = (positions[m.rows].gather(1, _of_rows(m.leaving.cpu(), positions[m.rows])) for m in moves)
        return any(bool((at >= self._storage.graph_start).any()) for at in leaving)

    def write(self) -> None:
        """Carry it out."""
        for m, options in zip(self._steps, self._step_options, strict=True):
            self._evict(m, options)
        for rows, stay, window in self._stays:
            window[rows, :, : stay.shape[2]] = stay
        self._storage.replace(self._pages, self._window_k, self._window_v)
        self._storage.index, self._storage.residual = self._index, self._residual
        self._storage.severed |= self._severs

    def _indexed(self, index: PageIndex, keys: Tensor, moves: list[Move], after: Rows) -> PageIndex:
        """The index with the pages of the tokens that leave."""
        page_tokens = self._storage.format.page_tokens
        pages = after.packed // page_tokens
        leaves = [m for m in moves if m.leaving.shape[1]]
        if not leaves:
            return index if index.pages == pages else index.resized(pages)
        index = index.resized(pages)
        for m in leaves:
            for first in range(0, m.packs, _PORTION_TOKENS):
                packing = m.packing[..., first : first + _PORTION_TOKENS]
                own = PageIndex.of(select(keys[m.rows], packing), page_tokens)
                index.write(m.rows, (m.packed + first) // page_tokens, own)
        return index

    def _make_room(self, exact: Exact, before: Rows, after: Rows, allocator: Allocator) -> None:
        """A page store and a window with room for the tokens afterwards, that hold what they hold now."""
        storage, (keys, values, in_window) = self._storage, exact
        stored = 0 if self.ragged else after.packed
        pages, slots = storage.pages.shape[2], storage.window_k.shape[2]
        has_room = stored <= pages * storage.format.page_tokens and after.exact <= slots
        if in_window or before.length or has_room:
            grows = stored > before.packed
            self._pages = storage.pages_with_room(before, after.packed, allocator) if grows else storage.pages
            self._window_k, self._window_v = storage.window_with_room(
                before, after.exact, apart=exact.in_graph or storage.in_graph
            )
            return
        config, fmt = storage.config, storage.format
        slots = max(after.exact, window_slots(config, window_capacity(config) if after.packed else after.exact))
        shape = keys.shape[:2]
        self._pages, self._window_k, self._window_v = allocator.take(
            keys,
            [
                ((*shape, stored // fmt.page_tokens, fmt.words), storage.pages.dtype),
                ((*shape, slots, keys.shape[3]), keys.dtype),
                ((*shape, slots, values.shape[3]), values.dtype),
            ],
        )

    def _attention(self, keys: Tensor, move: Move, padded: bool) -> Attention | None:
        """How the recent queries attend to the tokens that leave, if that is known and some do."""
        if self.advice.queries is None or not move.leaving.shape[1]:
            return None
        # The first time, all that were kept to allocate bits.
        queries = MAP_QUERIES if self._given is not None and move.packed == 0 else None
        return self.advice.attention(self._leaving(keys, move, padded), queries)

    def _leaving(self, keys: Tensor, move: Move, padded: bool) -> Leaving:
        """Tokens that become packed, among the keys of a move's tokens without padding, in order."""
        given = None
        if self._given is not None:
            given = select(self._given[move.rows].unsqueeze(-1), move.packing).squeeze(-1)
        if not padded or move.staying is None:
            return Leaving(move.rows, keys[move.rows, :, : move.tokens], move.packing, given)
        slots = torch.cat([move.leaving, move.staying], 1).sort(1).values
        found = torch.searchsorted(slots[0], move.packing).int()  # a row with padding moves by itself
        return Leaving(move.rows, select(keys[move.rows], slots), found, given)

    def _by_head(self, keys: Tensor, values: Tensor, move: Move, padded: bool, asked: RecentQueries | None) -> Move:
        """The move of a prompt with what each KV head has chosen: which tokens become packed, and in which order."""
        config = self._storage.config
        if asked is None:
            raise RuntimeError(
                "prune and order=clusters have each KV head choose among the tokens of a prompt, so attention must go "
                "by what the cache holds, and tell its queries, and has not: "
                'model.set_attn_implementation("logquant") (or "sdpa") does both, in a model that computes nothing '
                "itself with what the cache returns"
            )
        kept = move.leaving.long()[:, None].expand(keys[move.rows].shape[0], keys.shape[1], -1)
        if move.packs < kept.shape[2]:
            spec, leaving = config.prune_spec(), self._leaving(keys, move, padded)
            assert spec is not None
            newest = asked.map(lambda t: t[move.rows]).keep(min(max(1, spec.pruner.queries), leaving.keys.shape[2]))
            prompt = Prompt(newest.query, leaving.keys, asked.scale, asked.softcap)
            kept = kept.gather(2, choose(spec.pruner, prompt, leaving.tokens, move.packs))
        if config.clusters:
            kept = clusters(keys[move.rows], kept, config.page_size)
            if self._given is not None:
                weight = importance_by_head(self._given[move.rows], values[move.rows])
                kept = by_rank(kept, weight.gather(2, kept), config.ranks)
        return move._replace(kept=kept)

    def _options(self, move: Move, attention: Attention | None, tokens: slice) -> dict[str, Tensor]:
        return self.advice.options(move.rows, attention, tokens)

    def _judged(
        self, ragged: Ragged, keys: Tensor, values: Tensor, moves: list[Move], after: Rows, padded: bool
    ) -> Ragged:
        """The ragged pages with those of the tokens that leave and are kept."""
        fmt, made = self._storage.format, []
        for row, move in enumerate(moves):
            if not move.leaving.shape[1]:
                continue
            tokens = after.slots[row if len(after.slots) > 1 else 0].tokens
            m, counts, kept = ragged.judged(move, tokens, fmt.page_tokens)
            self._absorb(keys, values, m, counts * fmt.page_tokens)
            shape = *keys[m.rows].shape[:2], m.packs // fmt.page_tokens, fmt.words
            pages = keys.new_empty(shape, dtype=torch.int32)
            self._quantize(pages, 0, keys, values, m, self._attention(keys, m, padded))
            made.append((m.rows, pages, counts, kept))
        ragged = ragged.appended(made) if made else ragged
        return ragged.moved(moves, after)

    def _absorb(self, keys: Tensor, values: Tensor, move: Move, counts: Tensor | None = None) -> None:
        """The residual takes up what leaves and is not kept; ``counts`` ``[rows, H]``: only so many are."""
        if self._residual is None or move.kept is None:
            return
        k, v = keys[move.rows], values[move.rows]
        leaving = move.leaving.long()[:, None].expand(*k.shape[:2], -1)
        kept = torch.ones_like(move.kept, dtype=torch.bool)
        if counts is not None:
            kept &= torch.arange(kept.shape[2], device=kept.device) < counts.to(kept.device).unsqueeze(-1)
        dropped = kept.new_ones(k.shape[:3]).scatter_(2, move.kept.long(), ~kept).gather(2, leaving)
        for first in range(0, leaving.shape[2], _PORTION_TOKENS):
            part = leaving[..., first : first + _PORTION_TOKENS]
            both = self._storage.units.outside(select(k, part), select(v, part))
            self._residual = self._residual.absorb(move.rows, *both, dropped[..., first : first + _PORTION_TOKENS])

    def _quantize(
        self, rows: Tensor, packed: int, keys: Tensor, values: Tensor, move: Move, attention: Attention | None
    ) -> None:
        """Quantise the tokens that become packed into the pages of a move's rows, after those of ``packed`` tokens."""
        fmt = self._storage.format
        portion = fmt.page_tokens * max(1, _PORTION_NBYTES // (rows.shape[0] * rows.shape[1] * fmt.nbytes))
        for first in range(0, move.packs, portion):
            tokens = slice(first, first + portion)
            k, v, options = keys[move.rows], values[move.rows], self._options(move, attention, tokens)
            if move.kept is None:
                options["index"] = move.leaving[:, tokens].int()
            else:
                k, v = (select(x, move.kept[..., tokens]) for x in (k, v))
            pages = ops.quantize(k, v, fmt, **options)
            page = (packed + first) // fmt.page_tokens
            rows[:, :, page : page + pages.shape[2]] = pages

    def _evict(self, move: Move, options: dict[str, Tensor]) -> None:
        """One step of the rule on the window, in place."""
        config, fmt = self._storage.config, self._storage.format
        slots = evicted_slots(config.rule, config.window, config.sinks)
        ops.evict_(
            self._window_k[move.rows],
            self._window_v[move.rows],
            self._pages[move.rows],
            fmt,
            page=move.packed // fmt.page_tokens,
            tokens=move.tokens,
            start=slots.start,
            step=slots.step,
            count=config.window,
            **options,
        )


def _staying(tokens: Tensor, move: Move) -> Tensor:
    if move.staying is None:
        return tokens[:, :, : move.tokens - move.leaving.shape[1]]
    return select(tokens, move.staying)


def _of_rows(index: Tensor, rows: Tensor) -> Tensor:
    return index.long().expand(len(rows), -1)
