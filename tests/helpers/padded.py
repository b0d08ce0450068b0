"""A padded batch that is fed to a layer, and each of its rows alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logquant.attention.call import AttentionCall
from logquant.cache.layer import LogQuantLayer
from tests.helpers.masks import causal_mask, pad_mask

LENGTHS = [600, 331, 70]
DIM = 32


class PaddedBatch:
    """Three rows with prompts of :data:`LENGTHS`, which go on in the same steps.

    Args:
        side: of padding.
        steps: tokens of each forward pass after the prompts'.
        heads: KV heads.
        factors: of the queries of each query head, of which a KV head has two.
    """

    def __init__(self, side: str, steps: list[int], heads: int = 2, factors: Tensor | None = None) -> None:
        self.steps = [max(LENGTHS), *steps]
        rows, total, random = len(LENGTHS), sum(self.steps), torch.Generator().manual_seed(0)
        later = torch.ones(rows, sum(steps), dtype=torch.long)
        self.padding = torch.cat([pad_mask(LENGTHS, side), later], 1).bool()
        self.q, self.k, self.v = (torch.randn(rows, n, total, DIM, generator=random) for n in (2 * heads, heads, heads))
        if factors is not None:
            self.q = self.q * factors[:, None, None]

    def feed(self, layer: LogQuantLayer, row: int | None = None) -> Tensor:
        """What all queries get, ``[3, Hq, n, DIM]``; of one row alone without its padding, ``[1, Hq, n, DIM]``."""
        rows = slice(None) if row is None else slice(row, row + 1)
        real = torch.ones_like(self.padding[0]) if row is None else self.padding[row]
        outs, first = [], 0
        for n in self.steps:
            part = real.clone()
            part[:first], part[first + n :] = False, False
            mask = causal_mask(self.padding[rows, : first + n][:, real[: first + n]], int(part.sum()))
            q, k, v = (x[rows][:, :, part] for x in (self.q, self.k, self.v))
            with torch.no_grad():
                handle, _ = layer.update(k, v)
                outs.append(handle.kv_view.attend(AttentionCall(q, mask, DIM**-0.5)))
            first += n
        layer.commit()
        return torch.cat(outs, 2)

    def check(
        self,
        make: Callable[[], LogQuantLayer],
        compare: Callable[[LogQuantLayer, int, LogQuantLayer], None] | None = None,
        atol: float = 1e-5,
    ) -> LogQuantLayer:
        """Each row gets in the batch what it gets alone; ``compare(batch, row, alone)`` looks at what layers hold.

        Returns:
            The layer that holds the batch.
        """
        batch = make()
        together = self.feed(batch)
        for row, real in enumerate(self.padding):
            layer = make()
            alone = self.feed(layer, row)
            assert torch.allclose(together[row, :, real], alone[0], atol=atol)
            if compare is not None:
                compare(batch, row, layer)
        return batch
