"""What a block of vLLM's pool holds: exact tokens, or pages and what they need. Numbers and views, nothing of vLLM.

All blocks are equally large: each has room for :data:`PAGE` exact tokens of each KV head, keys beside values. A block
of packed tokens covers many more tokens, and uses the bytes of each KV head so::

    | page 0 | page 1 | ... | page m - 1 | rest | sinks |

*sinks* are the exact first tokens, in the first block of a sequence only. They end where the block ends, so they are at
the places that the last tokens of an exact block have.

While a sequence fills the block, its last pages and the rest lie idle: a page is made when :data:`EXACT` pages of
tokens are there since it began, or when the block is full. Until then the queries are kept there that say how the next
page is quantised (:attr:`BlockLayout.queries`). So whatever a block of packed tokens becomes depends on the tokens up
to its end alone, and it is complete when they have come: requests can share it.

Where tokens may be taken back (:attr:`BlockLayout.drafts`), a block that such tokens filled is not full any more, and
its last pages are made once more: there the queries have room of their own, after all pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import LogQuantConfig
from ...format import PageFormat

Ints = npt.NDArray[np.int64]

PAGE = 64
# Pages of tokens that a query sees exactly, besides the sinks: its own, up to itself, and those before.
EXACT = 3
# The same as vLLM counts a sliding window, in tokens: blocks are given back once all their tokens are further away.
WINDOW = (EXACT - 1) * PAGE + 1
# The newest queries that say how a page is quantised, where there is room for as many (logquant/quantizer/queries.py).
_QUERIES = 16
# Where they have room of their own: so many at least, those of all query heads of a KV head counted.
_QUERIES_APART = 16
_WORD = 4  # bytes
# Queries only weigh errors: less precise ones do as well, and need half of the bytes where a model has float32.
QUERY_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class BlockLayout:
    """Where things lie within the bytes that a block has for one KV head.

    Args:
        fmt: the page format; keys and values have the same dimension.
        sinks: exact first tokens of a sequence.
        group: query heads of a KV head.
        dtype: of exact tokens.
        ranks: of each slot of a page, which its token is by attention, 0 being the most attended; None: slots are in
            the order of the text.
        drafts: whether a step may bring tokens that are taken back afterwards (speculative decoding).

    Raises:
        ValueError: naming what does not fit.
    """

    fmt: PageFormat
    sinks: int
    group: int
    dtype: torch.dtype
    ranks: tuple[int, ...] | None = None
    drafts: bool = False

    def __post_init__(self) -> None:
        if self.fmt.page_tokens != PAGE or self.fmt.value_dim != self.fmt.head_dim:
            raise ValueError(f"fmt must have pages of {PAGE} tokens and values as long as keys, got {self.fmt}")
        if not 0 <= self.sinks < PAGE:
            raise ValueError(f"sinks must be 0 to {PAGE - 1}, got {self.sinks}")
        if self.pages < 2 or self.queries < 1:
            raise ValueError(
                f"a block of {PAGE} tokens in {self.dtype} must hold at least two pages and a query, and has room for "
                f"{self.pages} pages of {self.fmt.nbytes} bytes; fewer bits or sinks take less"
            )

    @classmethod
    def of(
        cls, config: LogQuantConfig, head_dim: int, group: int, dtype: torch.dtype, drafts: bool = False
    ) -> BlockLayout:
        """The layout for a model's heads."""
        ranks = config.ranks if config.fine_values else None
        return cls(config.page_format(head_dim), config.sinks, group, dtype, ranks, drafts)

    @property
    def head_dim(self) -> int:
        return self.fmt.head_dim

    @cached_property
    def words(self) -> int:
        """32-bit words of a block."""
        return PAGE * 2 * self.head_dim * self.dtype.itemsize // _WORD

    @cached_property
    def pages(self) -> int:
        """m, pages of a block."""
        apart = -(-_QUERIES_APART // self.group) * self._query_words if self.drafts else 0
        return max(0, self._before_sinks - apart) // self.fmt.words

    @property
    def tokens(self) -> int:
        """Tokens that a block of packed tokens covers."""
        return self.pages * PAGE

    @property
    def sink_slots(self) -> Ints:
        """The slots of a sequence's first page that the sinks would have."""
        ranks = np.arange(PAGE) if self.ranks is None else PAGE - 1 - np.array(self.ranks)
        return np.flatnonzero(ranks < self.sinks)

    @property
    def _before_sinks(self) -> int:
        return self.words - self.sinks * 2 * self.head_dim * self.dtype.itemsize // _WORD

    @property
    def query_word(self) -> int:
        """Where the kept queries begin: after the pages that are made before the block is full, or after all."""
        return max(0, self.pages - (0 if self.drafts else EXACT)) * self.fmt.words

    @property
    def _query_words(self) -> int:
        """Of a query of every query head."""
        return -(-self.group * self.head_dim * QUERY_DTYPE.itemsize // _WORD)

    @cached_property
    def queries(self) -> int:
        """How many queries of each query head say how a page is quantised."""
        return min(_QUERIES, (self._before_sinks - self.query_word) // self._query_words)

    @property
    def most_drafts(self) -> int:
        """Tokens of a step that may be taken back: with more, queries for two pages would be kept at one place."""
        return PAGE - self.queries - 1

    def window_nbytes(self, rows: int, heads: int) -> int:
        """Bytes of the exact tokens that so many rows see, gathered (``step.Rows.window``)."""
        return rows * heads * (self.sinks + EXACT * PAGE) * 2 * self.head_dim * self.dtype.itemsize

    @property
    def unit(self) -> int:
        """Words; every page of a pool begins at a multiple of it."""
        return math.gcd(self.words, self.fmt.words)


class Pool(NamedTuple):
    """Views on the blocks of one layer; all are of the same bytes.

    Attributes:
        exact: ``[blocks, H, PAGE, 2 D]``, as exact blocks: keys beside values.
        tokens: ``[blocks * H * PAGE, 2 D]``, the same, a token of a KV head each.
        pages: int32 ``[blocks, H, m, words]``, as blocks of packed tokens.
        queries: ``[blocks, H, queries, group, D]``, the kept queries there.
        store: int32 ``[n, H, words]``, a page at every multiple of :attr:`BlockLayout.unit` words: what a page table
            names. They overlap.
    """

    exact: Tensor
    tokens: Tensor
    pages: Tensor
    queries: Tensor
    store: Tensor

    @staticmethod
    def of(blocks: Tensor, layout: BlockLayout) -> Pool:
        """The views.

        Args:
            blocks: contiguous ``[blocks, H, ...]`` of the layout's dtype.
            layout: what lies where.
        """
        fmt, dim, count = layout.fmt, layout.head_dim, layout.queries
        exact = blocks.view(*blocks.shape[:2], PAGE, 2 * dim)
        words = exact.view(torch.int32).flatten(2)
        pages = words[:, :, : layout.pages * fmt.words].unflatten(2, (layout.pages, fmt.words))
        kept = words[:, :, layout.query_word :].view(QUERY_DTYPE)[:, :, : count * layout.group * dim]
        heads, unit = words.shape[1], layout.unit
        last = words.numel() - layout.words * (heads - 1) - fmt.words
        store = words.as_strided((last // unit + 1, heads, fmt.words), (unit, layout.words, 1))
        return Pool(exact, exact.view(-1, 2 * dim), pages, kept.unflatten(2, (count, layout.group, dim)), store)
