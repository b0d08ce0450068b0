"""What a residual learns from: of texts, attention to all tokens, and to those that a rule leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..attention.call import AttentionCall
from ..attention.handle import handles
from ..attention.view import View
from ..compat import as_argument
from .dropping import Dropping


class Example(NamedTuple):
    """One text, as one layer sees it; all on the CPU, in float32.

    Attributes:
        query: ``[Hq, L, D]``, of the queries that miss tokens.
        keys, values: ``[H, n, D]`` and ``[H, n, Dv]``, of the tokens that some of them miss.
        dropped: bool ``[1 or H, 1 or L, n]``, which.
        out, lse: ``[Hq, L, Dv]`` and ``[Hq, L]``, attention to the others.
        want: ``[Hq, L, Dv]``, attention to all.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    dropped: Tensor
    out: Tensor
    lse: Tensor
    want: Tensor

    @staticmethod
    def of(dropping: Dropping, call: AttentionCall, keys: Tensor, values: Tensor) -> Example:
        """Of a text with its queries, keys ``[1, H, T, D]`` and values ``[1, H, T, Dv]``."""
        first, dropped = dropping.of(call, keys)
        query, k, v = (x[0].float() for x in (call.query[:, :, first:], keys, values))
        number = torch.arange(k.shape[1], device=k.device)
        seen = (number <= number[first:, None])[None]
        want, _ = _attention(query, k, v, seen, call)
        out, lse = _attention(query, k, v, seen & ~dropped, call)
        missed = dropped.any(0).any(0).nonzero().squeeze(1)
        k, v, dropped = (x.index_select(dim, missed) for x, dim in ((k, 1), (v, 1), (dropped, 2)))
        return Example(*(x.cpu() for x in (query, k, v, dropped, out, lse, want)))


def _attention(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output ``[Hq, L, Dv]`` and log-sum-exp ``[Hq, L]``; ``seen`` ``[1 or H, L, T]``."""
    outs, found = [], []
    sinks = None if call.sinks is None else call.sinks.float().unflatten(0, (len(keys), -1))
    # One KV head at a time: the weights of all would be the largest tensor there is.
    for head, asked in enumerate(query.unflatten(0, (len(keys), -1))):
        scores = (asked @ keys[head].T) * call.scale
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~seen[min(head, len(seen) - 1)], -torch.inf)
        lse = scores.logsumexp(-1)
        lse = lse if sinks is None else torch.logaddexp(lse, sinks[head, :, None])
        outs.append((scores - lse.unsqueeze(-1)).exp() @ values[head])
        found.append(lse)
    return torch.cat(outs), torch.cat(found)


class _Watched(DynamicLayer):
    """A layer that takes one text, and makes an example of it."""

    def __init__(self, dropping: Dropping) -> None:
        super().__init__()
        self.dropping = dropping
        self.example: Example | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return handles(View(self, key_states, value_states, key_states.shape[2]))

    def observe(self, view: View, call: AttentionCall | None) -> None:
        if call is not None:
            self.example = Example.of(self.dropping, call, view.keys, view.values)


@torch.no_grad()
def examples(
    model: Any,
    texts: Sequence[Tensor],
    dropping: Dropping,
    layers: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> dict[int, list[Example]]:
    """Of texts, by layer.

    Args:
        model: a causal language model of transformers; its attention becomes ``"logquant"``.
        texts: token ids ``[T]`` of each.
        dropping: the rule.
        layers: which; None: all with full attention.
        on_progress: called after every text with 1.

    Raises:
        ValueError: no texts, one that is too short, a layer without full attention, or with one of another kind.
    """
    model.set_attn_implementation("logquant")
    made: dict[int, list[Example]] = {}
    if not texts:
        raise ValueError("texts must be at least one, got none")
    for text in texts:
        dropping.check(len(text))
        cache = DynamicCache(config=model.config)
        full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
        wanted = full if layers is None else layers
        if missing := sorted(set(wanted) - set(full)):
            raise ValueError(f"layers must be some with full attention, of {full}; got {missing}")
        watched = {i: _Watched(dropping) for i in wanted}
        cache.layers = [watched.get(i, layer) for i, layer in enumerate(cache.layers)]
        model(text[None].to(model.device), **as_argument(cache), logits_to_keep=1)
        for i, layer in watched.items():
            if layer.example is None:
                raise ValueError("model must attend with 'logquant' or 'sdpa' to the keys it caches, and did not")
            made.setdefault(i, []).append(layer.example)
        on_progress(1)
    return made
