"""Tokens that become pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ...quantizer.feedback import key_weights, value_feedback
from .layout import PAGE, QUERY_DTYPE, BlockLayout, Pool
from .step import Due, Kept, to_device


class Quantizer(NamedTuple):
    """How the pages of a layer are made.

    Attributes:
        layout: of the blocks.
        key_map: int16 ``[1, H, C]``, the bit allocation; None where all channels have the same bits.
        scale, softcap: of scores.
    """

    layout: BlockLayout
    key_map: Tensor | None
    scale: float
    softcap: float

    def make(self, pool: Pool, query: Tensor, due: Due) -> None:
        """Make pages of exact tokens, in place.

        Args:
            pool: of the layer.
            query: of this step, ``[tokens, Hq, D]``.
            due: which pages.
        """
        layout = self.layout
        states = pool.exact[due.source]  # [n, H, PAGE, 2 D]
        if due.first is not None:
            sinks = states[due.first, :, : layout.sinks]
            pool.exact[due.block[due.first], :, PAGE - layout.sinks :] = sinks
            # They are read from there. In their page they must not widen the range of their channels.
            states[due.first, :, : layout.sinks] = states[due.first, :, layout.sinks : layout.sinks + 1]
        options: dict[str, Tensor] = {} if self.key_map is None else {"key_map": self.key_map}
        if layout.fmt.mse_searched:
            attention = self._attention(states[..., : layout.head_dim], self._queries(pool, query, due), due.seen)
            if layout.ranks is not None:
                order = self._order(attention, due.seen)
                states = states.gather(2, order[..., None].expand_as(states))
                attention = attention.gather(3, order[:, :, None].expand_as(attention))
            if layout.fmt.key_param_bits == 8:
                options["key_weights"] = key_weights(attention.mean(2), PAGE)
            if layout.fmt.value_param_bits == 8:
                options["value_feedback"] = value_feedback(attention, PAGE)
        key, value = states.split(layout.head_dim, -1)
        pool.pages[due.block, :, due.page] = ops.quantize(key, value, layout.fmt, **options)[:, :, 0]

    def _queries(self, pool: Pool, query: Tensor, due: Due) -> Tensor:
        """The queries that say how, ``[n, H, group, queries, D]``."""
        heads = pool.exact.shape[1]
        here = query[due.tokens].to(QUERY_DTYPE).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
        return torch.where(due.here[:, None, None, :, None], here, pool.queries[due.block].transpose(2, 3))

    def _attention(self, key: Tensor, query: Tensor, seen: Tensor) -> Tensor:
        """What each query gives the tokens of its page, among themselves: float32 ``[n, H, group * queries, PAGE]``."""
        scores = (query.float() @ key.float().mT.unsqueeze(2)) * self.scale  # [n, H, group, queries, PAGE]
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).flatten(2, 3)

    def _order(self, attention: Tensor, seen: Tensor) -> Tensor:
        """Which token each slot of a page takes, ``[n, H, PAGE]``: those with fine values the most attended."""
        given = attention.mean(2).masked_fill(~seen.any(1)[:, None], -1.0)  # sinks come last, whatever they are given
        ranks = to_device(np.array(self.layout.ranks), given)
        return given.argsort(dim=-1, descending=True, stable=True).index_select(-1, ranks)


def keep(pool: Pool, query: Tensor, kept: Kept) -> None:
    """Keep queries for a later step, in place; ``query`` is ``[tokens, Hq, D]``."""
    heads, group = pool.queries.shape[1], pool.queries.shape[3]
    pool.queries[kept.block, :, kept.slot] = query[kept.tokens].to(QUERY_DTYPE).unflatten(1, (heads, group))
