"""LESS (arXiv 2402.09398): features of queries and keys by small nets, one for each query head and each KV head.

Two layers without biases, GELU after each, and the absolute value, so that what stands for ``exp(score)`` is never
negative. Those of keys are scaled and mixed besides: they start near 0, and attention as if dropped tokens were gone.
The paper knows no KV heads that query heads share: that their net of keys is shared, too, is ours, and makes the state
of a KV head one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

_START = 1e-4


class Less(NamedTuple):
    """A :class:`logquant.residual.features.Features`: the nets of one layer, all float32.

    Attributes:
        query_in, query_out: ``[Hq, D, M]`` and ``[Hq, M, R]``.
        key_in, key_out: ``[H, D, M]`` and ``[H, M, R]``.
        mix: ``[H, R, R]``.
        size, share: ``[H, 1, R]``, what scales the features of keys and what is mixed into them.
    """

    query_in: Tensor
    query_out: Tensor
    key_in: Tensor
    key_out: Tensor
    mix: Tensor
    size: Tensor
    share: Tensor

    @staticmethod
    def random(
        query_heads: int, heads: int, head_dim: int, *, hidden: int, rank: int, generator: torch.Generator
    ) -> Less:
        """Nets to be trained, Glorot-uniform."""

        def matrix(count: int, rows: int, columns: int) -> Tensor:
            most = math.sqrt(6 / (rows + columns))
            return torch.empty(count, rows, columns, dtype=torch.float32).uniform_(-most, most, generator=generator)

        return Less(
            matrix(query_heads, head_dim, hidden),
            matrix(query_heads, hidden, rank),
            matrix(heads, head_dim, hidden),
            matrix(heads, hidden, rank),
            matrix(heads, rank, rank),
            torch.full((heads, 1, rank), _START, dtype=torch.float32),
            torch.full((heads, 1, rank), _START, dtype=torch.float32),
        )

    @property
    def rank(self) -> int:
        return self.query_out.shape[2]

    @property
    def query_heads(self) -> int:
        return self.query_in.shape[0]

    def check(self, heads: int, head_dim: int) -> None:
        if (heads, head_dim) != self.key_in.shape[:2]:
            own = "{} heads and dim {}".format(*self.key_in.shape[:2])
            raise ValueError(f"residual was made for keys of {own}, got {heads} heads and dim {head_dim}")

    def of_queries(self, query: Tensor, dropout: float = 0.0) -> Tensor:
        return _net(query, self.query_in, self.query_out, dropout).abs()

    def of_keys(self, keys: Tensor, dropout: float = 0.0) -> Tensor:
        scaled = self.size.abs() * _net(keys, self.key_in, self.key_out, dropout)
        return (scaled + (scaled @ self.mix) * self.share).abs()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self._asdict()

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        if missing := sorted(set(cls._fields) - tensors.keys()):
            raise ValueError(f"a layer of a residual must have {', '.join(cls._fields)}, lacks {', '.join(missing)}")
        made = cls(**{name: tensors[name] for name in cls._fields})
        if any(t.dim() != 3 or t.dtype != torch.float32 for t in made):
            raise ValueError("the tensors of a residual must be float32, of three dimensions")
        (query_heads, dim, hidden), (heads, _, own_hidden) = made.query_in.shape, made.key_in.shape
        rank = made.rank
        want = (
            (query_heads, dim, hidden),
            (query_heads, hidden, rank),
            (heads, dim, own_hidden),
            (heads, own_hidden, rank),
            (heads, rank, rank),
            (heads, 1, rank),
            (heads, 1, rank),
        )
        if tuple(tuple(t.shape) for t in made) != want or query_heads % heads:
            got = ", ".join(f"{name} {list(t.shape)}" for name, t in made._asdict().items())
            raise ValueError(f"the tensors of a residual do not fit each other: {got}")
        if not all(t.isfinite().all() for t in made):
            raise ValueError("the tensors of a residual must be finite")
        return made

    def to(self, device: torch.device) -> Less:
        return self.map(lambda t: t.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Less:
        """With ``function`` applied to every tensor."""
        return Less(*map(function, self))


def _net(x: Tensor, first: Tensor, second: Tensor, dropout: float) -> Tensor:
    hidden = F.gelu(F.dropout(x.float() @ first, dropout, dropout > 0))
    return F.gelu(hidden @ second)
