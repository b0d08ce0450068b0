"""The rule that says which tokens stay exact: pure functions on positions (LogQuant, arXiv 2503.19950, Fig. 6).

Stated step by step, with W = ``window``::

    append new tokens to the window
    while len(window) >= 3 * W:
        head   = window[:2 * W]
        packed = packed + head[1::2]            # W tokens leave, quantised once, never again
        window = head[0::2] + window[2 * W:]

so once there are 3W tokens, between 2W and 3W - 1 of them are exact: the newest W or more, then half as many with
every further W tokens of distance, and the first one. The rule ``recent`` evicts the oldest W tokens instead. Both keep
the first ``sinks`` tokens apart: those always stay exact and do not count towards the 3W.

The functions below are the closed form of that loop. Number the blocks of W tokens from 0. A token at offset i of block
k >= 1 enters the second half of the first 2W slots at slot W + i, in the k-th eviction; every eviction it survives (its
slot is even) halves its slot. So it leaves after as many halvings as W + i has trailing zero bits. Block 0 enters at
slot i, and its first token never leaves.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["attention", "log", "recent"]
RULES: tuple[str, ...] = get_args(Rule)
# The rules for which the number of tokens says which of them are packed.
COUNTED: tuple[str, ...] = ("log", "recent")


def evictions(tokens: int, window: int, sinks: int = 0) -> int:
    """How many times the rule has evicted ``window`` tokens, once ``tokens`` have been seen."""
    return max(0, (tokens - sinks) // window - 2)


def evicted_slots(rule: Rule, window: int, sinks: int = 0) -> slice:
    """The slots of a full window (``sinks + 3 * window`` tokens) that one eviction quantises, in this order."""
    if rule == "log":
        return slice(sinks + 1, sinks + 2 * window, 2)
    return slice(sinks, sinks + window, 1)


def _eviction_and_rank(tokens: int, window: int, rule: Rule, sinks: int) -> tuple[Tensor, Tensor]:
    """For each position the eviction (from 1) that quantises it and its rank there; a sink has a huge eviction."""
    never = torch.iinfo(torch.int64).max
    relative = torch.arange(tokens, dtype=torch.int64) - sinks
    block, offset = relative.div(window, rounding_mode="floor"), relative.remainder(window)
    if rule == "recent":
        eviction, rank = block + 1, offset
    else:
        slot = offset + window * (block > 0)
        lowest_bit = slot & -slot
        halvings = lowest_bit.clamp_min(1).double().log2().long()
        eviction = block.clamp_min(1) + halvings
        rank = slot.div(lowest_bit.clamp_min(1), rounding_mode="floor") // 2
        eviction[slot == 0] = never
    eviction[relative < 0] = never
    return eviction, rank


def split_positions(tokens: int, window: int, rule: Rule = "log", sinks: int = 0) -> tuple[Tensor, Tensor]:
    """Which positions are packed and which are exact after ``tokens`` tokens.

    The state depends on the number of tokens only, not on how they arrived: a prefill of T tokens and T single appends
    agree, and ``packed`` only ever grows at its end.

    Args:
        tokens: tokens seen so far.
        window: W.
        rule: ``"log"`` or ``"recent"``; under ``"attention"`` the count does not say.
        sinks: first tokens that always stay exact.

    Returns:
        ``(packed, exact)``, int32: positions in eviction order, and exact positions in ascending order.

    Raises:
        ValueError: a negative count, a window below 1, or an unknown rule.
    """
    if tokens < 0 or sinks < 0:
        raise ValueError(f"tokens and sinks must not be negative, got {tokens} and {sinks}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if rule not in COUNTED:
        raise ValueError(f"rule must be one of {', '.join(COUNTED)}, got {rule!r}")
    done = evictions(tokens, window, sinks)
    eviction, rank = _eviction_and_rank(tokens, window, rule, sinks)
    positions = torch.arange(tokens, dtype=torch.int32)
    leaves = eviction <= done
    packed = torch.empty(done * window, dtype=torch.int32)
    packed[(eviction[leaves] - 1) * window + rank[leaves]] = positions[leaves]
    return packed, positions[~leaves]
