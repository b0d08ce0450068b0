"""The attention of a forward pass over a pool of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .layout import Pool
from .packing import Quantizer, keep
from .step import Rows, Step


def forward(
    query: Tensor, key: Tensor, value: Tensor, pool: Pool, step: Step, quantizer: Quantizer, output: Tensor
) -> None:
    """Write this step's tokens, make the pages that are due, and attend.

    Args:
        query: ``[tokens, Hq, D]``; tokens from ``step.tokens`` on are padding.
        key, value: ``[tokens, H, D]``.
        pool: of the layer, changed in place.
        step: what is read and written.
        quantizer: of the layer.
        output: ``[tokens, Hq, D]``, written.
    """
    count = step.tokens
    pool.exact[step.block, :, step.place] = torch.cat([key[:count], value[:count]], -1)
    # Pages may take the place of kept queries, which they need, and new ones are kept in another block.
    if step.due is not None:
        quantizer.make(pool, query, step.due)
    if step.kept is not None:
        keep(pool, query, step.kept)
    for rows in step.rows:
        _attend(query, pool, rows, quantizer, output)


def _attend(query: Tensor, pool: Pool, rows: Rows, quantizer: Quantizer, output: Tensor) -> None:
    fmt = quantizer.layout.fmt
    window_k, window_v = pool.tokens[rows.window].split(fmt.head_dim, -1)  # [R, H, N, D]
    asking = query[: len(window_k), None] if rows.tokens is None else query[rows.tokens]
    out, _ = ops.attend(
        asking.transpose(1, 2),
        pool.store,
        window_k,
        window_v,
        fmt,
        scale=quantizer.scale,
        softcap=quantizer.softcap,
        key_map=quantizer.key_map,
        positions=rows.positions,
        query_positions=rows.query_positions,
        page_table=rows.pages,
        lengths=rows.lengths,
    )
    given = out.transpose(1, 2).flatten(0, 1)
    if rows.tokens is None:
        output[: len(given)] = given
    elif rows.flat is None:
        output[rows.tokens[:, 0]] = given
    else:
        output[rows.out] = given[rows.flat]
