"""The rule and the layout of a row as loops over lists."""

from __future__ import annotations

from logquant.rule import Rule


def step_by_step(tokens: int, window: int, rule: Rule, sinks: int) -> tuple[list[int], list[int]]:
    """The rule as logquant/rule.py states it, one token at a time."""
    kept_apart: list[int] = []
    exact: list[int] = []
    packed: list[int] = []
    for position in range(tokens):
        if position < sinks:
            kept_apart.append(position)
            continue
        exact.append(position)
        while len(exact) >= 3 * window:
            if rule == "log":
                head = exact[: 2 * window]
                packed += head[1::2]
                exact = head[0::2] + exact[2 * window :]
            else:
                packed += exact[:window]
                exact = exact[window:]
    return packed, kept_apart + exact


class PlainRow:
    """One row as lists, with the rule as a loop: what Rows must say after any sequence of operations."""

    def __init__(self, window: int, rule: Rule, sinks: int) -> None:
        self.window, self.rule, self.sinks = window, rule, sinks
        self.real: list[int] = []  # position of each token
        self.length = self.decided = 0

    def append(self, new: list[bool], reserved: int) -> None:
        self.real += [self.length + i for i, is_real in enumerate(new) if is_real]
        self.length += len(new)
        self.decided = max(self.decided, len(self.real) - reserved)

    def crop(self, positions: int) -> None:
        self.length = max(0, self.length - positions)
        self.real = [c for c in self.real if c < self.length]
        self.decided = min(self.decided, len(self.real))

    def layout(self) -> tuple[list[int], list[int]]:
        """Positions of packed and of exact tokens."""
        packed, exact = step_by_step(self.decided, self.window, self.rule, self.sinks)
        exact += range(self.decided, len(self.real))
        return [self.real[p] for p in packed], [self.real[p] for p in exact]
