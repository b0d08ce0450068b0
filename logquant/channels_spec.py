"""Which key channels are dropped when tokens are packed, and how many: the setting ``channels`` of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from .nested import parse_nested, read_settings

# Its code is in logquant/quantizer/think.py.
RULES = ("think",)


@dataclass(frozen=True)
class ChannelsSpec:
    """What ``channels="think(ratio=0.4)"`` says.

    Args:
        rule: one of :data:`RULES`.
        ratio: the share of a head's channels that is dropped, between 0 and 1.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    rule: str = "think"
    ratio: float = 0.4

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, what: str) -> None:
            if not ok:
                raise ValueError(f"{name} of channels must be {what}, got {getattr(self, name)!r}")

        need(self.rule in RULES, "rule", " or ".join(map(repr, RULES)))
        need(0 < self.ratio < 1, "ratio", "a share above 0, below 1")

    @staticmethod
    def parse(text: str) -> ChannelsSpec:
        """What a text says.

        Raises:
            ValueError: an unknown rule or setting, or a bad one.
        """
        rule, given = parse_nested("channels", text)
        return ChannelsSpec(rule, **read_settings("channels", given, {"ratio": float}))

    def columns(self, head_dim: int) -> int:
        """How many of ``head_dim`` channels are left: the nearest multiple of 16, at least 16.

        Raises:
            ValueError: those are all.
        """
        left = max(16, 16 * round((1 - self.ratio) * head_dim / 16))
        if left >= head_dim:
            raise ValueError(
                f"ratio of channels must leave less than {head_dim} channels when rounded to a multiple of 16, "
                f"got {self.ratio!r}, which leaves {left}"
            )
        return left
