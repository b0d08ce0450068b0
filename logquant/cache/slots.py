"""Where the tokens of one sequence are: packed, exact, and by which position."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..pruning.spec import Budget
from ..rule import Rule, evictions, split_positions

T = TypeVar("T")


class ByHead(NamedTuple):
    """What each KV head chose for itself among the tokens that left the window when a prompt ended.

    Attributes:
        left: how many did.
        kept: how many of them were packed, each head's in its own order; the others, if there are, were dropped.
    """

    left: int
    kept: int


NOTHING_BY_HEAD = ByHead(0, 0)


class Memo:
    """Results that objects shared by the layers of a cache keep, one for each name: the last one."""

    def __init__(self) -> None:
        self._memo: dict[str, tuple[object, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memo": {}}

    def once_while_used(self, name: str, key: object, make: Callable[[], T]) -> T:
        """As :meth:`once`, but forgotten with its last user: a sequence's first layout must not keep all later ones."""
        if name in self._memo and self._memo[name][0] == key and (known := self._memo[name][1]()) is not None:
            found: T = known
            return found
        made = make()
        self._memo[name] = key, weakref.ref(made)
        return made

    def once(self, name: str, key: object, make: Callable[[], T]) -> T:
        """``make()``, or what it gave the last time if that was for the same key."""
        if name not in self._memo or self._memo[name][0] != key:
            self._memo[name] = key, make()
        result: T = self._memo[name][1]
        return result


class Slots(Memo):
    """Where the tokens of one sequence are: first the packed ones' slots, then the window's, in order of position.

    Immutable, and a function of how many tokens there are: however they came and whatever was removed in between.

    Args:
        window, rule, sinks: the rule.
        tokens: tokens that have come, dropped ones among them.
        decided: how many of them the rule has been applied to; those after, which may be taken back, are exact.
        budget: how much stays of a prompt; None: all, as it came.
        by_head: what KV heads chose among its tokens.

    Attributes:
        evicted: tokens that have left the window.
        packed: those of them that are in pages.
        exact: tokens in the window.
    """

    def __init__(
        self,
        window: int,
        rule: Rule = "log",
        sinks: int = 0,
        tokens: int = 0,
        decided: int | None = None,
        budget: Budget | None = None,
        by_head: ByHead = NOTHING_BY_HEAD,
    ) -> None:
        super().__init__()
        self.window, self.rule, self.sinks = window, rule, sinks
        self.tokens, self.budget, self.by_head = tokens, budget, by_head
        self.decided = tokens if decided is None else decided
        self.evicted = window * evictions(self.decided, window, sinks)
        self.packed = self.evicted - (by_head.left - by_head.kept)
        self.exact = tokens - self.evicted

    @staticmethod
    def empty(config: LogQuantConfig, head_dim: int | None = None) -> Slots:
        """Of a sequence without tokens; ``head_dim`` and errors are those of :meth:`LogQuantConfig.budget`."""
        return Slots(config.window, config.rule, config.sinks, budget=config.budget(head_dim))

    def __deepcopy__(self, memo: object) -> Slots:
        return self

    def _next(self, tokens: int, decided: int) -> Slots:
        by_head = self.by_head if tokens else NOTHING_BY_HEAD
        left = self.window * evictions(decided, self.window, self.sinks)
        if left < by_head.left:
            dropped = by_head.left - by_head.kept
            became = f"prune has dropped {dropped}" if dropped else "clusters were made"
            raise ValueError(
                f"crop must not bring back tokens of a prompt of which {became}: {by_head.left} had left the window, "
                f"and of the {tokens} tokens that crop leaves only {left} would have"
            )
        if self.budget is not None and self.tokens == 0 and left:
            kept = self.budget.kept(decided, left)
            by_head = ByHead(left, kept) if kept < left or self.budget.reorders else NOTHING_BY_HEAD
        after = Slots(self.window, self.rule, self.sinks, tokens, decided, self.budget, by_head)
        if after.evicted == self.evicted and "split" in self._memo:
            after._memo["split"] = self._memo["split"]
        return after

    def _undecided(self, tokens: int, reserved: int) -> int:
        """How many of the newest tokens the rule leaves alone once ``tokens`` more have come."""
        return min(reserved, self.tokens + tokens - self.decided)

    def append(self, tokens: int, reserved: int = 0) -> Slots:
        """The slots after ``tokens`` more tokens and the evictions then due.

        Args:
            tokens: tokens that arrive.
            reserved: how many of the newest tokens the rule is not applied to yet.
        """

        def make() -> Slots:
            total = self.tokens + tokens
            return self._next(total, total - self._undecided(tokens, reserved))

        return self.once_while_used("append", (tokens, reserved), make)

    def moves(self, tokens: int, reserved: int = 0) -> tuple[Tensor, Tensor]:
        """Which tokens leave the window when ``tokens`` more arrive, as :meth:`append` says.

        Returns:
            Two int32 index vectors into the exact tokens followed by the new ones: those that leave, in order,
            and those that are exact afterwards, in order. The rule looks at the order of tokens only, so these are the
            packed and exact "positions" of a sequence as long as that row.
        """

        def make() -> tuple[Tensor, Tensor]:
            length = self.exact + tokens
            decided = length - self._undecided(tokens, reserved)
            leaving, staying = split_positions(decided, self.window, self.rule, self.sinks)
            return leaving, torch.cat([staying, torch.arange(decided, length, dtype=torch.int32)])

        return self.once("moves", (tokens, reserved), make)

    def crop(self, tokens: int) -> Slots:
        """The slots after the newest ``tokens`` tokens are removed: those of a sequence that never had them.

        Raises:
            ValueError: tokens that have been dropped would have to come back.
        """

        def make() -> Slots:
            total = max(0, self.tokens - tokens)
            return self._next(total, min(self.decided, total))

        return self.once("crop", tokens, make)

    def exact_before(self, after: Slots) -> Tensor:
        """For each exact token of ``after``, a :meth:`crop` of these slots, the slot that holds it here, int32.

        The packed tokens of ``after`` are the first ones here. Of its exact tokens some may be packed here.
        """
        positions = self.positions()
        slot_of = torch.empty(self.tokens, dtype=torch.int32)
        slot_of[positions[self.by_head.kept :].long()] = torch.arange(
            self.by_head.kept, len(positions), dtype=torch.int32
        )
        return slot_of[after.positions()[after.packed :].long()]

    def positions(self) -> Tensor:
        """The position of each slot's token, int32; where each head has its own tokens of a prompt, the first one.

        Which of its tokens that is differs from head to head; every later query sees all of them, as it does the first.
        """

        def at_last_eviction() -> tuple[Tensor, Tensor]:
            tokens = self.evicted + 2 * self.window + self.sinks if self.evicted else 0
            return split_positions(tokens, self.window, self.rule, self.sinks)

        def make() -> Tensor:
            evicted, exact = self.once("split", self.evicted, at_last_eviction)
            later = torch.arange(len(evicted) + len(exact), self.tokens, dtype=torch.int32)
            if self.by_head == NOTHING_BY_HEAD:
                return torch.cat([evicted, exact, later])
            return torch.cat([evicted.new_zeros(self.by_head.kept), evicted[self.by_head.left :], exact, later])

        return self.once("positions", None, make)

    def state(self) -> list[int]:
        """What a file needs: whole numbers."""
        return [self.tokens, self.decided, *(() if self.by_head == NOTHING_BY_HEAD else self.by_head)]

    def restored(self, tokens: int, decided: int, *by_head: int) -> Slots:
        """What :meth:`state` gave, under the same rule."""
        of_prompt = ByHead(*by_head) if by_head else NOTHING_BY_HEAD
        return Slots(self.window, self.rule, self.sinks, tokens, decided, self.budget, of_prompt)

    @property
    def nbytes(self) -> int:
        """Bytes of position tensors, which exist only after a mask has asked for them."""
        split = self._memo["split"][1] if "split" in self._memo else ()
        positions = self._memo["positions"][1:] if "positions" in self._memo else ()
        return sum(t.nbytes for t in (*split, *positions))
