"""Requests in a pool of blocks, as vLLM keeps them: which blocks each has, and what becomes of those given back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logquant.integrations.vllm import attention
from logquant.integrations.vllm.layout import PAGE, WINDOW, BlockLayout, Pool
from logquant.integrations.vllm.packing import Quantizer
from logquant.integrations.vllm.step import Batch, Step

GARBAGE = float("nan")


@dataclasses.dataclass
class Request:
    """The tokens of a request, ``[T, heads, D]`` each, its blocks, and what attention has given to those computed."""

    query: Tensor
    key: Tensor
    value: Tensor
    packed: list[int] = dataclasses.field(default_factory=list)
    exact: list[int] = dataclasses.field(default_factory=list)
    out: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    computed: int = 0


def request(layout: BlockLayout, heads: int, tokens: int, seed: int) -> Request:
    """One with random tokens."""
    random = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(tokens, count, layout.head_dim, generator=random) for count in (heads * layout.group, heads, heads)
    )
    # Channels that stand out, and queries that look at few tokens, as models have them.
    key[:, :, ::7] += 3 * torch.randn(heads, len(range(0, layout.head_dim, 7)), generator=random)
    return Request(*(x.to(layout.dtype) for x in (2 * query, key, value)))


class Blocks:
    """A pool of one layer. Block 0 belongs to nobody; blocks are given out in random order, full of NaNs."""

    def __init__(self, layout: BlockLayout, heads: int, key_map: Tensor | None, count: int = 96, seed: int = 0) -> None:
        self.layout, self.heads = layout, heads
        self.memory = torch.full((count, heads, PAGE, 2 * layout.head_dim), GARBAGE, dtype=layout.dtype)
        self.pool = Pool.of(self.memory, layout)
        self.quantizer = Quantizer(layout, key_map, layout.head_dim**-0.5, 0.0)
        self._random = np.random.default_rng(seed)
        self._free = list(range(1, count))

    def take(self) -> int:
        block = self._free.pop(int(self._random.integers(len(self._free))))
        self.memory[block] = GARBAGE
        return block

    def give_back(self, blocks: Sequence[int]) -> None:
        self.memory[list(blocks)] = GARBAGE
        self._free += blocks

    def step(self, work: Sequence[tuple[Request, int]]) -> None:
        """Compute so many further tokens of some requests, in one batch."""
        for asked, count in work:
            self._leave_window(asked)
            end = asked.computed + count
            while len(asked.exact) * PAGE < end:
                asked.exact.append(self.take())
            while len(asked.packed) * self.layout.tokens < end:
                asked.packed.append(self.take())
        counts = np.array([count for _, count in work])
        lengths = np.array([asked.computed + count for asked, count in work])
        slots = [
            asked.exact[t // PAGE] * PAGE + t % PAGE
            for asked, n in work
            for t in range(asked.computed, asked.computed + n)
        ]
        batch = Batch(
            np.concatenate([[0], counts.cumsum()]),
            lengths,
            _table([asked.packed for asked, _ in work]),
            _table([asked.exact for asked, _ in work]),
            torch.tensor(slots),
        )
        new = [
            torch.cat([getattr(asked, name)[asked.computed : asked.computed + n] for asked, n in work])
            for name in ("query", "key", "value")
        ]
        out = torch.full_like(new[0], GARBAGE)
        attention.forward(*new, self.pool, Step.of(batch, self.layout, self.heads), self.quantizer, out)
        for (asked, n), own in zip(work, out.split(counts.tolist()), strict=True):
            asked.out = torch.cat([asked.out, own])
            asked.computed += n

    def draft(self, asked: Request, drafts: int, accepted: int) -> None:
        """Compute the next token and some drafts, of which only the first ones are those that follow."""
        end = asked.computed + 1 + accepted
        wrong = slice(end, asked.computed + 1 + drafts)
        kept = [(x, x[wrong].clone()) for x in (asked.query, asked.key, asked.value)]
        for x, own in kept:
            x[wrong] = -own
        self.step([(asked, 1 + drafts)])
        for x, own in kept:
            x[wrong] = own
        asked.computed, asked.out = end, asked.out[:end]

    def _leave_window(self, asked: Request) -> None:
        """Give back the blocks that no later query sees, as vLLM does before the next step."""
        gone = max(0, asked.computed - WINDOW + 1) // PAGE
        left = [block for block in asked.exact[:gone] if block]
        self.give_back(left)
        asked.exact[:gone] = [0] * gone


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    """A block table, padded with whatever: 0 is a block, too."""
    table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return table
