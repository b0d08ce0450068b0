"""What the quantiser is told about the tokens of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..format import PageFormat
from . import columns, think
from .calibration import Calibration
from .feedback import Attention, key_weights, value_feedback
from .queries import MAP_QUERIES, RecentQueries, kept_queries


@dataclass(frozen=True)
class Leaving:
    """Tokens of some rows that are about to be quantised, among all that are exact.

    Attributes:
        rows: the rows.
        keys: ``[rows, H, T, D]``: those of all exact and new tokens, in order, without padding.
        tokens: ``[1 or rows, N]`` or ``[rows, H, N]``, which of those leave, in order.
        given: ``[rows, H, N]``, what the newest queries have given them, where that is counted
            (:func:`logquant.attention.weights.given`).
    """

    rows: slice
    keys: Tensor
    tokens: Tensor
    given: Tensor | None = None


class Advice(NamedTuple):
    """The bit allocation of the keys, and the recent queries, which say what errors of a token cost.

    It never changes: what comes to be known makes another one, so that a layer can go back.

    Attributes:
        config: the cache's settings.
        fmt: the page format.
        key_map: the bit allocation, int16 ``[B, H, C]`` (csrc/format.h); None where all channels have the same bits.
        queries: the recent queries; None where they are not known or not asked for.
    """

    config: LogQuantConfig
    fmt: PageFormat
    key_map: Tensor | None
    queries: RecentQueries | None = None

    @staticmethod
    def initial(
        config: LogQuantConfig, fmt: PageFormat, calibration: Calibration | None, layer: int, keys: Tensor
    ) -> Advice:
        """What is known before the first token.

        Args:
            config: the cache's settings.
            fmt: the page format.
            calibration: that of the model, or None.
            layer: its index.
            keys: ``[B, H, n, D]``, for their shape and device.
        """
        key_map = None
        if config.has_map(fmt):
            batch, heads = keys.shape[:2]
            if calibration is None:
                key_map = columns.default_map(fmt, batch, heads, keys.device)
            else:
                key_map = calibration.key_map(layer, fmt, heads, keys.device).expand(batch, -1, -1)
        return Advice(config, fmt, key_map)

    @property
    def allocates(self) -> bool:
        """Whether each row finds its own bit allocation."""
        return self.config.allocates_bits(self.fmt)

    # ------------------------------------------------------------------------------------------------ recent queries
    def needed(self, allocated: bool) -> int:
        """How many recent queries say how to quantise the next tokens that leave.

        Args:
            allocated: whether all rows have pages, and with them a bit allocation.
        """
        return kept_queries(self.config, self.fmt, allocated=allocated)

    def hear(self, newer: RecentQueries, count: int) -> Advice:
        """With newer queries, of which the newest ``count`` are kept; perhaps in the memory that they came in."""
        queries = newer.keep(count) if self.queries is None else self.queries.then(newer, count)
        return self._replace(queries=queries)

    def remember(self, count: int, borrowed: bool) -> Advice:
        """With the newest ``count`` queries at most.

        Args:
            count: what is needed from now on.
            borrowed: whether they lie in the memory that they came in, which is a prompt's and not to be kept.
        """
        queries = self.queries
        if queries is None or not count:
            return self._replace(queries=None)
        if borrowed or queries.size > count:
            return self._replace(queries=queries.keep(count).apart())
        return self

    def with_map(self, key_map: Tensor | None) -> Advice:
        """With another bit allocation."""
        return self if key_map is self.key_map else self._replace(key_map=key_map)

    def crop(self, positions: int) -> Advice:
        """Without the queries of the newest positions."""
        return self._replace(queries=self.queries and self.queries.crop(positions))

    # -------------------------------------------------------------------------------------------- for the quantiser
    def attention(self, leaving: Leaving, queries: int | None = None) -> Attention | None:
        """How the newest ``queries``, by default those that are always kept, attend to tokens that leave, if known."""
        recent = self._recent(leaving.rows, queries or self.needed(allocated=True))
        return recent and Attention(recent, leaving.keys, leaving.tokens, leaving.given)

    def _recent(self, rows: slice, count: int) -> RecentQueries | None:
        """The newest ``count`` queries of some rows, if they are known."""
        return self.queries and self.queries.keep(count).together().map(lambda t: t[rows])

    def allocate(self, first: Iterable[Leaving]) -> Advice:
        """With the bits allocated of rows that get their first page, as their tokens and queries say."""
        key_map = None
        for leaving in first if self.allocates else ():
            assert self.key_map is not None
            key_map = self.key_map.clone() if key_map is None else key_map
            key_map[leaving.rows] = self._map_of(leaving)
        return self if key_map is None else self.with_map(key_map)

    def _map_of(self, first: Leaving) -> Tensor:
        """The bit allocation of rows whose first tokens leave."""
        if self.config.channels is not None:
            recent = self._recent(first.rows, think.QUERIES)
            return think.column_map(think.scores(first.keys, recent), self.fmt)
        attention = self.attention(first, MAP_QUERIES)
        if attention is None:
            scores = columns.variances(first.keys, 2 * self.fmt.page_tokens)
        else:
            scores = attention.key_scores(self.fmt.page_tokens)
        return columns.allocate(scores, self.fmt)

    def options(self, rows: slice, attention: Attention | None, tokens: slice) -> dict[str, Tensor]:
        """Arguments of the quantiser for some of the tokens that leave.

        Args:
            rows: of the batch.
            attention: that to the tokens, if known.
            tokens: which of them.
        """
        options = {} if self.key_map is None else {"key_map": self.key_map[rows]}
        if attention is None:
            return options
        weights = attention[tokens]
        if self.fmt.key_param_bits == 8:
            mean = weights.mean(2) if attention.given is None else attention.given[:, :, tokens].sqrt()
            options["key_weights"] = key_weights(mean, self.fmt.page_tokens)
        if self.fmt.value_param_bits == 8:
            options["value_feedback"] = value_feedback(weights, self.fmt.page_tokens)
        return options

    # --------------------------------------------------------------------------------------------------- its tensors
    def map(self, function: Callable[[Tensor], Tensor], like: Tensor) -> Advice:
        """With ``function`` applied to what has a row for each sequence.

        Args:
            function: selects rows, or moves to a device.
            like: a tensor of the layer that it was applied to.
        """
        key_map = self.key_map
        if key_map is not None:
            shared = None if self.allocates else key_map[:1].to(like.device).expand(like.shape[0], -1, -1)
            key_map = function(key_map) if shared is None else shared
        return self._replace(key_map=key_map, queries=self.queries and self.queries.map(function))

    @property
    def map_nbytes(self) -> int:
        """Bytes of the bit allocation of this layer's sequences; that of a calibration belongs to none of them."""
        return self.key_map.nbytes if self.key_map is not None and self.allocates else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this layer's sequences."""
        return self.map_nbytes + (0 if self.queries is None else self.queries.nbytes)

    # --------------------------------------------------------------------------------------------------------- files
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file needs: tensors by name, and what JSON can hold."""
        tensors, described = {}, {}
        if self.allocates and self.key_map is not None:
            tensors["key_map"] = self.key_map
        if (queries := self.queries) is not None:
            tensors["newest.query"] = queries.query
            if queries.real is not None:
                tensors["newest.real"] = queries.real
            described["newest"] = {"columns": queries.positions, "scale": queries.scale, "softcap": queries.softcap}
        return tensors, described

    def restored(self, tensors: Mapping[str, Tensor], described: Mapping[str, Any], keys: Tensor) -> Advice:
        """With what :meth:`state` gave.

        Args:
            tensors, described: of :meth:`state`, with or without others.
            keys: ``[B, H, n, D]`` of the layer.

        Raises:
            ValueError: tensors that do not fit the page format or the keys.
        """
        batch, heads, _, head_dim = keys.shape
        key_map, queries = self.key_map, None
        if self.allocates:
            key_map = tensors.get("key_map")
            need = (batch, heads, self.fmt.key_columns)
            if key_map is None or key_map.dtype != torch.int16 or key_map.shape != need:
                got = None if key_map is None else f"{key_map.dtype} {list(key_map.shape)}"
                raise ValueError(f"key_map must be int16 {list(need)}, got {got}")
        if (query := tensors.get("newest.query")) is not None:
            newest = described["newest"]
            queries = RecentQueries(
                (query,), tensors.get("newest.real"), newest["columns"], newest["scale"], newest["softcap"]
            )
            if not queries.fits(batch, heads, head_dim):
                raise ValueError(f"newest.query {list(query.shape)} does not fit keys {list(keys.shape)}")
        return self._replace(key_map=key_map, queries=queries)
