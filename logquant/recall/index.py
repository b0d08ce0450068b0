"""What choosers go by: the mean key of each page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PageIndex(NamedTuple):
    """Mean keys of pages, 8 bits a channel. It never changes: another one follows it.

    A mean is that of the keys as they came, before they were quantised.

    Attributes:
        means: int8 ``[B, H, P, D]``.
        scales: float32 ``[B, H, P]``: a mean is ``means * scales``. Not finite where a key of the page is not.
    """

    means: Tensor
    scales: Tensor

    @staticmethod
    def empty(keys: Tensor) -> PageIndex:
        """Of no page, for keys like these, ``[B, H, n, D]``."""
        batch, heads, _, dim = keys.shape
        return PageIndex(
            keys.new_empty(batch, heads, 0, dim, dtype=torch.int8),
            keys.new_empty(batch, heads, 0, dtype=torch.float32),
        )

    @staticmethod
    def of(keys: Tensor, page_tokens: int) -> PageIndex:
        """Of the pages that keys ``[B, H, n, D]`` make, one after the other; n is a multiple of ``page_tokens``."""
        mean = keys.unflatten(2, (-1, page_tokens)).mean(3, dtype=torch.float32)
        scales = mean.abs().amax(-1) / 127
        codes = (mean / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
        return PageIndex(codes.nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scales)

    @property
    def pages(self) -> int:
        """P."""
        return self.scales.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: D + 4 for each page of each KV head."""
        return self.means.nbytes + self.scales.nbytes

    def map(self, function: Callable[[Tensor], Tensor]) -> PageIndex:
        """With ``function`` applied to both tensors."""
        return PageIndex(function(self.means), function(self.scales))

    def resized(self, pages: int) -> PageIndex:
        """A copy of the first ``pages`` pages, with zeros where there are none yet."""

        def copy(x: Tensor) -> Tensor:
            wider = x.new_zeros(*x.shape[:2], pages, *x.shape[3:])
            kept = min(pages, x.shape[2])
            wider[:, :, :kept] = x[:, :, :kept]
            return wider

        return self.map(copy)

    def write(self, rows: slice, page: int, other: PageIndex) -> None:
        """Put ``other`` where page ``page`` begins, in these rows; for one that nobody else has yet."""
        for into, new in zip(self, other, strict=True):
            into[rows, :, page : page + other.pages] = new

    def state(self) -> dict[str, Tensor]:
        """What a file needs, by name."""
        return {"recall.means": self.means, "recall.scales": self.scales}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], pages: Tensor, dim: int) -> PageIndex:
        """What :meth:`state` gave.

        Args:
            tensors: by name, with or without others.
            pages: int32 ``[B, H, P, words]``, those that it is of.
            dim: D.

        Raises:
            ValueError: tensors that are missing or do not fit the pages.
        """
        means, scales = tensors.get("recall.means"), tensors.get("recall.scales")
        shape = pages.shape[:3]
        if (
            means is None
            or scales is None
            or means.dtype != torch.int8
            or scales.dtype != torch.float32
            or means.shape != (*shape, dim)
            or scales.shape != shape
        ):
            got = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items() if name.startswith("recall."))
            raise ValueError(f"{got or 'no mean keys'} do not fit pages {list(shape)} of keys with {dim} channels")
        return PageIndex(means, scales)
