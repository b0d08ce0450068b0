"""What a layer holds, for people to read."""

from __future__ import annotations

from typing import Any, NamedTuple

from .layer import LogQuantLayer
from .sizes import tensors_in


class LayerReport(NamedTuple):
    """What one layer of a cache holds.

    Attributes:
        layer: its index.
        kind: its class.
        exact, packed: tokens of all rows that are exact (uncommitted ones among them) and that are quantised; None
            where a layer is not LogQuant's. With ``evict`` the mean over KV heads.
        nbytes: bytes of its tensors.
        bits_per_element: of its tensors, for each element of the keys and values of its tokens; None if it has none.
    """

    layer: int
    kind: str
    exact: int | None
    packed: int | None
    nbytes: int
    bits_per_element: float | None


def report_of(index: int, layer: Any) -> LayerReport:
    """The report of one layer of a cache."""
    kind = type(layer).__name__
    if not isinstance(layer, LogQuantLayer):
        return LayerReport(index, kind, None, None, sum(t.nbytes for t in tensors_in(vars(layer))), None)
    rows = layer.rows
    batch = layer.batch_size if layer.is_initialized else 1
    copies = batch if rows.alike else 1
    exact, packed = (copies * sum(getattr(s, name) for s in rows.slots) for name in ("exact", "packed"))
    if layer.is_initialized and (ragged := layer.held.ragged) is not None:
        packed = ragged.tokens(layer.format.page_tokens)
    exact += batch * (layer.length - rows.length)
    bits = None
    if exact + packed:
        heads = layer.held.storage.window_k.shape[1]
        elements = (exact + packed) * heads * (layer.format.head_dim + layer.format.value_dim)
        bits = 8 * layer.nbytes / elements
    return LayerReport(index, kind, exact, packed, layer.nbytes, bits)
