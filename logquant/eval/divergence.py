"""KL divergence and perplexity: several caches read the same text, token by token (teacher forcing)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from ..attention.call import AttentionCall
from ..attention.handle import KVHandle, handles
from ..attention.view import View
from ..compat import as_argument
from ..methods.accounting import cache_nbytes, commit, packed_bits_per_element, token_nbytes
from ..methods.layers.quantized import QuantizingLayer
from ..methods.registry import CacheSpec, parse_cache
from .stats import bootstrap_interval, mean

SPAN = 256
"""Tokens over which KL along a text is averaged."""


@dataclass
class CacheScores:
    """What one cache does to a model's predictions.

    Args:
        cache: the cache's name.
        token_kl: by text, KL(full cache || this cache) of the next token's distribution at each token, nats, float64
            ``[tokens]``.
        nll: by text, mean negative log-likelihood of the text's next token, nats.
        top1: by text, how often the likeliest token is the full cache's.
        bits_per_element: of a quantised element (``methods.accounting.packed_bits_per_element``); None where nothing
            was quantised.
        nbytes: bytes that the cache of one text holds at the end.
        token_nbytes: bytes that each further token takes (``methods.accounting.token_nbytes``); None where nothing was
            quantised that is to be.
    """

    cache: str
    token_kl: list[Tensor] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    bits_per_element: float | None = None
    nbytes: int = 0
    token_nbytes: float | None = None

    @property
    def kl(self) -> list[float]:
        """By text, the mean of ``token_kl``."""
        return [kl.mean().item() for kl in self.token_kl]

    def minus(self, other: CacheScores) -> dict[str, Any]:
        """How much higher the KL is than another cache's on the same texts.

        Returns:
            ``cache``, the other's name; ``kl``, the mean difference; and ``interval``, the 95 % bootstrap interval of
            the differences of texts, which are paired: a text that is hard for both says nothing. None for fewer than
            two texts.
        """
        differences = [own - others for own, others in zip(self.kl, other.kl, strict=True)]
        return {"cache": other.cache, "kl": mean(differences), "interval": bootstrap_interval(differences)}

    def _along(self) -> list[float]:
        longest = max(map(len, self.token_kl))  # if stopped, texts differ in length
        spans = (
            [kl[first : first + SPAN] for kl in self.token_kl if len(kl) >= first + SPAN]
            for first in range(0, longest - SPAN + 1, SPAN)
        )
        return [torch.cat(span).mean().item() for span in spans]

    def as_dict(self) -> dict[str, Any]:
        """Means over texts, 95 % bootstrap intervals over texts where there are several, and the scores of each.

        Of the tokens of all texts together, besides: the 99th and 99.9th percentile of KL, interpolated linearly, and
        the share of tokens whose KL is above 1. A mean hides the few tokens at which a cache goes wrong. And along the
        texts: the mean KL of each :data:`SPAN` tokens that are whole, the first after the prompt first.
        """
        nll, tokens = bootstrap_interval(self.nll), torch.cat(self.token_kl)
        p99, p999 = np.quantile(tokens.numpy(), [0.99, 0.999]).tolist()
        return {
            "cache": self.cache,
            "kl": mean(self.kl),
            "ppl": math.exp(mean(self.nll)),
            "top1": mean(self.top1),
            "kl_interval": bootstrap_interval(self.kl),
            "kl_p99": p99,
            "kl_p999": p999,
            "kl_above_1": (tokens > 1).double().mean().item(),
            "kl_along": {"tokens": SPAN, "kl": self._along()},
            "ppl_interval": nll and [math.exp(bound) for bound in nll],
            "top1_interval": bootstrap_interval(self.top1),
            "bits_per_element": self.bits_per_element,
            "bytes_per_token": self.token_nbytes,
            "bytes": self.nbytes,
            "texts": [
                {"kl": kl, "ppl": math.exp(nll), "top1": top1}
                for kl, nll, top1 in zip(self.kl, self.nll, self.top1, strict=True)
            ],
        }


def evaluate(
    model: Any,
    ids: Tensor,
    caches: Sequence[CacheSpec],
    *,
    prefill: int = 512,
    chunk: int = 1,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[CacheScores]:
    """Feed texts through a model token by token, once with the full cache and once with each other cache.

    A prompt is computed once for all caches, for it attends to itself exactly. Then all take the same step before any
    takes the next, so that no logits are kept.

    Args:
        model: a causal language model of transformers.
        ids: token ids ``[texts, length]``: the first ``prefill`` tokens are a prompt, which attends to itself exactly;
            each further one but the last is decoded and predicts the next.
        caches: what to compare; the full cache always runs, and is scored if it is named.
        prefill: tokens of the prompt.
        chunk: tokens decoded at once. Only 1 is decoding as it happens: tokens of a chunk do not see each other
            quantised, so more is faster and flatters a little.
        batch_size: texts run at once.
        on_progress: called after every step with the number of tokens done, over all texts.
        stop: asked before every step; once it says so, the scores are those of the tokens until then, and texts of
            which nothing was decoded have none.

    Returns:
        The scores of each cache, in the order of ``caches``.

    Raises:
        ValueError: nothing to predict, or a size that is not positive.
    """
    for name, value in (("prefill", prefill), ("chunk", chunk), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if ids.shape[1] < prefill + 2:
        raise ValueError(f"ids must have at least prefill + 2 = {prefill + 2} tokens, got {ids.shape[1]}")
    model.set_attn_implementation("logquant")
    results = [CacheScores(spec.name) for spec in caches]
    for batch in ids.split(batch_size):
        if stop():
            break
        _evaluate_batch(model, batch.to(model.device), caches, results, prefill, chunk, on_progress, stop)
    return results


@torch.inference_mode()
def _evaluate_batch(
    model: Any,
    ids: Tensor,
    specs: Sequence[CacheSpec],
    results: Sequence[CacheScores],
    prefill: int,
    chunk: int,
    on_progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> None:
    texts, end = ids.shape[0], ids.shape[1] - 1
    full = parse_cache("full")
    caches = {spec: spec.make(model.config) for spec in {full: None, **dict.fromkeys(specs)}}
    take_prompt(model, ids[:, :prefill], list(caches.values()))
    for cache in caches.values():
        for layer in cache.layers:
            if isinstance(layer, QuantizingLayer):
                layer.remember()
    steps: dict[CacheSpec, list[Tensor]] = {spec: [] for spec in caches}
    for first in range(prefill, end, chunk):
        if stop():
            break
        last = min(first + chunk, end)
        inputs, targets = ids[:, first:last], ids[:, first + 1 : last + 1]
        truth = log_probabilities(model, inputs, caches[full])
        for spec, cache in caches.items():
            guess = truth if spec == full else log_probabilities(model, inputs, cache)
            steps[spec].append(_scores(truth, guess, targets).cpu())
        on_progress(texts * (last - first))
    for result, spec in zip(results, specs, strict=True):
        if not steps[spec]:
            continue
        kl, nll, top1 = torch.cat(steps[spec], -1)
        result.token_kl += kl.unbind()
        result.nll += nll.mean(-1).tolist()
        result.top1 += top1.mean(-1).tolist()
        commit(caches[spec])
        result.bits_per_element = packed_bits_per_element(caches[spec])
        result.nbytes = cache_nbytes(caches[spec]) // texts
        result.token_nbytes = token_nbytes(caches[spec], texts)


class _Prompt(DynamicLayer):
    """A layer of several caches that all take the same prompt.

    Args:
        caches: that take it.
        index: of the layer.
    """

    def __init__(self, caches: Sequence[Cache], index: int) -> None:
        super().__init__()
        self._caches, self._index = caches, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = [cache.update(key_states, value_states, self._index)[0] for cache in self._caches]
        self._views = [keys.kv_view for keys in seen if isinstance(keys, KVHandle)]
        return handles(View(self, key_states, value_states, key_states.shape[2]))

    def observe(self, view: View, call: AttentionCall | None) -> None:
        """What attends to this layer attends to those of all caches."""
        for seen in self._views:
            seen.observe(call)


def take_prompt(model: Any, ids: Tensor, caches: Sequence[Cache]) -> None:
    """Several caches take a prompt that is computed once.

    Args:
        model: a causal language model of transformers, with the attention ``"logquant"``.
        ids: token ids ``[texts, length]``.
        caches: empty ones of the model, all with the same layers but for those with full attention.
    """
    prompt = DynamicCache(config=model.config)
    full = [type(layer) is DynamicLayer for layer in prompt.layers]
    prompt.layers = [_Prompt(caches, i) if full[i] else layer for i, layer in enumerate(prompt.layers)]
    model(ids, **as_argument(prompt), logits_to_keep=1)
    for cache in caches:
        for i, layer in enumerate(prompt.layers):
            if not full[i]:
                cache.layers[i] = copy.deepcopy(layer)


def log_probabilities(model: Any, inputs: Tensor, cache: Cache) -> Tensor:
    """Of every next token, float32 ``[texts, n, vocabulary]``."""
    logits: Tensor = model(inputs, **as_argument(cache)).logits
    return logits.float().log_softmax(-1)


def _scores(truth: Tensor, guess: Tensor, targets: Tensor) -> Tensor:
    """KL, negative log-likelihood and agreement at each of the step's tokens: float64 ``[3, texts, n]``."""
    kl = (truth.exp() * (truth - guess)).sum(-1)
    nll = -guess.gather(-1, targets[..., None])[..., 0]
    top1 = truth.argmax(-1) == guess.argmax(-1)
    return torch.stack([kl, nll, top1.to(kl.dtype)]).double()
