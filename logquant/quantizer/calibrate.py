"""Run a model over texts and see which channels of its keys queries look at: what makes a :class:`Calibration`.

A sequence says that itself once its first tokens leave; here it is the sum of what many points of many texts would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..attention.call import AttentionCall
from ..attention.handle import handles
from ..attention.view import View
from ..compat import as_argument
from ..config import LogQuantConfig
from ..files import fingerprint
from .calibration import Calibration
from .feedback import Attention
from .queries import MAP_QUERIES, RecentQueries

_RULE = LogQuantConfig()
# Of the tokens that could have left, every second: a page covers twice as many.
_FIRST, _STEP = _RULE.sinks, 2
LEAST_TOKENS = _FIRST + _STEP * _RULE.page_size + 2 * _RULE.window


class _Observed(DynamicLayer):
    """A layer that takes one text, and adds up what its queries say of its keys: ``scores``, float32 ``[H, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return handles(View(self, key_states, value_states, key_states.shape[2]))

    def observe(self, view: View, call: AttentionCall | None) -> None:
        if call is None:
            return
        keys = view.keys
        for end in range(LEAST_TOKENS, keys.shape[2] + 1, MAP_QUERIES):
            query = call.query[:, :, end - MAP_QUERIES : end]
            leaving = torch.arange(_FIRST, end - 2 * _RULE.window, _STEP, dtype=torch.int32, device=keys.device)
            leaving = leaving[: len(leaving) // _RULE.page_size * _RULE.page_size]
            queries = RecentQueries.of(query, None, call.scale, call.softcap)
            scores = Attention(queries, keys[:, :, :end], leaving[None]).key_scores(_RULE.page_size)[0].cpu()
            self.scores = scores if self.scores is None else self.scores + scores


@torch.inference_mode()
def calibrate(
    model: Any, texts: Iterable[Tensor], on_progress: Callable[[int], None] = lambda tokens: None
) -> Calibration:
    """The statistics of a model on some texts.

    Args:
        model: a causal language model of transformers; its attention becomes ``"logquant"``.
        texts: token ids ``[length]`` of each, at least :data:`LEAST_TOKENS`.
        on_progress: called after every text with the number of its tokens.

    Raises:
        ValueError: no texts, one that is too short, or a model without full attention or with one of another kind.
    """
    model.set_attn_implementation("logquant")
    config = model.config
    totals: dict[int, Tensor] = {}
    tokens = 0
    for text in texts:
        if text.dim() != 1 or len(text) < LEAST_TOKENS:
            raise ValueError(f"texts must be token ids [length], at least {LEAST_TOKENS}, got {list(text.shape)}")
        cache = DynamicCache(config=config)
        observed = {i: _Observed() for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
        cache.layers = [observed.get(i, layer) for i, layer in enumerate(cache.layers)]
        model(text[None].to(model.device), **as_argument(cache), logits_to_keep=1)
        for i, layer in observed.items():
            if layer.scores is None:
                raise ValueError("model must attend with 'logquant' or 'sdpa' to the keys it caches, and did not")
            totals[i] = totals[i] + layer.scores if i in totals else layer.scores
        tokens += len(text)
        on_progress(len(text))
    if not totals:
        raise ValueError(f"texts must be at least one, and model must have full attention; got {tokens} tokens")
    return Calibration(totals, fingerprint(config), tokens)
