"""One step of decoding with everything in tensors of fixed size: append a token, and attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...format import PageFormat
from .attend import attend


def append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    positions: Tensor,
    lengths: Tensor,
    queries: Tensor,
    seen: Tensor,
) -> None:
    """The first half of :func:`decode_step_`, whose arguments these are; nothing here waits for a GPU.

    A row without room, of which only a tensor on the CPU can tell, gets a NaN for its newest key: what it attends to
    from then on is NaN.
    """
    slots, packed = window_k.shape[2], positions.shape[1] - window_k.shape[2]
    row, used = torch.arange(len(k), device=k.device), lengths[:, 1].long()
    fits, slot = used < slots, used.clamp(max=slots - 1)
    of_heads = fits[:, None, None]
    window_k[row, :, slot] = k[:, :, 0].where(of_heads, torch.nan)
    window_v[row, :, slot] = v[:, :, 0].where(of_heads, window_v[row, :, slot])
    positions[row, packed + slot] = seen.int().where(fits, positions[row, packed + slot])
    if queries.shape[2]:
        queries[row, :, seen % queries.shape[2]] = q[:, :, 0]
    lengths[:, 1] += fits
    seen += 1


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
    scale: float,
    softcap: float = 0.0,
    key_map: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append one token to each row's window, in place, and attend to everything that the row then holds.

    No shape and no number depends on how much that is, so a CUDA graph or a compiled model can hold the step.

    Args:
        q: queries ``[B, Hq, 1, D]``; this and all other dimensions and dtypes as for :func:`attend`.
        k, v: the new keys ``[B, H, 1, D]`` and values ``[B, H, 1, Dv]``.
        pages: int32 ``[B, H, P, words]``, of which a row uses as many as ``lengths`` says.
        window_k, window_v: ``[B, H, S, D]`` and ``[B, H, S, Dv]``, changed in place; they must have room.
        positions: int32 ``[B, P*G + S]``, the position of each slot's token; gets that of the new one.
        lengths: int32 ``[B, 2]``: pages and window tokens in use; one more of these afterwards.
        attention: float32 ``[B, H, S]``, what each window slot has been given, changed in place; ``[B, H, 0]`` if
            nobody asks.
        queries: ``[B, Hq, R, D]``: the query of position p goes to slot ``p % R``. R may be 0.
        seen: int64 ``[B]``, positions that came before, the same of all rows; one more afterwards.
        fmt, scale, softcap, key_map, sinks: as for :func:`attend`.
        mask: as for :func:`attend`, looked up by ``positions``; without it each query sees all of its row.

    Returns:
        ``[B, Hq, 1, Dv]``.

    Raises:
        RuntimeError: a row has no room (tensors on the CPU; else see :func:`append_`). Nothing has changed then.
    """
    slots = window_k.shape[2]
    if lengths.is_cpu and bool((lengths[:, 1] >= slots).any()):
        raise RuntimeError(f"window_k must have room for another token, has {slots} slots, all of them in use")
    append_(q, k, v, window_k, window_v, positions, lengths, queries, seen)
    counted = attention if attention.shape[2] else None
    options = key_map, None if mask is None else positions, mask, None, sinks, None, lengths, counted
    out, _, given = attend(q, pages, window_k, window_v, fmt, scale, softcap, *options)
    if counted is not None:
        attention.copy_(given)
    return out
