"""Attention over chosen pages and all exact tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..format import PageFormat
from ..recall_spec import RecallSpec
from . import CHOOSERS
from .chooser import Asked
from .index import PageIndex


class Recall(NamedTuple):
    """What a layer reads of its pages.

    Attributes:
        spec: how much, and who chooses.
        page_index: what choosers go by, if this one needs it.
    """

    spec: RecallSpec
    page_index: PageIndex | None

    def counts(self, packed: tuple[int, ...], page_tokens: int, all_seen: Tensor | None) -> Tensor | None:
        """How many pages each row reads for each query, int32 ``[1 or B, 1 or L]`` on the CPU; None: all read all.

        Args:
            packed: packed tokens of each row, or of all rows alike.
            page_tokens: tokens of a page.
            all_seen: bool ``[1 or B, 1 or L]`` on the CPU, whether a query sees all tokens that its row holds, each as
                it is; None if all queries do. One that does not reads all pages: choosers do not know masks.
        """
        pages = [tokens // page_tokens for tokens in packed]
        wanted = [self.spec.count(n, page_tokens) for n in pages]
        if wanted == pages:
            return None
        counts = torch.tensor(wanted, dtype=torch.int32)[:, None]
        if all_seen is not None:
            whole = torch.tensor(pages, dtype=torch.int32)[:, None]
            counts = torch.where(all_seen, counts, whole)
            if torch.equal(counts, whole.expand_as(counts)):
                return None
        return counts

    def reading(
        self,
        pages: Tensor,
        fmt: PageFormat,
        key_map: Tensor | None,
        packed: tuple[int, ...],
        all_seen: Tensor | None = None,
    ) -> Reading | None:
        """Of some of these pages; None: queries read all.

        Args:
            pages, fmt, key_map: as for :func:`logquant.ops.attend`.
            packed, all_seen: as for :meth:`counts`.
        """
        counts = self.counts(packed, fmt.page_tokens, all_seen)
        return None if counts is None else Reading(self, pages, fmt, key_map, counts)


class Reading:
    """Attention of queries to the pages that each of them chooses, and to all exact tokens.

    It serves as long as the pages stay as they are.

    Args:
        recall: who chooses, and by what.
        pages, fmt, key_map: as for :func:`logquant.ops.attend`.
        counts: what :meth:`Recall.counts` says of these pages.
    """

    def __init__(self, recall: Recall, pages: Tensor, fmt: PageFormat, key_map: Tensor | None, counts: Tensor) -> None:
        self._chooser, self._index = CHOOSERS[recall.spec.chooser], recall.page_index
        self._pages, self._fmt, self._key_map = pages, fmt, key_map
        self._rows = HeadsAsRows(pages, fmt, key_map)
        self._counts, self._most, self._alike = counts.to(pages.device), int(counts.max()), counts.numel() == 1

    def tables(self, q: Tensor, scale: float, used: Tensor | None) -> Tensor:
        """The pages that each KV head reads for each query: what a :class:`Chooser` returns."""
        asked = Asked(q, self._pages, self._fmt, scale, self._key_map, self._index, used)
        return self._chooser(asked, self._counts, self._most)

    def attend(
        self,
        q: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        *,
        given: Tensor | None,
        scale: float,
        softcap: float = 0.0,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        query_positions: Tensor | None = None,
        sinks: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each query as if it came alone.

        Args:
            q, window_k, window_v, scale, softcap, positions, mask, query_positions, sinks, lengths: as for
                :func:`logquant.ops.attend`.
            given: as ``attention`` of :func:`logquant.ops.observed_attend`, or None.

        Returns:
            The output ``[B, Hq, L, Dv]``, and what the window's slots have been given, if ``given`` was.
        """
        tables = self.tables(q, scale, None if lengths is None else lengths[:, 0])
        outs = []
        for i in range(q.shape[2]):
            own = slice(i, i + 1)
            out, lse, given = self._rows.attend(
                q if q.shape[2] == 1 else q[:, :, own],
                tables[:, :, i],
                window_k,
                window_v,
                given=given,
                scale=scale,
                softcap=softcap,
                positions=positions,
                mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, own],
                query_positions=None if query_positions is None else query_positions[:, own],
                lengths=self._lengths(i, window_k, lengths),
            )
            outs.append(out if sinks is None else with_sinks(out, lse.view(out.shape[:3]), sinks))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2), given

    def _lengths(self, query: int, window_k: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Chosen pages and window tokens of each row, int32 ``[B, 2]``; None: all of them."""
        if self._alike and lengths is None:
            return None
        batch, slots = window_k.shape[0], window_k.shape[2]
        count = self._counts[:, min(query, self._counts.shape[1] - 1)]
        window = torch.full_like(count, slots) if lengths is None else lengths[:, 1].to(count)
        return torch.stack([count.expand(batch), window.expand(batch)], 1)


class HeadsAsRows:
    """The KV heads of a batch as rows of one head each, so that each has a page table of its own; all are views.

    Args:
        pages: int32 ``[B, H, P, words]``, perhaps the first ones of a larger store.
        fmt: the page format.
        key_map: the bit allocation of keys, ``[1 or B, 1 or H, C]``, or None.
    """

    def __init__(self, pages: Tensor, fmt: PageFormat, key_map: Tensor | None = None) -> None:
        batch, heads, count, words = pages.shape
        if pages.stride()[2:] != (words, 1) or pages.stride(0) != heads * pages.stride(1) or pages.stride(1) % words:
            pages = pages.contiguous()
        stored = pages.stride(1) // words
        blocks = (batch * heads - 1) * stored + count
        self.batch, self.heads, self.fmt = batch, heads, fmt
        self.blocks = pages.as_strided((blocks, 1, words), (words, words, 1))
        self.first = _first_blocks(batch, heads, stored, pages.device)
        self.key_map = self.by_head(key_map, heads)

    def flat(self, x: Tensor) -> Tensor:
        """``[B, H or Hq, ...]`` as ``[B * H, 1 or Hq / H, ...]``."""
        return x.reshape(self.batch * self.heads, x.shape[1] // self.heads, *x.shape[2:])

    def by_head(self, x: Tensor | None, heads: int) -> Tensor | None:
        """``[1 or B, 1 or heads, ...]`` as ``[1 or B * H, 1 or heads / H, ...]``."""
        if x is None or x.shape[:2] == (1, 1):
            return x
        batch = x.expand(self.batch, *x.shape[1:])
        return self.flat(batch if x.shape[1] == heads else batch.expand(-1, self.heads, *x.shape[2:]))

    def positions(self, positions: Tensor | None, chosen: Tensor, slots: int) -> Tensor | None:
        """Positions of all slots, ``[1 or B, N]``, as those of the chosen pages and the window, ``[B * H, n]``."""
        if positions is None:
            return None
        page_tokens, packed = self.fmt.page_tokens, positions.shape[1] - slots
        every = positions.expand(self.batch, -1)[:, None].expand(-1, self.heads, -1)
        of_pages = every[..., :packed].unflatten(2, (-1, page_tokens))
        own = of_pages.gather(2, chosen[..., None].long().expand(-1, -1, -1, page_tokens))
        return torch.cat([own.flatten(2), every[..., packed:]], 2).flatten(0, 1)

    def attend(
        self,
        q: Tensor,
        chosen: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        *,
        given: Tensor | None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """:func:`logquant.ops.observed_attend` over the pages ``chosen`` ``[B, H, n]`` of each KV head.

        The log-sum-exp comes as ``[B * H, Hq / H, L]``.
        """
        rows: dict[str, Any] = options | {
            "key_map": self.key_map,
            "positions": self.positions(positions, chosen, window_k.shape[2]),
            "mask": self.by_head(mask, q.shape[1]),
            "page_table": (chosen + self.first).flatten(0, 1),
            "lengths": None if lengths is None else lengths.repeat_interleave(self.heads, 0),
        }
        tensors = self.flat(q), self.blocks, self.flat(window_k), self.flat(window_v)
        if given is None:
            out, lse = ops.attend(*tensors, self.fmt, **rows)
        else:
            attention = self.flat(given)
            out, lse, given = ops.observed_attend(*tensors, self.fmt, **rows, attention=attention)
            given = given.view(self.batch, self.heads, -1)
        return out.view(*q.shape[:3], -1), lse, given


@functools.lru_cache(maxsize=16)
def _first_blocks(batch: int, heads: int, stored: int, device: torch.device) -> Tensor:
    """The block where the pages of each KV head begin, int32 ``[B, H, 1]``: the same at every step and layer."""
    with torch.inference_mode(False):
        first = torch.arange(0, batch * heads * stored, stored, dtype=torch.int32, device=device)
        return first.view(batch, heads, 1)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """An output whose softmax did not count the sinks ``[Hq]``, as if it had: the operator has one for all rows."""
    share = torch.sigmoid(lse - sinks[None, :, None])
    return (out * share.unsqueeze(-1)).to(out.dtype)
