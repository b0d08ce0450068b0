"""How long greedy decoding with a cache writes what it writes with the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..compat import as_argument
from ..methods.registry import CacheSpec, parse_cache
from .divergence import log_probabilities
from .stats import bootstrap_interval, mean


@dataclass
class GreedyScores:
    """Agreement of one cache with the full one.

    Args:
        cache: the cache's name.
        tokens: tokens written after every prompt.
        agreement: by text, how many of them came before the first that differs.
    """

    cache: str
    tokens: int
    agreement: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The mean over texts, its 95 % bootstrap interval where there are several, and each text's."""
        return {
            "cache": self.cache,
            "tokens": self.tokens,
            "agreement": mean(self.agreement),
            "agreement_interval": bootstrap_interval(self.agreement),
            "texts": self.agreement,
        }


@torch.inference_mode()
def greedy_tokens(model: Any, ids: Tensor, cache: Cache, tokens: int) -> Tensor:
    """The likeliest tokens after prompts, one at a time; the end of a text does not end it.

    Args:
        model: a causal language model.
        ids: prompts, int64 ``[B, T]``.
        cache: an empty cache, or one that holds what came before the prompts.
        tokens: how many to write.

    Returns:
        int64 ``[B, tokens]``.
    """
    written = [model(ids, **as_argument(cache), logits_to_keep=1).logits[:, -1:].argmax(-1)]
    while len(written) < tokens:
        written.append(log_probabilities(model, written[-1], cache).argmax(-1))
    return torch.cat(written, 1)


def greedy_agreement(
    model: Any,
    ids: Tensor,
    caches: Sequence[CacheSpec],
    *,
    tokens: int,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[GreedyScores]:
    """Continue prompts greedily with each cache and compare with the full one.

    Args:
        model: a causal language model of transformers.
        ids: prompts, int64 ``[texts, length]``.
        caches: what to compare.
        tokens: tokens written after every prompt.
        batch_size: prompts run at once.
        on_progress: called after every batch and cache with the number of tokens written.
        stop: asked before every batch; once it says so, the scores are those of the prompts until then.

    Returns:
        The agreement of each cache, in the order of ``caches``.

    Raises:
        ValueError: a size that is not positive.
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    model.set_attn_implementation("logquant")
    results = [GreedyScores(spec.name, tokens) for spec in caches]
    for batch in ids.split(batch_size):
        if stop():
            break
        prompts = batch.to(model.device)
        truth = greedy_tokens(model, prompts, parse_cache("full").make(model.config), tokens)
        for result, spec in zip(results, caches, strict=True):
            same = truth == greedy_tokens(model, prompts, spec.make(model.config), tokens)
            result.agreement += same.long().cumprod(1).sum(1).tolist()
            on_progress(truth.numel())
    return results
