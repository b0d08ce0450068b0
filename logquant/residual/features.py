"""What a residual needs of a layer: features of queries and of keys, whose products stand for exponentiated scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self


class Features(Protocol):
    """Of one layer. It never changes, so layers of caches share it."""

    @property
    def rank(self) -> int:
        """R, features of a head."""
        ...

    @property
    def query_heads(self) -> int:
        """Hq, for which it was made."""
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

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        ...

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of :attr:`tensors`.

        Raises:
            ValueError: tensors that are missing, do not fit each other, or are not finite.
        """
        ...
