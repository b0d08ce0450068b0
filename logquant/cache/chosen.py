"""Which tokens a layer holds where, by the rule ``attention``: those that little attends to leave the window first.

Under the rules ``log`` and ``recent`` the number of tokens says which of them are packed. Here it says only how many:
which ones each layer and sequence chooses for itself, whenever tokens leave, from what the newest queries have given
to each exact token since the last time. So the positions of its tokens, and what they were given, are part of what a
layer holds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.units import Units
from ..attention.weights import HEARD, given
from ..config import LogQuantConfig
from ..modes import own_arithmetic
from ..ops import choose_leaving
from .layout import Move, Rows
from .sizes import position_dtype
from .uncommitted import Uncommitted

# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_AT_ONCE = 2048


class ChosenRows:
    """Rows of which a layer has chosen what is where: a :class:`logquant.attention.view.Layout`."""

    def __init__(self, rows: Rows, chosen: Chosen) -> None:
        self._rows, self._chosen = rows, chosen

    @property
    def length(self) -> int:
        return self._rows.length

    @property
    def packed_counts(self) -> tuple[int, ...]:
        return self._rows.packed_counts

    @property
    def alike(self) -> bool:
        return self._rows.alike

    @property
    def complete(self) -> bool:
        return self._rows.complete

    def lengths(self, device: torch.device, page_tokens: int, window_tokens: int) -> Tensor | None:
        return self._rows.lengths(device, page_tokens, window_tokens)

    def real_positions(self, mask: Tensor | None, new: int, batch: int) -> Tensor | None:
        return self._rows.real_positions(mask, new, batch)

    def all_seen(self, mask: Tensor) -> Tensor:
        return self._rows.all_seen(mask)

    def positions(self, device: torch.device, new: int = 0) -> Tensor:
        """As :meth:`logquant.cache.layout.Rows.positions`, of each row of the batch."""
        return self._chosen.positions(self._rows, new).to(device)


class Chosen(NamedTuple):
    """The choice that one layer has made. It never changes: another one follows it.

    Attributes:
        config: W, the sinks and the size of a page.
        packed: positions of the packed tokens, page after page, int16 or int32 ``[B, n]``; -1 beyond a row's own.
        exact: positions of the exact tokens as of ``since``, int32 ``[B, m]``; -1 beyond a row's own. Those that came
            later follow one another.
        since: where tokens were when they last moved.
        heard: whether anything has told what it attends to, since tokens last left.
        given: float32 ``[B, H, exact]``: what the newest queries have given to each exact token since one of its row
            last left (:func:`logquant.attention.weights.given`).
    """

    config: LogQuantConfig
    packed: Tensor
    exact: Tensor
    since: Rows
    heard: bool
    given: Tensor

    @staticmethod
    def nothing(config: LogQuantConfig, rows: Rows, keys: Tensor) -> Chosen:
        """Before the first token; ``keys`` ``[B, H, n, D]`` say for how many rows and heads, and where."""
        batch, heads = keys.shape[:2]
        packed = keys.new_empty(batch, 0, dtype=torch.int16)
        given = keys.new_empty(batch, heads, 0, dtype=torch.float32)
        return Chosen(config, packed, packed.int(), rows, False, given)

    def positions(self, rows: Rows, new: int = 0) -> Tensor:
        """The position of each slot's token, int32 ``[B, packed + exact + new]``; -1 where a slot is empty.

        Args:
            rows: where tokens are now; none have moved since :attr:`since`.
            new: positions that come after those.
        """
        device, since = self.exact.device, self.since
        later = torch.arange(since.length, rows.length + new, dtype=torch.int32, device=device)
        packed = self.packed[:, : rows.packed].int()
        if since.alike and rows.alike:
            return torch.cat([packed, self.exact, later.expand(len(packed), -1)], 1)
        exact = F.pad(self.exact, (0, rows.exact + new - self.exact.shape[1]), value=-1)
        slots = since.exact_counts(device).expand(len(exact))[:, None] + torch.arange(len(later), device=device)
        return torch.cat([packed, exact.scatter(1, slots, later.expand_as(slots))], 1)

    # ------------------------------------------------------------------------------------------------ tokens leave
    def hear(self, uncommitted: Uncommitted, keys: Tensor, rows: Rows, real: Tensor | None, units: Units) -> Chosen:
        """With what new positions have given to the exact tokens and to each other.

        Args:
            uncommitted: the new positions.
            keys: ``[B, H, N, D]`` of all exact tokens and new positions.
            rows: where tokens are that came before.
            real: bool ``[B, new]`` on the CPU, which of the new positions hold a token; None if all do.
            units: those that keys are in.
        """
        if uncommitted.given is not None:
            return self._replace(heard=True, given=uncommitted.given)
        sums = F.pad(self.given, (0, keys.shape[2] - rows.exact))
        if (call := uncommitted.call) is None:
            return self._replace(given=sums)
        with own_arithmetic(keys.device):
            query, visible = call.query[:, :, -HEARD:], None
            if real is not None or not rows.alike:
                query, visible = _newest(call.query, keys, rows, real)
            sums = sums + given(query, keys.detach(), units.scale(call.scale), call.softcap, visible)
        return self._replace(heard=True, given=sums)

    def moves(self, before: Rows, after: Rows, new: int, real: Tensor | None, values: Tensor) -> list[Move]:
        """How tokens move when ``new`` positions have come: the tokens that leave are those given least.

        Args:
            before, after: where they were, and how many are where afterwards.
            new: positions that have come.
            real: bool ``[B, new]`` on the CPU, which of them hold a token; None if all do.
            values: ``[B, H, N, Dv]`` of all exact tokens and new positions, of which this has heard (:meth:`hear`).
        """
        batch, device = len(values), values.device
        weight = None
        if after.packed_counts != before.packed_counts:
            with own_arithmetic(device):
                weight = importance(self.given, values.detach())
            if not self.heard:
                _warn_unheard()
        if real is None and before.alike and after.alike:
            parts = [(slice(None), before.slots[0], after.slots[0], torch.arange(new, dtype=torch.int32))]
        else:
            each = zip(before.each(batch), after.each(batch), strict=True)
            holds = torch.ones(batch, new, dtype=torch.bool) if real is None else real
            came = (row.nonzero().squeeze(1).int() for row in holds)
            parts = [(slice(i, i + 1), *both, at) for i, (both, at) in enumerate(zip(each, came, strict=True))]
        made = []
        for of, held, left, at in parts:
            source = torch.cat([torch.arange(held.exact, dtype=torch.int32), held.exact + at])
            in_order = torch.equal(source, torch.arange(len(source), dtype=torch.int32))
            source, count = source.to(device)[None], left.evicted - held.evicted
            leaving, staying = source[:, :0], None if in_order else source
            if count:
                assert weight is not None
                own = weight[of].index_select(1, source[0])
                decided = held.exact + len(at) - (left.tokens - left.decided)
                leaving, staying = self._least(own, count, decided)
                leaving, staying = (source[0].index_select(0, x.flatten()).view_as(x) for x in (leaving, staying))
            kept = left.packed - held.packed
            by_head = left.by_head != held.by_head
            made.append(
                Move(of, held.packed, source.shape[1], leaving, staying, is_step=False, packs=kept, by_head=by_head)
            )
        return made

    def _least(self, weight: Tensor, count: int, decided: int) -> tuple[Tensor, Tensor]:
        """Which of the tokens leave and stay, where the first ``decided`` may: int32 ``[R, count]`` and the others.

        The sinks and the newest W of those stay. The ``count`` of least weight leave, of equal ones the oldest, and
        those with fine values get the places that their format has for them.
        """
        return choose_leaving(weight, self.config.sinks, decided - self.config.window, count, self.config.ranks)

    def moved(self, moves: list[Move], before: Rows, after: Rows, new: int) -> Chosen:
        """After these moves, which :meth:`moves` made from the same."""
        positions, given = self.positions(before, new)[:, before.packed :], self.given
        batch, heads = given.shape[:2]
        packed = positions.new_full((batch, after.packed), -1)
        packed[:, : before.packed] = self.packed[:, : before.packed]
        exact = positions.new_full((batch, after.exact), -1)
        left = given.new_zeros(batch, heads, after.exact)
        for m in moves:
            at, count = positions[m.rows], m.leaving.shape[1]
            staying = torch.arange(m.tokens, device=at.device)[None] if m.staying is None else m.staying.long()
            staying = staying.expand(len(at), -1)
            leave, stay = at.gather(1, m.leaving.long().expand(len(at), -1)), at.gather(1, staying)
            if m.by_head:
                leave = torch.cat([leave, stay], 1).amin(1, keepdim=True)
            packed[m.rows, m.packed : m.packed + m.packs] = leave
            exact[m.rows, : staying.shape[1]] = stay
            if not count:
                left[m.rows, :, : staying.shape[1]] = given[m.rows].gather(2, staying[:, None].expand(-1, heads, -1))
        return self._replace(
            packed=packed.to(position_dtype(after.length)), exact=exact, since=after, heard=False, given=left
        )

    # ----------------------------------------------------------------------------------------- tokens are taken back
    def exact_before(self, before: Rows, after: Rows) -> list[Tensor]:
        """For each exact token of each row of ``after``, a crop of ``before``, the slot that holds it here, int64.

        The pages that ``after`` keeps hold no token that is cropped: they were made before those came.
        """
        positions = self.positions(before).cpu()
        found, batch = [], len(positions)
        for row, held, left in zip(positions, before.each(batch), after.each(batch), strict=True):
            own = torch.cat([row[: held.packed], row[before.packed : before.packed + held.exact]])
            slots = torch.arange(left.packed, len(own))
            slots = slots[own[left.packed :] < after.length]
            found.append(slots[own[slots].argsort()])
        return found

    def cropped(self, before: Rows, after: Rows, sources: list[Tensor]) -> Chosen:
        """After a crop; tokens that come back from pages were given nothing. ``sources``: see :meth:`exact_before`."""
        device, slots = self.exact.device, before.each(len(sources))
        table = self.positions(before)
        exact = table.new_full((len(table), after.exact), -1)
        given = self.given.new_zeros(*self.given.shape[:2], after.exact)
        for row, (source, held) in enumerate(zip(sources, slots, strict=True)):
            at = torch.where(source < held.packed, source, source - held.packed + before.packed).to(device)
            exact[row, : len(source)] = table[row].index_select(0, at)
            window = (source - held.packed).to(device)
            given[row, :, : len(source)] = F.pad(self.given[row], (1, 0)).index_select(1, (window + 1).clamp_min(0))
        packed = self.packed[:, : after.packed].clone()
        for row, left in enumerate(after.each(len(sources))):
            packed[row, left.packed :] = -1
        return self._replace(packed=packed, exact=exact, since=after, given=given)

    # --------------------------------------------------------------------------------------------------- its tensors
    def map(self, function: Callable[[Tensor], Tensor], before: Rows, after: Rows) -> Chosen:
        """With ``function`` applied to what has a row for each sequence; rows are those before and afterwards."""
        exact = self.positions(before)[:, before.packed :]
        tensors = self.packed[:, : before.packed], exact.contiguous(), self.given
        packed, exact, given = (function(t) for t in tensors)
        # The longest row may be gone.
        packed, exact, given = packed[:, : after.packed], exact[:, : after.exact], given[:, :, : after.exact]
        return Chosen(self.config, packed, exact, after, self.heard, given)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.packed.nbytes + self.exact.nbytes + self.given.nbytes

    def state(self, rows: Rows) -> dict[str, Tensor]:
        """What a file needs, by name, where tokens are in ``rows`` now."""
        exact = self.positions(rows)[:, rows.packed :]
        return {"chosen.packed": self.packed[:, : rows.packed], "chosen.exact": exact, "chosen.given": self.given}

    def restored(self, tensors: Mapping[str, Tensor], rows: Rows) -> Chosen:
        """With what :meth:`state` gave, completed to ``rows``.

        Raises:
            ValueError: tensors that are missing or do not fit the rows.
        """
        packed, exact, given = (tensors.get(f"chosen.{name}") for name in ("packed", "exact", "given"))
        batch, heads = self.given.shape[:2]
        fits = (
            packed is not None
            and exact is not None
            and given is not None
            and packed.dtype in (torch.int16, torch.int32)
            and packed.shape == (batch, rows.packed)
            and exact.dtype == torch.int32
            and exact.shape == (batch, rows.exact)
            and given.dtype == torch.float32
            and given.shape == (batch, heads, rows.exact)
        )
        if not fits:
            got = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if name.startswith("chosen."))
            raise ValueError(
                f"{got or 'no chosen tokens'} do not fit {batch} rows of {rows.packed} packed and {rows.exact} exact"
            )
        return Chosen(self.config, packed, exact, rows, bool(given.any()), given)  # type: ignore[arg-type,union-attr]


@functools.cache
def _warn_unheard() -> None:
    warnings.warn(
        'the model\'s attention implementation does not tell what it attends to, so the rule "attention" keeps the '
        'newest tokens exact, as the rule "recent" does; model.set_attn_implementation("logquant") (or "sdpa") tells',
        RuntimeWarning,
        stacklevel=2,
    )


def _newest(query: Tensor, keys: Tensor, rows: Rows, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The newest queries of each row, and which slots each of them sees.

    Args:
        query: ``[B, Hq, n, D]`` of the newest n positions, those of padding among them.
        keys: ``[B, H, N, D]`` of all exact tokens and new positions.
        rows: where tokens are that came before.
        real: bool ``[B, new]``, which of the new positions hold a token; None if all do.

    Returns:
        Queries ``[B, Hq, L, D]`` and bool ``[B, L, N]``; a query of padding sees nothing.
    """
    batch, slots, asking, device = len(keys), keys.shape[2], query.shape[2], keys.device
    new = slots - rows.exact
    came = torch.ones(batch, new, dtype=torch.bool, device=device) if real is None else real.to(device)
    place = torch.arange(asking, device=device)
    order = torch.where(came[:, -asking:], place, place - asking).argsort(1)[:, -HEARD:]
    query = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    asks = order + (new - asking)
    # Of each slot the place among the new positions; negative before those.
    at = torch.arange(slots, device=device) - rows.exact_counts(device).expand(batch)[:, None]
    holds = (at < 0) | (at < new) & came.gather(1, at.clamp(0, new - 1))
    return query, holds[:, None] & (at[:, None] <= asks[..., None]) & came.gather(1, asks)[..., None]


def importance(given: Tensor, values: Tensor) -> Tensor:
    """The mean over heads of :func:`importance_by_head`, float32 ``[B, N]``."""
    weight: Tensor = importance_by_head(given, values).mean(1)
    return weight


def importance_by_head(given: Tensor, values: Tensor) -> Tensor:
    """What exact tokens add to attention's outputs: ``sqrt(given) * |v|``.

    Args:
        given: ``[B, H, N]``, the sum of squared attention weights.
        values: ``[B, H, N, Dv]``.

    Returns:
        float32 ``[B, H, N]``.
    """
    cost = torch.empty_like(given)
    parts = (t.split(_AT_ONCE, 2) for t in (cost, values, given))
    for into, part, of in zip(*parts, strict=True):
        into.copy_(torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32))
        into.mul_(of.sqrt())
    return cost
