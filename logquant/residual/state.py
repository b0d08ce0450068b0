"""The state: sums over the tokens that were dropped, which attention weighs against what is still there.

With phi and psi the features of queries and keys, attention over the tokens K that are held and the dropped ones E is

    out = (sum over K of exp(s q.k) v  +  phi(q) S) / (sum over K of exp(s q.k)  +  phi(q) z)
    S = sum over E of psi(k) v^T,  z = sum over E of psi(k)

The sums over K are the output and the log-sum-exp that the operator gives, so nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..config import LogQuantConfig
from ..files import digest
from ..modes import lasting, own_arithmetic
from .features import Features
from .trained import residual_of

_QUERIES_AT_ONCE = 1024


def joined(left: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Attention over what is held and what was dropped.

    Args:
        left: float32 ``[..., Dv + 1]``, phi(q) S and, last, phi(q) z; 0 where nothing was dropped.
        out, lse: float32 ``[..., Dv]`` and ``[...]``, attention over what is held.
    """
    lse, total = lse.unsqueeze(-1), left[..., -1:]
    weight = total.clamp_min(torch.finfo(total.dtype).tiny)
    share = torch.sigmoid(weight.log() - lse).where((total > 0) & (lse > -torch.inf), 0)
    return torch.lerp(out, left[..., :-1] / weight, share)


class Residual:
    """What one layer keeps of dropped tokens. It never changes.

    Args:
        features: of the layer, on the device of ``sums``.
        sums: float32 ``[B, H, R, Dv + 1]``, S and, in the last column, z.
    """

    def __init__(self, features: Features, sums: Tensor) -> None:
        self.features, self.sums = features, sums

    @staticmethod
    @lasting
    def empty(config: LogQuantConfig, layer: int, keys: Tensor, values: Tensor) -> Residual | None:
        """Of no tokens, for tokens like these, ``[B, H, n, D]`` and ``[B, H, n, Dv]``; None if there is none here.

        Raises:
            FileNotFoundError, ValueError: as :func:`logquant.residual.trained.residual_of`.
            ValueError: tokens of another shape than the residual was made for.
        """
        trained = residual_of(config)
        features = None if trained is None else trained.features(layer, keys.device)
        if features is None:
            return None
        features.check(keys.shape[1], keys.shape[3])
        shape = *keys.shape[:2], features.rank, values.shape[3] + 1
        return Residual(features, torch.zeros(shape, dtype=torch.float32, device=keys.device))

    @lasting
    def absorb(self, rows: slice, keys: Tensor, values: Tensor, dropped: Tensor) -> Residual:
        """With tokens of some rows that are dropped.

        Args:
            rows: the rows.
            keys, values: ``[rows, H, n, D]`` and ``[rows, H, n, Dv]``, as they came.
            dropped: bool ``[rows, H, n]``, which of them each KV head drops.
        """
        dropped = dropped.unsqueeze(-1)
        weights = self.features.of_keys(keys).where(dropped, 0)
        # A weight of 0 does not hide a NaN.
        both = torch.cat([values.float().where(dropped, 0), dropped.float()], -1)
        sums = self.sums.clone()
        sums[rows] += weights.mT @ both
        return Residual(self.features, sums)

    def join(self, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Attention over what is held and what was dropped.

        Args:
            query: ``[B, Hq, L, D]``; or, of one token, query heads as queries of their KV head.
            out: ``[B, Hq, L, Dv]``, attention over what is held.
            lse: float32 ``[B, Hq, L]``, its log-sum-exp; -inf where a query sees nothing, which stays so.

        Raises:
            ValueError: another number of query heads than the features are of.
        """
        with own_arithmetic(query.device):
            return self._join(query, out, lse)

    def _join(self, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        batch, heads, queries, dim = query.shape
        own, kv_heads = self.features.query_heads, self.sums.shape[1]
        if heads != own and (heads != kv_heads or heads * queries != own):
            raise ValueError(f"residual was made for {own} query heads, got {heads}")
        query = query.reshape(batch, own, heads * queries // own, dim)
        left = []
        # The nets' hidden layers are larger than all else, so many queries come in portions.
        for part in query.split(_QUERIES_AT_ONCE, 2):
            asked = self.features.of_queries(part).unflatten(1, (kv_heads, -1)).flatten(2, 3)
            left.append((asked @ self.sums).view(batch, own, part.shape[2], -1))
        return joined(torch.cat(left, 2).view(*lse.shape, -1), out.float(), lse).to(out.dtype)

    def keeping(self, rows: list[bool]) -> Residual:
        """Of those rows of which tokens are still dropped, one for each row or one for all; 0 for the others."""
        if all(rows):
            return self
        kept = torch.tensor(rows, device=self.sums.device).view(-1, 1, 1, 1)
        return Residual(self.features, self.sums.where(kept, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> Residual:
        """With ``function`` applied to the state, and the features where that is then."""
        sums, features = function(self.sums), self.features
        if sums.device != self.sums.device:
            features = features.to(sums.device)
        return Residual(features, sums)

    def state(self) -> dict[str, Tensor]:
        """What a file needs, by name: the state, and what tells that it goes with these features."""
        return {"residual.sums": self.sums, "residual.digest": self._digest}

    def restored(self, tensors: Mapping[str, Tensor]) -> Residual:
        """This one with what :meth:`state` gave.

        Raises:
            ValueError: a state that is missing, of another shape, or made with other features.
        """
        sums, saved = (tensors.get(f"residual.{name}", torch.empty(())) for name in ("sums", "digest"))
        if sums.shape != self.sums.shape or sums.dtype != torch.float32:
            raise ValueError(
                f"residual must have float32 sums {list(self.sums.shape)}, got {sums.dtype} {list(sums.shape)}"
            )
        if not torch.equal(saved.cpu(), self._digest):
            raise ValueError("residual was saved with another file of features than the one that the cache names")
        return Residual(self.features, sums)

    @property
    def _digest(self) -> Tensor:
        own = {name: t.cpu().contiguous() for name, t in self.features.tensors.items()}
        return torch.frombuffer(bytearray.fromhex(digest(own, {})), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the state; the features belong to the model."""
        return self.sums.nbytes
