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

    def tables(self, asked: Asked, counts: Tensor) -> Tensor:
        """The pages that each KV head reads for each query: what a :class:`Chooser` returns."""
        return CHOOSERS[self.spec.chooser](asked, counts.to(asked.pages.device), int(counts.max()))

    def attend(
        self,
        q: Tensor,
        pages: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        counts: Tensor,
        *,
        given: Tensor | None,
        scale: float,
        softcap: float,
        key_map: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
        query_positions: Tensor | None,
        sinks: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each query to the exact tokens and the pages that it chooses, as if it came alone.

        Args:
            q, pages, window_k, window_v, fmt, scale, softcap, key_map, positions, mask, query_positions, sinks,
                lengths: as for :func:`logquant.ops.attend`.
            counts: what :meth:`counts` says.
            given: as ``attention`` of :func:`logquant.ops.observed_attend`, or None.

        Returns:
            The output ``[B, Hq, L, Dv]``, and what the window's slots have been given, if ``given`` was.
        """
        used = None if lengths is None else lengths[:, 0]
        tables = self.tables(Asked(q, pages, fmt, scale, key_map, self.page_index, used), counts)
        batch, rows = q.shape[0], HeadsAsRows(pages)
        outs = []
        for i in range(q.shape[2]):
            own = slice(i, i + 1)
            chosen, own_lengths = tables[:, :, i], None
            if counts.numel() > 1 or lengths is not None:
                count = counts[:, min(i, counts.shape[1] - 1)]
                window = torch.full((batch,), window_k.shape[2]) if lengths is None else lengths[:, 1]
                own_lengths = torch.stack([count.to(window).expand(batch), window.expand(batch)], 1).int().to(q.device)
            out, lse, given = rows.attend(
                q[:, :, own],
                chosen,
                window_k,
                window_v,
                fmt,
                given=given,
                scale=scale,
                softcap=softcap,
                key_map=key_map,
                positions=positions,
                mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, own],
                query_positions=None if query_positions is None else query_positions[:, own],
                lengths=own_lengths,
            )
            outs.append(out if sinks is None else with_sinks(out, lse, sinks))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2), given


class HeadsAsRows:
    """The KV heads of a batch as rows of one head each, so that each has a page table of its own; all are views.

    Args:
        pages: int32 ``[B, H, P, words]``, perhaps the first ones of a larger store.
    """

    def __init__(self, pages: Tensor) -> None:
        batch, heads, count, words = pages.shape
        if pages.stride()[2:] != (words, 1) or pages.stride(0) != heads * pages.stride(1) or pages.stride(1) % words:
            pages = pages.contiguous()
        stored = pages.stride(1) // words
        blocks = (batch * heads - 1) * stored + count
        self.batch, self.heads = batch, heads
        self.blocks = pages.as_strided((blocks, 1, words), (words, words, 1))
        self.first = _first_blocks(batch, heads, stored, pages.device)

    def flat(self, x: Tensor) -> Tensor:
        """``[B, H, ...]`` as ``[B * H, ...]``."""
        return x.flatten(0, 1)

    def by_head(self, x: Tensor | None, heads: int) -> Tensor | None:
        """``[1 or B, 1 or heads, ...]`` as ``[1 or B * H, 1 or heads / H, ...]``."""
        if x is None or x.shape[:2] == (1, 1):
            return x
        batch = x.expand(self.batch, *x.shape[1:])
        if x.shape[1] == 1:
            return self.flat(batch.unsqueeze(1).expand(-1, self.heads, *x.shape[1:]))
        return self.flat(batch.unflatten(1, (self.heads, heads // self.heads)))

    def positions(self, positions: Tensor | None, chosen: Tensor, page_tokens: int, slots: int) -> Tensor | None:
        """Positions of all slots, ``[1 or B, N]``, as those of the chosen pages and the window, ``[B * H, n]``."""
        if positions is None:
            return None
        packed = positions.shape[1] - slots
        every = positions.expand(self.batch, -1)[:, None].expand(-1, self.heads, -1)
        of_pages = every[..., :packed].unflatten(2, (-1, page_tokens))
        own = of_pages.gather(2, chosen[..., None].long().expand(-1, -1, -1, page_tokens))
        return self.flat(torch.cat([own.flatten(2), every[..., packed:]], 2))

    def attend(
        self,
        q: Tensor,
        chosen: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        *,
        given: Tensor | None,
        key_map: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """:func:`logquant.ops.attend` over the pages ``chosen`` ``[B, H, n]`` of each KV head."""
        batch, heads = self.batch, self.heads
        query_heads = q.shape[1]
        rows: dict[str, Any] = options | {
            "key_map": self.by_head(key_map, heads),
            "positions": self.positions(positions, chosen, fmt.page_tokens, window_k.shape[2]),
            "mask": self.by_head(mask, query_heads),
            "page_table": self.flat(chosen + self.first),
            "lengths": None if lengths is None else lengths.repeat_interleave(heads, 0),
        }
        tensors = (
            self.flat(q.unflatten(1, (heads, -1))),
            self.blocks,
            self.flat(window_k).unsqueeze(1),
            self.flat(window_v).unsqueeze(1),
        )
        if given is None:
            out, lse = ops.attend(*tensors, fmt, **rows)
        else:
            attention = self.flat(given).unsqueeze(1)
            out, lse, given = ops.observed_attend(*tensors, fmt, **rows, attention=attention)
            given = given.view(batch, heads, -1)
        return out.view(batch, query_heads, *out.shape[2:]), lse.view(batch, query_heads, -1), given


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
