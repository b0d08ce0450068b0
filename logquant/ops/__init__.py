"""The operators as typed Python functions, and the choice of who computes them.

A call goes to the current backend (:mod:`logquant.ops.registry`): the compiled kernels (:mod:`logquant.ops.compiled`)
where they can be loaded, or else :mod:`logquant.ops.reference`, plain torch, and says so once. :func:`use_backend`
chooses by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..format import PageFormat
from . import reference
from .compiled import extension_error, has_cuda_kernels
from .registry import dispatch, register, use_backend

__all__ = [
    "PageFormat",
    "attend",
    "choose_leaving",
    "choose_pages",
    "decode_step_",
    "dequantize",
    "evict_",
    "extension_error",
    "has_cuda_kernels",
    "observed_attend",
    "page_scores",
    "quantize",
    "register",
    "use_backend",
]


def quantize(
    k: Tensor,
    v: Tensor,
    fmt: PageFormat,
    *,
    index: Tensor | None = None,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> Tensor:
    """Quantise tokens into pages; see :func:`logquant.ops.reference.quantize`.

    Args:
        k: keys ``[B, H, T, D]``, float32, float16 or bfloat16.
        v: values ``[B, H, T, Dv]``, same dtype and device.
        fmt: the page format.
        index: int32 ``[1 or B, N]``, the tokens to take; all T without it. N is a multiple of ``fmt.page_tokens``.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        key_weights: float32 ``[1 or B, 1 or H, N]``, how much an error of each token's key counts where parameters are
            searched (``key_param_bits`` 8); 1 without it.
        value_feedback: float32 ``[1 or B, 1 or H, N, page_tokens]``, how much of a token's error each later token of
            its page takes off before it is rounded (``value_param_bits`` 8); nothing without it.

    Returns:
        Pages, int32 ``[B, H, N / page_tokens, words]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or index.
    """
    return dispatch(reference.quantize, (k, v), (fmt,), (index, key_map, key_weights, value_feedback))


def dequantize(
    pages: Tensor, fmt: PageFormat, *, dtype: torch.dtype = torch.float32, key_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that pages stand for; see :func:`logquant.ops.reference.dequantize`.

    Args:
        pages: int32 ``[B, H, P, words]``.
        fmt: the page format.
        dtype: float32, float16 or bfloat16.
        key_map: the column map the pages were made with.

    Returns:
        Keys ``[B, H, P * page_tokens, D]`` and values ``[B, H, P * page_tokens, Dv]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape or dtype.
    """
    return dispatch(reference.dequantize, (pages,), (fmt, dtype), (key_map,))


def evict_(
    window_k: Tensor,
    window_v: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    *,
    page: int,
    tokens: int,
    start: int,
    step: int,
    count: int,
    key_map: Tensor | None = None,
    key_weights: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> None:
    """Move tokens from the window into pages, in place; see :func:`logquant.ops.reference.evict_`.

    Args:
        window_k: ``[B, H, capacity, D]``, changed in place.
        window_v: ``[B, H, capacity, Dv]``, changed in place.
        pages: int32 ``[B, H, P, words]``, changed in place.
        fmt: the page format.
        page: the first page to write.
        tokens: how many slots of the window hold tokens.
        start, step, count: the slots to evict (:func:`logquant.rule.evicted_slots`); count is a multiple of
            ``fmt.page_tokens``.
        key_map, key_weights, value_feedback: as for :func:`quantize`.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or slot; nothing has changed then.
    """
    settings = fmt, page, tokens, start, step, count
    dispatch(reference.evict_, (window_k, window_v, pages), settings, (key_map, key_weights, value_feedback))


def attend(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode attention over packed and exact tokens, one softmax; see :func:`logquant.ops.reference.attend`.

    Args:
        q: queries ``[B, Hq, L, D]``, Hq a multiple of H.
        pages: int32 ``[B, H, P, words]``, or ``[blocks, H, words]`` with a ``page_table``.
        window_k: ``[B, H, N, D]``, dtype of ``q``.
        window_v: ``[B, H, N, Dv]``, dtype of ``q``.
        fmt: the page format.
        scale: factor of the scores, usually ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        positions: int32 ``[1 or B, P * page_tokens + N]``, the position of each slot's token; negative where
            a slot is empty.
        mask: ``[1 or B, 1 or Hq, 1 or L, T]``, looked up by position: boolean (True: seen) or an additive float.
        query_positions: int32 ``[1 or B, L]``: a query sees positions up to its own.
        sinks: float32 ``[Hq]``, a logit a head that only adds to the softmax's denominator.
        page_table: int32 ``[B, P]``, the block of each page.
        lengths: int32 ``[1 or B, 2]``: pages and window tokens in use.

    Returns:
        The output ``[B, Hq, L, Dv]`` in q's dtype and the log-sum-exp of its scores, float32 ``[B, Hq, L]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or index.
    """
    options = key_map, positions, mask, query_positions, sinks, page_table, lengths, None
    out, lse, _ = dispatch(reference.attend, (q, pages, window_k, window_v), (fmt, scale, softcap), options)
    return out, lse


def observed_attend(
    q: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    sinks: Tensor | None = None,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    attention: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend`, which also adds up how much attention each exact token gets.

    A query gives the slots of the window the squares of the softmax of its scores over those alone: pages and sinks do
    not count, and what it does not see gets nothing. That is summed over the query heads of a KV head and over the
    queries. Meant for few queries: kernels keep 4 bytes for each query head, query and window slot until the end.

    Args:
        q, pages, window_k, window_v, fmt, scale, softcap, key_map, positions, mask, query_positions, sinks, page_table,
            lengths: as for :func:`attend`.
        attention: float32 ``[B, H, M]``, M <= N: what each of the first M window slots has been given before; left as
            it is.

    Returns:
        The output and the log-sum-exp, the same bits as of :func:`attend`, and what each window slot has been given
        now, float32 ``[B, H, N]``: slots from M on had nothing before.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape, dtype or index.
    """
    options = key_map, positions, mask, query_positions, sinks, page_table, lengths, attention
    return dispatch(reference.attend, (q, pages, window_k, window_v), (fmt, scale, softcap), options)


def decode_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    positions: Tensor,
    lengths: Tensor,
    attention: Tensor,
    queries: Tensor,
    seen: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append one token to each row's window, in place, and attend; see :func:`logquant.ops.reference.decode_step_`.

    Args:
        q: queries ``[B, Hq, 1, D]``, Hq a multiple of H.
        k, v: the new keys ``[B, H, 1, D]`` and values ``[B, H, 1, Dv]``, dtype of ``q``.
        pages: int32 ``[B, H, P, words]``.
        window_k, window_v: ``[B, H, S, D]`` and ``[B, H, S, Dv]``, changed in place.
        positions: int32 ``[B, P * page_tokens + S]``, the position of each slot's token, changed in place.
        lengths: int32 ``[B, 2]``: pages and window tokens in use, changed in place.
        attention: float32 ``[B, H, S]``, what each window slot has been given, changed in place; ``[B, H, 0]``: nobody
            asks.
        queries: ``[B, Hq, R, D]``: the query of position p goes to slot ``p % R``, in place. R may be 0.
        seen: int64 ``[B]``, positions that came before, changed in place.
        fmt, scale, softcap, key_map, sinks: as for :func:`attend`.
        mask: as for :func:`attend`, looked up by ``positions``.

    Returns:
        ``[B, Hq, 1, Dv]``.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape or dtype, or a row without room, where the CPU can tell; nothing has changed then.
            On a GPU such a row attends to NaN from then on.
    """
    tensors = q, k, v, pages, window_k, window_v, positions, lengths, attention, queries, seen
    return dispatch(reference.decode_step_, tensors, (fmt, scale, softcap), (key_map, mask, sinks))


def page_scores(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    *,
    scale: float,
    key_map: Tensor | None = None,
    means: Tensor | None = None,
    mean_scales: Tensor | None = None,
) -> Tensor:
    """How much attention a query would pay to each page; see :func:`logquant.ops.reference.page_scores`.

    Args:
        q: queries ``[B, Hq, L, D]``, Hq a multiple of H.
        pages: int32 ``[B, H, P, words]``; with ``means`` only their number counts.
        fmt: the page format.
        scale: factor of the scores, usually ``D ** -0.5``.
        key_map: int16 ``[1 or B, 1 or H, C]``, the column map; needed unless C = D.
        means: int8 ``[B, H, P, D]``: score the mean key of each page, and not the bound of its keys.
        mean_scales: float32 ``[B, H, P]``, of ``means``.

    Returns:
        float32 ``[B, Hq, L, P]``; the largest number stands for what is none.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape or dtype.
    """
    return dispatch(reference.page_scores, (q, pages), (fmt, scale), (key_map, means, mean_scales))


def choose_pages(
    scores: Tensor,
    counts: Tensor,
    heads: int,
    most: int,
    *,
    others: Tensor | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """The pages with the best scores, as the query heads of a KV head vote; see
    :func:`logquant.ops.reference.choose_pages`.

    Args:
        scores: float32 ``[B, Hq, L, P]`` (:func:`page_scores`).
        counts: int32 ``[1 or B, 1 or L]``, how many pages.
        heads: KV heads; Hq is a multiple.
        most: entries of the result, at least as many as the largest count.
        others: scores of another kind, which choose the second half.
        used: int32 ``[B]``, pages that each row has; all without it.

    Returns:
        int32 ``[B, heads, L, most]``: different pages in ascending order; those after a query's own count are P - 1.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: a wrong shape or dtype.
    """
    return dispatch(reference.choose_pages, (scores, counts), (heads, most), (others, used))


def choose_leaving(weight: Tensor, first: int, last: int, count: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The tokens of least weight, which leave the window, in pages, and those that stay; see
    :func:`logquant.ops.reference.choose_leaving`.

    Args:
        weight: float32 ``[R, N]``, what the token in each slot is worth (:func:`logquant.cache.chosen.importance`).
        first, last: only slots from ``first`` to below ``last`` may leave.
        count: how many do, a multiple of ``len(ranks)``.
        ranks: for each place of a page, which token of it goes there: 0 is the one of most weight, then 1. Up to 128.

    Returns:
        int32 ``[R, count]``, the slots that leave, and int32 ``[R, N - count]``, the others in their order.

    Raises:
        RuntimeError: a wrong shape or dtype, slots that are not there, or ranks that are no permutation.
    """
    return dispatch(reference.choose_leaving, (weight,), (first, last, count, ranks), ())
