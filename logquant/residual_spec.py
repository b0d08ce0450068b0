"""What is left of tokens that are dropped: the setting ``residual`` of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from .nested import parse_nested, read_settings

# Their code is in logquant/residual.
RESIDUALS = ("less",)


@dataclass(frozen=True)
class ResidualSpec:
    """What ``residual="less(file=less.safetensors)"`` says.

    Args:
        kind: one of :data:`RESIDUALS`.
        file: what ``logquant train-residual`` has written for the model.

    Raises:
        ValueError: naming the setting, what it was and what it must be.
    """

    kind: str
    file: str

    def __post_init__(self) -> None:
        if self.kind not in RESIDUALS:
            raise ValueError(f"kind of residual must be {' or '.join(map(repr, RESIDUALS))}, got {self.kind!r}")
        if not self.file:
            raise ValueError("file of residual must be what logquant train-residual has written, got none")

    @staticmethod
    def parse(text: str) -> ResidualSpec:
        """What a text says.

        Raises:
            ValueError: an unknown kind or setting, or no file.
        """
        kind, given = parse_nested("residual", text)
        return ResidualSpec(kind, read_settings("residual", given, {"file": str}).get("file", ""))
