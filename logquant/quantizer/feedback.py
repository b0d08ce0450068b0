"""How tokens that leave are best quantised, as the newest queries tell: weights of keys, feedback of values.

Keys: an error of a token's key counts as much as the token is attended to, and one in a channel as much as those
queries look at it that attend to the token.

Values: attention adds values up, so their errors can cancel (*error feedback*). Token by token, each makes up for what
the errors of those before it in its page add up to, as GPTQ (arXiv 2210.17323) does with the columns of a weight
matrix, here along the tokens. With A the mean of p p^T over the newest queries, p their attention to the page's tokens,
that lowers tr(E^T A E), the squared error of what those queries are given.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .queries import RecentQueries

# Tokens that are worked on at once: float32 copies of a long prompt would raise the peak.
_AT_ONCE = 2048
# Added to A's diagonal, in parts of its mean: tomorrow's queries are not today's.
_DAMPING = 0.3


def select(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens of each row: ``[B, H, T, D]`` by ``index``: ``[B, H, N, D]``.

    Args:
        tokens: the tokens.
        index: ``[1 or B, N]``, the same for all heads, or ``[B, H, N]``.
    """
    if index.dim() == 2 and len(index) == 1:
        return tokens.index_select(2, index[0])
    batch, heads, _, dim = tokens.shape
    by_head = index if index.dim() == 3 else index[:, None]
    return tokens.gather(2, by_head.long().unsqueeze(-1).expand(batch, heads, -1, dim))


class Attention:
    """How the newest queries of some sequences attend to their tokens that leave.

    Args:
        queries: few, of these sequences; those of padding attend to all tokens alike.
        keys: ``[B, H, T, D]``, all that are still exact.
        leaving: ``[1 or B, N]`` or ``[B, H, N]``, indices of keys.
        given: ``[B, H, N]``, what all queries of late, not these few alone, have given to those
            (:func:`logquant.attention.weights.given`); None if not counted.
    """

    def __init__(self, queries: RecentQueries, keys: Tensor, leaving: Tensor, given: Tensor | None = None) -> None:
        self.given = given
        query = queries.query.float()
        if queries.real is not None:
            query = query * queries.real[:, None, :, None]
        self._query = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H, queries of a KV head, D]
        self._queries, self._keys, self._leaving = queries, keys, leaving

    def _scores(self, keys: Tensor) -> Tensor:
        out = (self._query @ keys.float().mT).mul_(self._queries.scale)
        softcap = self._queries.softcap
        return softcap * torch.tanh(out / softcap) if softcap else out

    @functools.cached_property
    def _weights(self) -> Tensor | None:
        """Those of all tokens, unless they are a prompt's many."""
        return self._scores(self._keys).softmax(-1) if self._keys.shape[2] <= _AT_ONCE else None

    @functools.cached_property
    def _lse(self) -> Tensor:
        parts = [self._scores(part).logsumexp(-1) for part in self._keys.split(_AT_ONCE, 2)]
        return torch.stack(parts).logsumexp(0).unsqueeze(-1)

    def __getitem__(self, tokens: slice) -> Tensor:
        """Of some of the tokens that leave: softmax weights, float32 ``[B, H, queries, n]``."""
        leaving = self._leaving[..., tokens]
        if self._weights is not None:
            return select(self._weights.transpose(2, 3), leaving).transpose(2, 3)
        return self._scores(select(self._keys, leaving)).sub_(self._lse).exp_()

    def key_scores(self, page_tokens: int) -> Tensor:
        """What the keys of pages without columns would cost by channel: for ``columns.allocate``.

        An error of a key changes a score by ``q_c`` times it, and that a softmax weight in proportion to the weight;
        errors of tokens are independent, and as large as the channel's variance within the page.

        Args:
            page_tokens: tokens of a page; as many, or a multiple, leave.

        Returns:
            float32 ``[B, H, D]``: over pages and queries, the sum of ``weight^2 * q_c^2 * var(k_c)``.
        """
        squares, total = self._query.square(), torch.zeros_like(self._query[:, :, 0])
        for first in range(0, self._leaving.shape[-1], _AT_ONCE):
            tokens = slice(first, first + _AT_ONCE)
            # Where next to nothing attends to the tokens that leave, all of them count alike, and not as 0.
            weights = self[tokens].clamp_min(1e-15).square()
            weights = weights.unflatten(-1, (-1, page_tokens)).sum(-1)  # [B, H, queries, P]
            keys = select(self._keys, self._leaving[..., tokens]).float().unflatten(2, (-1, page_tokens))
            total += ((weights.mT @ squares) * keys.var(3, correction=0)).sum(2)
        return total


def key_weights(attention: Tensor, page_tokens: int) -> Tensor:
    """Weights of the squared errors of keys: the mean attention each gets, 1 on average over a page, plus 1.

    Args:
        attention: ``[B, H, N]``, the mean over queries, or the root of the sum of their squares, N a multiple of
            ``page_tokens``.
        page_tokens: tokens of a page.

    Returns:
        float32 ``[B, H, N]``. All 1 where that is not finite.
    """
    pages = attention.unflatten(-1, (-1, page_tokens))
    weights = (pages / pages.mean(-1, keepdim=True) + 1.0).nan_to_num(1.0, 1.0, 1.0).flatten(-2)
    # Rounded to three bits, so that the order in which a matrix product adds up does not show in the pages.
    mantissa, exponent = weights.frexp()
    rounded: Tensor = ((mantissa * 16).round() / 16).ldexp(exponent)
    return rounded


def value_feedback(attention: Tensor, page_tokens: int) -> Tensor:
    """How much of a token's error each later token of its page takes off.

    With A = M M^T, M upper triangular, tr(E^T A E) is the sum of squares of M^T E, whose rows are made small one after
    the other; in terms of each token's remaining error that takes the inverse of M with a diagonal of ones. Cholesky
    gives a lower triangle: that of the tokens in reverse order.

    Args:
        attention: ``[B, H, queries, N]``, N a multiple of ``page_tokens``.
        page_tokens: tokens of a page.

    Returns:
        float32 ``[B, H, N, page_tokens]``. 0 where that is not finite.
    """
    pages = attention.unflatten(-1, (-1, page_tokens)).movedim(3, 2).flip(-1)  # [B, H, P, queries, G]
    metric = pages.mT @ pages
    diagonal = metric.diagonal(dim1=-2, dim2=-1)
    metric /= diagonal.mean(-1).clamp_min_(1e-30)[..., None, None]
    diagonal += _DAMPING
    lower = torch.linalg.cholesky_ex(metric).L
    lower /= lower.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-2)
    ones = torch.eye(page_tokens, device=lower.device).expand_as(lower)
    factors = torch.linalg.solve_triangular(lower, ones, upper=False, unitriangular=True)
    # Rounded, as weights are.
    rounded: Tensor = factors.mul_(256).round_().div_(256).nan_to_num_(0.0, 0.0, 0.0)
    return rounded.flip(-1, -2).flatten(2, 3).contiguous()
