"""What a cache is given as a prompt, layer by layer: what rules at its end are stated with."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from torch import Tensor

from logquant.cache.held import Held
from logquant.cache.uncommitted import Uncommitted


class Prompt(NamedTuple):
    """Of one layer.

    Attributes:
        queries: ``[B, Hq, T, D]``.
        keys, values: ``[B, H, T, D]``.
        real: bool ``[B, T]``, which positions hold a token; None if all do.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor | None

    def row(self, row: int) -> Prompt:
        """One row, ``[1, ...]``, without padding."""
        real = slice(None) if self.real is None else self.real[row]
        return Prompt(*(x[row : row + 1, :, real] for x in self[:3]), None)  # type: ignore[arg-type]


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """A list that grows by what each layer takes first, from now on."""
    seen: list[Prompt] = []
    take = Held.take

    def taken(self: Held, uncommitted: Uncommitted, real: Tensor | None, *args: object) -> bool:
        if not self.rows.length and uncommitted.call is not None:
            seen.append(Prompt(uncommitted.call.query, *uncommitted.states, real))
        return take(self, uncommitted, real, *args)

    monkeypatch.setattr(Held, "take", taken)
    return seen
