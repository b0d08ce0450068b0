"""The rule that says which tokens stay exact: pure functions on positions (LogQuant, arXiv 2503.19950, Fig. 6).

Nothing else in the package knows the rule. Stated step by step, with W = ``window``::

    append new tokens to the window
    while len(window) >= 3 * W:
        head   = window[:2 * W]
        packed = packed + head[1::2]            # W tokens leave, quantised once, never again
        window = head[0::2] + window[2 * W:]

so once there are 3W tokens, between 2W and 3W - 1 of them are exact: the newest W or more, then half as many with
every further W tokens of distance, and the first one. The rule ``recent`` evicts the oldest W tokens instead. Both keep
the first ``sinks`` tokens apart: those always stay exact and do not count towards the 3W.

The functions below are the closed form of that loop. Number the blocks of W tokens from 0. A token at offset i of block
k >= 1 enters the second half of the first 2W slots at slot W + i, in the k-th eviction; every eviction it survives (its
slot is even) halves its slot. So it leaves after as many halvings as W + i has trailing zero bits. Block 0 enters at
slot i, and its first token never leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

T = TypeVar("T")
Rule = Literal["log", "recent"]
RULES: tuple[str, ...] = get_args(Rule)


def evictions(tokens: int, window: int, sinks: int = 0) -> int:
    """How many times the rule has evicted ``window`` tokens, once ``tokens`` have been seen."""
    return max(0, (tokens - sinks) // window - 2)


def evicted_slots(rule: Rule, window: int, sinks: int = 0) -> slice:
    """The slots of a full window (``sinks + 3 * window`` tokens) that one eviction quantises, in this order."""
    if rule == "log":
        return slice(sinks + 1, sinks + 2 * window, 2)
    return slice(sinks, sinks + window, 1)


def _eviction_and_rank(tokens: int, window: int, rule: Rule, sinks: int) -> tuple[Tensor, Tensor]:
    """For each position the eviction (from 1) that quantises it and its rank there; a sink has a huge eviction."""
    never = torch.iinfo(torch.int64).max
    relative = torch.arange(tokens, dtype=torch.int64) - sinks
    block, offset = relative.div(window, rounding_mode="floor"), relative.remainder(window)
    if rule == "recent":
        eviction, rank = block + 1, offset
    else:
        slot = offset + window * (block > 0)
        lowest_bit = slot & -slot
        halvings = lowest_bit.clamp_min(1).double().log2().long()
        eviction = block.clamp_min(1) + halvings
        rank = slot.div(lowest_bit.clamp_min(1), rounding_mode="floor") // 2
        eviction[slot == 0] = never
    eviction[relative < 0] = never
    return eviction, rank


def split_positions(tokens: int, window: int, rule: Rule = "log", sinks: int = 0) -> tuple[Tensor, Tensor]:
    """Which positions are packed and which are exact after ``tokens`` tokens.

    The state depends on the number of tokens only, not on how they arrived: a prefill of T tokens and T single appends
    agree, and ``packed`` only ever grows at its end.

    Args:
        tokens: tokens seen so far.
        window: W.
        rule: ``"log"`` or ``"recent"``.
        sinks: first tokens that always stay exact.

    Returns:
        ``(packed, exact)``, int32: positions in eviction order, and exact positions in ascending order.

    Raises:
        ValueError: a negative count, a window below 1, or an unknown rule.
    """
    if tokens < 0 or sinks < 0:
        raise ValueError(f"tokens and sinks must not be negative, got {tokens} and {sinks}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    done = evictions(tokens, window, sinks)
    eviction, rank = _eviction_and_rank(tokens, window, rule, sinks)
    positions = torch.arange(tokens, dtype=torch.int32)
    leaves = eviction <= done
    packed = torch.empty(done * window, dtype=torch.int32)
    packed[(eviction[leaves] - 1) * window + rank[leaves]] = positions[leaves]
    return packed, positions[~leaves]


class Slots:
    """Which token each slot of a layer holds: first the packed tokens' slots, then the window's, in order of position.

    Immutable, so the layers of a cache share one, and each next one is worked out once: the first layer of a step calls
    :meth:`append`, the others get the same object.

    Args:
        window, rule, sinks: the rule.
        tokens: tokens seen.
        settled: how many of them the rule has been applied to; those after are exact, whatever the rule says.
        layout: packed and exact positions of the settled tokens, where they are not those of the rule alone because
            tokens were removed; -1 is a packed slot whose token was removed.
    """

    def __init__(
        self,
        window: int,
        rule: Rule = "log",
        sinks: int = 0,
        tokens: int = 0,
        settled: int | None = None,
        layout: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.window, self.rule, self.sinks = window, rule, sinks
        self.tokens = tokens
        self.settled = tokens if settled is None else settled
        self._layout = layout
        self.packed = window * evictions(self.settled, window, sinks) if layout is None else len(layout[0])
        settled_exact = self.settled - self.packed if layout is None else len(layout[1])
        # Then attention has to look at positions, mask or not.
        self.has_dead_slots = layout is not None and bool((layout[0] < 0).any())
        self.exact = settled_exact + self.tokens - self.settled
        self._memo: dict[str, tuple[object, Any]] = {}

    def _once(self, name: str, key: object, make: Callable[[], T]) -> T:
        """``make()``, or what it gave the last time if that was for the same key."""
        if name not in self._memo or self._memo[name][0] != key:
            self._memo[name] = key, make()
        result: T = self._memo[name][1]
        return result

    def _next(self, tokens: int, settled: int, layout: tuple[Tensor, Tensor] | None) -> Slots:
        return Slots(self.window, self.rule, self.sinks, tokens, settled, layout)

    def _settled_layout(self) -> tuple[Tensor, Tensor]:
        return self._layout or split_positions(self.settled, self.window, self.rule, self.sinks)

    def _undecided(self, tokens: int, recallable: int) -> int:
        """How many of the newest tokens the rule leaves alone once ``tokens`` more have come."""
        return min(recallable, self.tokens + tokens - self.settled)

    def append(self, tokens: int, recallable: int = 0) -> Slots:
        """The slots after ``tokens`` more tokens and the evictions then due.

        Args:
            tokens: tokens that arrive.
            recallable: the rule is not applied to that many newest tokens yet, since a :meth:`crop` may remove them.
        """
        return self._once("append", (tokens, recallable), lambda: self._append(tokens, recallable))

    def _append(self, tokens: int, recallable: int) -> Slots:
        total = self.tokens + tokens
        settled = total - self._undecided(tokens, recallable)
        if self._layout is None:
            return self._next(total, settled, None)
        packed, exact = self._layout
        row = torch.cat([exact, torch.arange(self.settled, settled, dtype=torch.int32)])
        leaving, staying = (part.long() for part in split_positions(len(row), self.window, self.rule, self.sinks))
        return self._next(total, settled, (torch.cat([packed, row[leaving]]), row[staying]))

    def moves(self, tokens: int, device: torch.device, recallable: int = 0) -> tuple[Tensor, Tensor]:
        """Which tokens become packed when ``tokens`` more arrive, as :meth:`append` says.

        Returns:
            Two int32 index vectors into the exact tokens followed by the new ones: those that become packed, in order,
            and those that are exact afterwards, in order. The rule looks at the order of tokens only, so these are the
            packed and exact "positions" of a sequence as long as that row.
        """
        return self._once("moves", (tokens, device, recallable), lambda: self._moves(tokens, device, recallable))

    def _moves(self, tokens: int, device: torch.device, recallable: int) -> tuple[Tensor, Tensor]:
        length = self.exact + tokens
        decided = length - self._undecided(tokens, recallable)
        leaving, staying = split_positions(decided, self.window, self.rule, self.sinks)
        undecided = torch.arange(decided, length, dtype=torch.int32)
        return leaving.to(device), torch.cat([staying, undecided]).to(device)

    def crop(self, tokens: int) -> Slots:
        """The slots after the newest ``tokens`` tokens are removed; those that are packed leave dead slots behind."""
        return self._once("crop", tokens, lambda: self._crop(max(0, self.tokens - tokens)))

    def _crop(self, total: int) -> Slots:
        if total >= self.settled:
            return self._next(total, self.settled, self._layout)
        if self._layout is None and evictions(total, self.window, self.sinks) * self.window == self.packed:
            return self._next(total, total, None)
        packed, exact = self._settled_layout()
        packed = torch.where(packed < total, packed, -1)
        # Whole windows at the end that are dead are given back.
        alive = (packed >= 0).nonzero()
        used = 0 if len(alive) == 0 else self.window * (int(alive[-1]) // self.window + 1)
        return self._next(total, total, (packed[:used], exact[exact < total]))

    def positions(self, device: torch.device, new: int = 0) -> Tensor:
        """The position of each slot's token, int32, on ``device``; -1 where the token was removed.

        Args:
            device: where the result goes.
            new: exact tokens that come after those seen.
        """
        return self._once("positions", (device, new), lambda: self._positions(new).to(device))

    def _positions(self, new: int) -> Tensor:
        later = torch.arange(self.settled, self.tokens + new, dtype=torch.int32)
        return torch.cat([*self._settled_layout(), later])

    @property
    def nbytes(self) -> int:
        """Bytes of position tensors, which exist only after a mask has asked for them or tokens were removed."""
        cached = self._memo["positions"][1].nbytes if "positions" in self._memo else 0
        return cached + sum(t.nbytes for t in self._layout or ())
