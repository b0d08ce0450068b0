"""Which tokens are dropped as they leave the window: the setting ``evict`` of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..nested import parse_nested, read_settings

# Its code is in logquant/eviction/corm.py.
RULES = ("corm",)


@dataclass(frozen=True)
class EvictSpec:
    """What ``evict="corm(window=256)"`` says.

    Args:
        rule: one of :data:`RULES`.
        window: how many of the newest queries are asked.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    rule: str = "corm"
    window: int = 256

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule of evict must be {' or '.join(map(repr, RULES))}, got {self.rule!r}")
        if self.window < 1:
            raise ValueError(f"window of evict must be a positive number of queries, got {self.window}")

    @staticmethod
    def parse(text: str) -> EvictSpec:
        """What a text says.

        Raises:
            ValueError: an unknown rule or setting, or a bad one.
        """
        rule, given = parse_nested("evict", text)
        return EvictSpec(rule, **read_settings("evict", given, {"window": int}))
