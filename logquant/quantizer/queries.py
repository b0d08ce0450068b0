"""The newest queries of each sequence: they say how the next tokens that leave are best quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..format import PageFormat

# The newest queries of a sequence that say so: 64 say little more, and are to be kept.
QUERIES = 16
# The same where weights and the order within a page come from what all queries have given: 16 say little more.
QUERIES_BESIDE_SUMS = 4
# Those that say which key channels get which bits, once, and how the first pages are best quantised: kept until then.
MAP_QUERIES = 64


def kept_queries(config: LogQuantConfig, fmt: PageFormat, *, allocated: bool) -> int:
    """How many recent queries say how to quantise the next tokens that leave.

    Args:
        config: the cache's settings.
        fmt: the page format.
        allocated: whether all rows have pages, and with them a bit allocation.
    """
    by_attention = config.rule == "attention"
    if not allocated and (config.allocates_bits(fmt) or (by_attention and fmt.mse_searched)):
        return MAP_QUERIES
    if not fmt.mse_searched:
        return 0
    return QUERIES_BESIDE_SUMS if by_attention else QUERIES


class RecentQueries(NamedTuple):
    """The newest queries of each sequence of a batch.

    Attributes:
        parts: one tensor ``[B, Hq, n, D]``, or n of ``[B, Hq, 1, D]``, in order: every decoded token brings one and
            drops one, and only an eviction needs them in one piece.
        real: bool ``[B, n]``, which are not of padding; None if all are real.
        positions: how many of the last ones are those of the last positions, one for each.
        scale, softcap: of scores.
    """

    parts: tuple[Tensor, ...]
    real: Tensor | None
    positions: int
    scale: float
    softcap: float

    @staticmethod
    def of(query: Tensor, real: Tensor | None, scale: float, softcap: float) -> RecentQueries:
        """Those of some positions.

        Args:
            query: ``[B, Hq, n, D]``.
            real: bool ``[B, n]``; None if all are real.
            scale, softcap: of scores.
        """
        return RecentQueries((query,), None if real is None else real.to(query.device), query.shape[2], scale, softcap)

    @property
    def query(self) -> Tensor:
        """All of them, ``[B, Hq, n, D]``, in order."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 2)

    @property
    def size(self) -> int:
        """How many there are for each sequence, n."""
        return len(self.parts) if len(self.parts) > 1 else self.parts[0].shape[2]

    def keep(self, count: int) -> RecentQueries:
        """The newest ``count`` of each sequence; perhaps in the same memory."""
        if self.real is None:
            parts = self.parts[-count:] if len(self.parts) > 1 else (self.parts[0][:, :, -count:],)
            return self._replace(parts=parts, positions=min(self.positions, count))
        place = torch.arange(self.real.shape[1], device=self.real.device)
        order = torch.where(self.real, place, place - len(place)).argsort(1)[:, -count:]
        query = self.query
        query = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        aligned = bool((order == place[-order.shape[1] :]).all())
        real = self.real.gather(1, order)
        positions = min(self.positions, query.shape[2]) if aligned else 0
        return self._replace(parts=(query,), real=None if real.all() else real, positions=positions)

    def together(self) -> RecentQueries:
        """The same, as one tensor."""
        return self._replace(parts=(self.query,))

    def apart(self) -> RecentQueries:
        """The same, each in memory of its own, so that each can be dropped by itself."""
        parts = tuple(query.clone() for part in self.parts for query in part.split(1, 2))
        return self._replace(parts=parts, real=None if self.real is None else self.real.clone())

    def then(self, newer: RecentQueries, count: int) -> RecentQueries:
        """The newest ``count`` of these and newer ones, in memory of their own."""
        came = newer.size
        if came == 1 == self.parts[0].shape[2] and self.real is None and newer.real is None and newer.positions:
            # As in most steps.
            parts = (*self.parts, newer.parts[0].clone())[-count:]
            return RecentQueries(parts, None, min(self.positions + 1, count), newer.scale, newer.softcap)
        positions = newer.positions + (self.positions if newer.positions == came else 0)
        if self.real is None and newer.real is None:
            older = self.apart() if self.parts[0].shape[2] > 1 else self
            newer = newer.keep(count).apart()
            return newer._replace(parts=(*older.parts, *newer.parts)[-count:], positions=min(positions, count))
        real = torch.cat([x._all_real() if x.real is None else x.real for x in (self, newer)], 1)
        return newer._replace(parts=self.parts + newer.parts, real=real, positions=positions).keep(count)

    def _all_real(self) -> Tensor:
        query = self.query
        return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)

    def crop(self, positions: int) -> RecentQueries | None:
        """Those that are left without the last positions; None if that is not known."""
        if positions == 0:
            return self
        if positions >= self.positions:
            return None
        parts = self.parts[:-positions] if len(self.parts) > 1 else (self.parts[0][:, :, :-positions],)
        real = None if self.real is None else self.real[:, :-positions]
        return self._replace(parts=parts, real=real, positions=self.positions - positions)

    def map(self, function: Callable[[Tensor], Tensor]) -> RecentQueries:
        """With ``function`` applied to what has a row for each sequence."""
        parts = tuple(function(part) for part in self.parts)
        return self._replace(parts=parts, real=None if self.real is None else function(self.real))

    def fits(self, batch: int, kv_heads: int, head_dim: int) -> bool:
        """Whether these can be the queries of a layer with keys of this shape."""
        if any(part.dim() != 4 for part in self.parts):
            return False
        query = self.query
        if query.shape[1] == 0 or query.shape[1] % kv_heads:
            return False
        if self.real is not None and (self.real.shape != query.shape[::2][:2] or self.real.dtype != torch.bool):
            return False
        return query.shape[0] == batch and query.shape[3] == head_dim and query.is_floating_point()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in self.parts) + (0 if self.real is None else self.real.nbytes)
