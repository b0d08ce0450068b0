"""What a residual needs of a layer: features of queries and of keys, whose products stand for exponentiated scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from typing_extensions import Self


class Features(Protocol):
    """Of one layer. It never changes, so layers of caches share it."""

    @property
    def rank(self) -> int:
        """R, features of a head."""
        ...

    def check(self, heads: int, head_dim: int) -> None:
        """Refuse (ValueError) another number of KV heads, or channels of a key, than it was made for."""
        ...

    def of_queries(self, query: Tensor) -> Tensor:
        """``[B, Hq, L, D]`` as float32 ``[B, Hq, L, R]``, 0 or more."""
        ...

    def of_keys(self, keys: Tensor) -> Tensor:
        """``[B, H, T, D]`` as float32 ``[B, H, T, R]``, 0 or more."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        ...

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of :attr:`tensors`.

        Raises:
            ValueError: tensors that are missing or do not fit each other.
        """
        ...
