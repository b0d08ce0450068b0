"""Pages of which each KV head has its own number, where ``evict`` drops tokens; and who has named exact tokens last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..attention.call import AttentionCall
from ..eviction.corm import NEVER, choose, last_named
from ..eviction.spec import EvictSpec
from ..format import PageFormat
from .layout import Move, Rows


class Ragged:
    """The pages of one layer, and what is known of its exact tokens. It never changes.

    Args:
        spec: the rule.
        pool: int32 ``[pages, words]``: those of all KV heads, one head after the other.
        counts: int32 ``[B, H]`` on the CPU, how many of them each head has.
        kept: the same, how many tokens the rule keeps of those that have left: fewer than fill the pages.
        named: int32 ``[B, H, exact]``, the last query that has named each exact token (:mod:`logquant.eviction.corm`).
        table: int32 ``[B, H, most]``, the pages of each head, 0 where it has fewer, if that is known already.
    """

    def __init__(
        self,
        spec: EvictSpec,
        pool: Tensor,
        counts: Tensor,
        kept: Tensor,
        named: Tensor,
        table: Tensor | None = None,
    ) -> None:
        self.spec, self.pool, self.counts, self.kept, self.named = spec, pool, counts, kept, named
        self.table = _table(counts).to(pool.device) if table is None else table

    @staticmethod
    def empty(spec: EvictSpec, fmt: PageFormat, keys: Tensor) -> Ragged:
        """Without pages, for keys like these, ``[B, H, n, D]``."""
        none = torch.zeros(keys.shape[:2], dtype=torch.int32)
        pool = keys.new_empty(0, fmt.words, dtype=torch.int32)
        return Ragged(spec, pool, none, none, keys.new_empty(*keys.shape[:2], 0, dtype=torch.int32))

    # ------------------------------------------------------------------------------------------------- tokens come
    def hear(
        self, call: AttentionCall | None, keys: Tensor, rows: Rows, new: int, real: Tensor | None, scale: float
    ) -> Ragged:
        """With the messages of the newest queries.

        Args:
            call: what has attended to the new tokens, with its ``lse`` unless these are all.
            keys: ``[B, H, exact + new, D]``: each row's exact tokens, then the new ones.
            rows: where tokens are that came before.
            new: new positions.
            real: bool ``[B, new]``, which of them hold a token; None if all do.
            scale: of the scores of these keys.

        Raises:
            RuntimeError: the queries are not known.
        """
        if call is None or call.query.shape[2] != new or (rows.length and call.lse is None):
            raise RuntimeError(
                "evict drops tokens, so attention must go by what the cache holds, and tell its queries, and has not: "
                'model.set_attn_implementation("logquant") (or "sdpa") does both'
            )
        named = F.pad(self.named, (0, new), value=NEVER)
        lse = call.lse if rows.length else None
        together = rows.alike and real is None
        for row, slots in enumerate(rows.each(1 if together else len(keys))):
            came = torch.arange(new) if real is None else real[row].nonzero().squeeze(1)
            if not len(came):
                continue
            of = slice(None) if together else slice(row, row + 1)
            at = torch.cat([torch.arange(slots.exact), slots.exact + came]).to(keys.device)
            asked = came[-self.spec.window :].to(keys.device)
            first = slots.tokens + len(came) - len(asked)
            query = call.query[of].index_select(2, asked)
            own_lse = None if lse is None else lse[of].index_select(2, asked)
            own = last_named(query, keys[of].index_select(2, at), first, scale, call.softcap, own_lse)
            # A row's slots end with its own tokens; what lies behind them is nobody's.
            before = F.pad(named[of, :, : slots.exact], (0, len(came)), value=NEVER)
            fresh = named[of].clone()
            fresh.index_copy_(2, at, torch.maximum(before, own))
            named[of] = fresh
        return self._with(named=named)

    def judged(self, move: Move, tokens: int, page_tokens: int) -> tuple[Move, Tensor, Tensor]:
        """A move with those tokens chosen that become packed, pages of each head, and how many the rule keeps.

        Args:
            move: what leaves.
            tokens: tokens of these rows that have come by then.
            page_tokens: tokens of a page.
        """
        index = move.leaving.long()[:, None]
        named = self.named[move.rows]
        leaving = named.gather(2, index.expand(*named.shape[:2], -1))
        chosen, pages, kept = choose(leaving, tokens, self.spec.window, page_tokens)
        found = index.expand(*named.shape[:2], -1).gather(2, chosen)
        return move._replace(kept=found, packs=found.shape[2]), pages.int().cpu(), kept.int().cpu()

    def appended(self, made: list[tuple[slice, Tensor, Tensor, Tensor]]) -> Ragged:
        """With new pages.

        Args:
            made: of some rows each: which, their pages ``[rows, H, P, words]``, how many of those each head takes and
                how many tokens the rule keeps, int32 ``[rows, H]`` on the CPU.
        """
        counts, kept = self.counts.clone(), self.kept.clone()
        fresh: dict[int, Tensor] = {}
        for rows, pages, own_counts, own_kept in made:
            counts[rows] += own_counts
            kept[rows] += own_kept
            for row, of_row, taken in zip(range(len(counts))[rows], pages, own_counts, strict=True):
                for head, (of_head, count) in enumerate(zip(of_row, taken.tolist(), strict=True)):
                    fresh[row * counts.shape[1] + head] = of_head[:count]
        none = self.pool[:0]
        old = self.pool.split(self.counts.flatten().tolist())
        parts = [part for i, own in enumerate(old) for part in (own, fresh.get(i, none))]
        return self._with(pool=torch.cat(parts), counts=counts, kept=kept)

    def moved(self, moves: list[Move], after: Rows) -> Ragged:
        """After exact tokens have moved as ``moves`` say."""
        named = self.named.new_full((*self.named.shape[:2], after.exact), NEVER)
        for move in moves:
            own = self.named[move.rows]
            if move.staying is None:
                stays = own[:, :, : move.tokens - move.leaving.shape[1]]
            else:
                stays = own.gather(2, move.staying.long()[:, None].expand(*own.shape[:2], -1))
            named[move.rows, :, : stays.shape[2]] = stays
        return self._with(named=named)

    def cropped(self, before: Rows, after: Rows) -> Ragged:
        """After a crop of tokens that were exact, or of all.

        Raises:
            ValueError: tokens would have to come back that have left the window.
        """
        self.check_crop(before, after)
        if not after.length:
            none = torch.zeros_like(self.counts)
            return Ragged(self.spec, self.pool[:0], none, none, self.named[:, :, :0])
        return self._with(named=self.named[:, :, : after.exact].clone())

    @staticmethod
    def check_crop(before: Rows, after: Rows) -> None:
        """Refuse what :meth:`cropped` refuses."""
        for had, has in zip(before.slots, after.each(len(before.slots)), strict=True):
            if after.length and has.evicted < had.evicted:
                raise ValueError(
                    "crop must not bring back tokens that have left the window, of which evict drops some: "
                    f"{had.evicted} have, and of the {has.tokens} tokens that crop leaves only {has.evicted} would have"
                )

    def _with(self, **changes: Any) -> Ragged:
        names = ("pool", "counts", "kept", "named", *(() if "counts" in changes else ("table",)))
        return Ragged(self.spec, **{name: getattr(self, name) for name in names} | changes)

    # ------------------------------------------------------------------------------------------------- they attend
    def attend(
        self,
        q: Tensor,
        window_k: Tensor,
        window_v: Tensor,
        fmt: PageFormat,
        *,
        positions: Tensor | None,
        packed: int,
        key_map: Tensor | None,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """:func:`logquant.ops.attend` over the pages of each KV head and the window.

        Args:
            q: ``[B, Hq, L, D]``.
            window_k, window_v: exact and new tokens.
            fmt: the page format.
            positions: of all slots, int32 ``[1 or B, packed + N]``, as if nothing had been dropped; None if each query
                sees all.
            packed: how many of those are of tokens that have left the window.
            key_map, mask, options: as for the operator.

        Returns:
            The output ``[B, Hq, L, Dv]`` and its log-sum-exp ``[B, Hq, L]``.
        """
        batch, heads = self.counts.shape
        slots, pages = window_k.shape[2], self.table.shape[2]

        def by_head(x: Tensor) -> Tensor:
            """``[1 or B, 1 or n, ...]`` as ``[B * H, 1 or n / H, ...]``."""
            x = x.expand(batch, *x.shape[1:])
            whole = x.shape[1] == 1
            own = x.unsqueeze(1).expand(-1, heads, *x.shape[1:]) if whole else x.unflatten(1, (heads, -1))
            return own.flatten(0, 1)

        if positions is not None:
            # Every query sees all that has left the window, as it sees the first token.
            first = positions[:, :1].clamp_min(0).expand(-1, pages * fmt.page_tokens)
            both = torch.cat([first, positions[:, packed:]], 1).expand(batch, -1)
            positions = both.repeat_interleave(heads, 0)
        used = torch.stack([self.counts.flatten(), torch.full((batch * heads,), slots, dtype=torch.int32)], 1)
        out, lse = ops.attend(
            q.unflatten(1, (heads, -1)).flatten(0, 1),
            self.pool[:, None],
            window_k.flatten(0, 1).unsqueeze(1),
            window_v.flatten(0, 1).unsqueeze(1),
            fmt,
            key_map=None if key_map is None else by_head(key_map),
            mask=None if mask is None else by_head(mask),
            positions=positions,
            page_table=self.table.flatten(0, 1),
            lengths=used.to(q.device),
            **options,
        )
        return out.view(batch, q.shape[1], *out.shape[2:]), lse.view(batch, q.shape[1], -1)

    # --------------------------------------------------------------------------------------------------- its tensors
    def map(self, function: Callable[[Tensor], Tensor], after: Rows) -> Ragged:
        """With ``function`` applied to what has a row for each sequence; pages that no row has are left."""
        table, counts, kept = (function(t) for t in (self.table, self.counts, self.kept))
        counts, kept, pool = counts.cpu(), kept.cpu(), self.pool.to(table.device)
        own = table[torch.arange(table.shape[2], device=table.device) < counts.to(table.device)[..., None]]
        return Ragged(self.spec, pool[own.long()], counts, kept, function(self.named)[:, :, : after.exact])

    def tokens(self, page_tokens: int) -> int:
        """Tokens of all rows that are in pages, the mean over KV heads."""
        return round(int(self.counts.sum()) * page_tokens / max(1, self.counts.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in (self.pool, self.counts, self.kept, self.named, self.table))

    def state(self) -> dict[str, Tensor]:
        """What a file needs, by name."""
        # Without pages, one tensor of zeros is two of these, and a file takes each only once.
        return {f"evict.{name}": getattr(self, name).clone() for name in ("pool", "counts", "kept", "named")}

    @staticmethod
    def restored(spec: EvictSpec, fmt: PageFormat, tensors: Mapping[str, Tensor], rows: Rows, keys: Tensor) -> Ragged:
        """What :meth:`state` gave, for exact keys ``[B, H, exact, D]``.

        Raises:
            ValueError: tensors that are missing or do not fit.
        """
        found = [tensors.get(f"evict.{name}", torch.empty(())) for name in ("pool", "counts", "kept", "named")]
        pool, counts, kept, named = found
        fits = (
            all(t.dtype == torch.int32 for t in found)
            and counts.shape == kept.shape == keys.shape[:2]
            and pool.shape == (int(counts.sum()), fmt.words)
            and int(counts.max()) * fmt.page_tokens <= rows.packed
            and named.shape == keys.shape[:3]
        )
        if not fits:
            got = ", ".join(str(list(t.shape)) for t in found)
            raise ValueError(
                f"pool, counts, kept and named of evict, {got}, do not fit keys {list(keys.shape)} and {rows.packed} "
                "tokens that have left the window"
            )
        return Ragged(spec, pool, counts.cpu(), kept.cpu(), named)


def _table(counts: Tensor) -> Tensor:
    """Where the pages of each head are, int32 ``[B, H, most]``, of numbers of pages ``[B, H]``."""
    first = F.pad(counts.flatten().cumsum(0)[:-1], (1, 0)).view_as(counts)
    page = torch.arange(int(counts.max()) if counts.numel() else 0)
    return torch.where(page < counts[..., None], first[..., None] + page, 0).int()
