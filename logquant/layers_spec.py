"""Layers of a model that have settings of their own: the setting ``layers`` of a cache."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .nested import parse_nested, read_settings

MIDDLE = "middle"
_KINDS: dict[str, type] = {"key_bits": int, "value_bits": int, "key_columns": float, "fine_values": int}


@dataclass(frozen=True)
class LayersSpec:
    """What ``layers="middle(key_columns=1.5;fine_values=8)"`` says.

    Args:
        which: the layers: ``"middle"``, those from a quarter to five sixths of a model's depth, where rounding costs
            most (docs/results.md); or by number, from 0 on, ``"10"``, or ``"10-24"``, both included.
        key_bits, value_bits, key_columns, fine_values: what these layers have instead of the fields of
            :class:`logquant.LogQuantConfig` with these names; None for what they have in common with the others.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    which: str = MIDDLE
    key_bits: int | None = None
    value_bits: int | None = None
    key_columns: float | None = None
    fine_values: int | None = None

    def __post_init__(self) -> None:
        if self.which != MIDDLE and self._numbers() is None:
            raise ValueError(f"layers must be 'middle', a number, or two as in '10-24', got {self.which!r}")
        if not self.changes:
            raise ValueError(f"layers must say what they change, one of {', '.join(_KINDS)}, got {self.which!r} alone")

    @staticmethod
    def parse(text: str) -> LayersSpec:
        """What a text says.

        Raises:
            ValueError: unknown layers, an unknown setting or a bad one, or none.
        """
        which, given = parse_nested("layers", text)
        return LayersSpec(which, **read_settings("layers", given, _KINDS))

    @property
    def changes(self) -> dict[str, float]:
        """The fields that are others in these layers."""
        return {name: value for name in _KINDS if (value := getattr(self, name)) is not None}

    def has(self, layer: int, count: int) -> bool:
        """Whether layer ``layer`` of a model's ``count`` is one of these.

        Raises:
            ValueError: some of these are not the model's.
        """
        numbers = self._numbers()
        if numbers is None:
            return count <= 4 * layer and 6 * layer < 5 * count
        if numbers[1] >= count:
            raise ValueError(f"layers must be of a model's {count}, from 0 to {count - 1}, got {self.which!r}")
        return numbers[0] <= layer <= numbers[1]

    def _numbers(self) -> tuple[int, int] | None:
        """The first and the last layer; None where they do not go by numbers that make sense."""
        if (found := re.fullmatch(r"(\d+)(?:-(\d+))?", self.which, re.ASCII)) is None:
            return None
        first, last = int(found[1]), int(found[2] or found[1])
        return (first, last) if first <= last else None
