"""What a layer holds: its committed tokens, where they are, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..attention.units import Units
from ..attention.view import Layout
from ..config import LogQuantConfig
from ..format import PageFormat
from ..modes import own_arithmetic
from ..quantizer.advice import Advice
from ..quantizer.calibration import calibration_of
from ..quantizer.queries import RecentQueries
from .chosen import Chosen, ChosenRows
from .commit import Commit
from .layout import Rows
from .ragged import Ragged
from .storage import Allocator, Storage
from .uncommitted import Exact, Uncommitted


class Held:
    """Tensors, layout and advice of one layer, which change together: as a whole, or not at all.

    Args:
        storage: the tensors.
        rows: where the tokens are in them.
        advice: what the quantiser is told of them.
        chosen: which tokens are where, under the rule ``attention``; None where their number says it.
        ragged: the pages, where ``evict`` drops tokens; None where they are in ``storage``.
    """

    def __init__(
        self,
        storage: Storage,
        rows: Rows,
        advice: Advice,
        chosen: Chosen | None = None,
        ragged: Ragged | None = None,
    ) -> None:
        self.storage, self.rows, self.advice, self.chosen, self.ragged = storage, rows, advice, chosen, ragged
        self._interrupted = False

    @staticmethod
    def empty(config: LogQuantConfig, fmt: PageFormat, rows: Rows, layer: int, keys: Tensor, values: Tensor) -> Held:
        """Nothing yet, for tokens like these.

        Args:
            config: the cache's settings.
            fmt: the page format.
            rows: empty ones.
            layer: which layer of the model it is.
            keys, values: ``[B, H, n, D]`` and ``[B, H, n, Dv]``, for their shape, dtype and device.
        """
        advice = Advice.initial(config, fmt, calibration_of(config), layer, keys)
        chosen = Chosen.nothing(config, rows, keys) if config.rule == "attention" else None
        spec = config.evict_spec()
        ragged = None if spec is None else Ragged.empty(spec, fmt, keys)
        return Held(Storage.empty(config, fmt, keys, values, layer), rows, advice, chosen, ragged)

    @property
    def layout(self) -> Layout:
        """Which tokens are where."""
        return self.rows if self.chosen is None else ChosenRows(self.rows, self.chosen)

    def check_intact(self) -> None:
        """Refuse (RuntimeError) if an error came in the midst of a change."""
        if self._interrupted:
            raise RuntimeError(
                "this LogQuant cache layer is invalid: an earlier call was interrupted while it moved tokens; "
                "reset() the cache and feed it the sequence again"
            )

    def take(self, uncommitted: Uncommitted, real: Tensor | None, allocator: Allocator) -> bool:
        """Uncommitted tokens take their places.

        Args:
            uncommitted: the tokens.
            real: bool ``[B, new]``, which of their positions hold one; None if all do.
            allocator: of the stores of all layers.

        Returns:
            Whether tokens have moved within the window.
        """
        rows, new, exact = self.rows, uncommitted.new, uncommitted.exact
        after = rows.append(new, real)
        if not rows.length:
            self.storage.units = Units.of(exact.keys, exact.values)
            exact = Exact(*self.storage.units.inside(exact.keys, exact.values), in_window=False)
        advice = self._hear(uncommitted.call, new, real)
        chosen = self.chosen and self.chosen.hear(uncommitted, exact.keys, rows, real, self.storage.units)
        ragged = self.ragged
        if ragged is not None:
            scale = self.storage.units.scale(uncommitted.call.scale if uncommitted.call else 1.0)
            with own_arithmetic(exact.keys.device):
                ragged = ragged.hear(uncommitted.call, exact.keys, rows, new, real, scale)
        if exact.in_window and real is None and after.packed_counts == rows.packed_counts:
            # The new tokens are where they belong already, as in most steps.
            advice = self._remember(advice, after)
            # All at once, so that nothing comes in between.
            vars(self).update(rows=after, advice=advice, chosen=chosen, ragged=ragged)
            return False
        asked = self._asked(uncommitted.call, new, real)
        return self._move(exact, after, new, real, advice, chosen, allocator, asked, ragged)

    def _hear(self, call: AttentionCall | None, new: int, real: Tensor | None) -> Advice:
        """The advice with the queries of new positions, if all of them are known."""
        count = self.advice.needed(allocated=0 not in self.rows.packed_counts)
        queries = self._asked(call, new, real, least=count) if count else None
        return self.advice if queries is None else self.advice.hear(queries, count + self.rows.reserved)

    def _asked(
        self, call: AttentionCall | None, new: int, real: Tensor | None, least: int | None = None
    ) -> RecentQueries | None:
        """The queries of new positions, if all of them are known, or the newest ``least``."""
        if call is None or call.query.shape[2] < min(new, new if least is None else least):
            return None
        of_those = None if real is None else real[:, new - call.query.shape[2] :]
        return RecentQueries.of(call.query, of_those, self.storage.units.scale(call.scale), call.softcap)

    def _remember(self, advice: Advice, after: Rows) -> Advice:
        """The advice with those queries alone that rows need from now on, and as many more as a crop may take back."""
        count = advice.needed(allocated=0 not in after.packed_counts)
        return advice.remember(count and count + after.reserved, borrowed=self.advice.queries is None)

    def _move(
        self,
        tokens: Exact,
        after: Rows,
        new: int,
        real: Tensor | None,
        advice: Advice,
        chosen: Chosen | None,
        allocator: Allocator,
        asked: RecentQueries | None = None,
        ragged: Ragged | None = None,
    ) -> bool:
        """Tokens move as the rule says; arguments are those of :class:`Commit`."""
        before, kept = self.rows, self._remember(advice, after)
        if chosen is None:
            moves = before.moves(new, tokens.keys.device, real)
        else:
            moves = chosen.moves(before, after, new, real, tokens.values)
        if tokens.in_window and all(m.leaving.shape[1] == 0 and m.staying is None for m in moves):
            chosen = chosen and chosen.moved(moves, before, after, new)
            self.rows, self.advice, self.chosen = after, kept, chosen
            self.ragged = ragged and ragged.moved(moves, after)
            return False
        with own_arithmetic(tokens.keys.device, grad=tokens.in_graph):
            given, padded = chosen and chosen.given, real is not None
            commit = Commit(
                self.storage, tokens, moves, before, after, self.layout, advice, given, padded, allocator, asked, ragged
            )
            chosen = chosen and chosen.moved(moves, before, after, new)
            # What is written from here on cannot be undone.
            self._interrupted = True
            commit.write()
        self.rows, self.advice, self.chosen = after, kept.with_map(commit.advice.key_map), chosen
        self.ragged, self._interrupted = commit.ragged, False
        return tokens.in_window

    def crop(self, positions: int, allocator: Allocator) -> bool:
        """Remove the newest positions, and apply the rule to all tokens that are left; none are speculative then.

        Args:
            positions: how many.
            allocator: of page stores.

        Returns:
            Whether the rule has moved tokens within the window.
        """
        cropped = self.rows.crop(positions) if positions else self.rows.reserving(0)
        after, advice = cropped.append(0), self.advice.crop(positions)
        # What has been heard, and when, is not known any more.
        chosen = self.chosen and self.chosen._replace(heard=True)
        ragged = self.ragged and self.ragged.cropped(self.rows, cropped)
        if positions:
            if chosen is None:
                sources = self.rows.exact_before(cropped)
            else:
                sources = chosen.exact_before(self.rows, cropped)
                chosen = chosen.cropped(self.rows, cropped, sources)
            grad = self.storage.in_graph or (self.storage.severed and torch.is_grad_enabled())
            with own_arithmetic(self.storage.window_k.device, grad=grad):
                self.storage.crop(self.rows, cropped, sources, advice.key_map, allocator)
        self.rows, self.advice, self.chosen, self.ragged = cropped, advice, chosen, ragged
        keys, values = (w[:, :, : cropped.exact] for w in (self.storage.window_k, self.storage.window_v))
        tokens = Exact(keys, values, in_window=not self.storage.in_graph)
        return self._move(tokens, after, 0, None, advice, chosen, allocator, ragged=ragged)

    def map(self, function: Callable[[Tensor], Tensor], rows: Rows) -> Held:
        """With ``function`` applied to every tensor, and other rows."""
        storage = self.storage.map(function)
        chosen = self.chosen and self.chosen.map(function, self.rows, rows)
        ragged = self.ragged and self.ragged.map(function, rows)
        return Held(storage, rows, self.advice.map(function, storage.window_k), chosen, ragged)

    def copy(self) -> Held:
        """An independent copy. Both share the page store until one of them writes to it."""
        self.check_intact()
        return Held(self.storage.copy(), self.rows, self.advice, self.chosen, self.ragged)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file needs besides the rows: tensors by name, and what JSON can hold."""
        tensors, described = self.advice.state()
        tensors |= self.storage.state(self.rows) | (self.chosen.state(self.rows) if self.chosen else {})
        tensors |= self.ragged.state() if self.ragged else {}
        return tensors, described | {"units": list(self.storage.units)}

    @staticmethod
    def restored(
        config: LogQuantConfig,
        rows: Rows | None,
        layer: int,
        tensors: Mapping[str, Tensor],
        described: Mapping[str, Any],
    ) -> Held:
        """What :meth:`state` gave.

        Args:
            config, layer: as for :meth:`empty`.
            rows: where the tokens are; None if the file does not say.
            tensors, described: of :meth:`state`.

        Raises:
            ValueError: tensors that are missing, or do not fit each other, the cache's settings or ``rows``.
        """
        storage = Storage.restored(config, rows, layer, tensors, Units(*described.get("units", ())))
        assert rows is not None
        held = Held.empty(config, storage.format, rows, layer, storage.window_k, storage.window_v)
        advice = held.advice.restored(tensors, described, storage.window_k)
        ragged = held.ragged and Ragged.restored(held.ragged.spec, storage.format, tensors, rows, storage.window_k)
        return Held(storage, rows, advice, held.chosen and held.chosen.restored(tensors, rows), ragged)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a page store that copies share counts for each."""
        others = (part.nbytes for part in (self.chosen, self.ragged) if part)
        return self.storage.nbytes + self.advice.nbytes + sum(others)
