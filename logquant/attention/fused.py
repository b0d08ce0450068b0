"""Attention by the fused operator, as a layer asks for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..format import PageFormat
from ..recall.reading import Reading
from .call import AttentionCall
from .units import AS_THEY_ARE, Units, scaled
from .weights import HEARD


def fused_attention(
    call: AttentionCall,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    fmt: PageFormat,
    given: Tensor | None,
    *,
    units: Units = AS_THEY_ARE,
    reading: Reading | None = None,
    key_map: Tensor | None = None,
    **options: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention by the fused operator, whatever the dtype of the queries and the units of what is held.

    Args:
        call: queries, and how they attend.
        pages, keys, values, fmt, key_map, options: as for :func:`logquant.ops.attend`.
        given: what queries have given to exact tokens; None if nobody asks.
        units: those that pages and exact tokens are in.
        reading: of some of the pages only; None: of all.

    Returns:
        The output ``[B, Hq, L, Dv]``; its log-sum-exp, sinks included, float32 ``[B, Hq, L]``, unless pages were
        chosen; and what the exact tokens have been given now, if that is asked and was counted.
    """
    q, dtype, sinks = call.query, keys.dtype, call.sinks
    query = q if q.dtype == dtype else q.to(dtype)
    settings: dict[str, Any] = options | {
        "scale": units.scale(call.scale),
        "softcap": call.softcap,
        "sinks": None if sinks is None else sinks.float(),
    }
    lse = given_after = None
    if reading is not None:
        out, given_after = reading.attend(query, keys, values, given=given, **settings)
    elif given is None or q.shape[2] > HEARD:
        out, lse = ops.attend(query, pages, keys, values, fmt, key_map=key_map, **settings)
    else:
        tensors = query, pages, keys, values
        out, lse, given_after = ops.observed_attend(*tensors, fmt, key_map=key_map, **settings, attention=given)
    if units.value:
        out = scaled(out, units.value)
    return out if out.dtype == q.dtype else out.to(q.dtype), lse, given_after
