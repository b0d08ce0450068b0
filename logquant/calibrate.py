"""Run a model over texts and see which channels of its keys queries look at: what makes a :class:`Calibration`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from . import columns
from .attention import Attended
from .baselines.observed import ObservedView
from .calibration import Calibration
from .compat import as_argument
from .saving import fingerprint

# The variance of keys is that within spans of so many tokens, about the stretch of text that a page covers.
SPAN = 128


class _Observed(DynamicLayer):
    """A layer that takes one text, and adds up what its queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.prompt = key_states
        return ObservedView(key_states, value_states, functools.partial(self._observe, key_states.shape[1])).handles()

    def _observe(self, heads: int, attended: Attended | None) -> None:
        if attended is not None:
            squares = columns.squares_of(attended.query, heads, None)
            self.squares = squares if self.squares is None else self.squares + squares

    def scores(self) -> Tensor:
        """:func:`logquant.columns.key_scores` of the text, float32 ``[H, D]``."""
        if self.prompt is None or self.squares is None:
            raise ValueError("model must attend with 'logquant' or 'sdpa' to the keys it caches, and did not")
        return columns.key_scores(self.prompt, self.squares[..., :-1] / self.squares[..., -1:], SPAN)[0]


@torch.inference_mode()
def calibrate(
    model: Any, texts: Iterable[Tensor], on_progress: Callable[[int], None] = lambda tokens: None
) -> Calibration:
    """The statistics of a model on some texts; each counts the same.

    Args:
        model: a causal language model of transformers; its attention becomes ``"logquant"``.
        texts: token ids ``[length]`` of each.
        on_progress: called after every text with the number of its tokens.

    Raises:
        ValueError: no texts, an empty one, or a model without full attention or with attention of another kind.
    """
    model.set_attn_implementation("logquant")
    config = model.config
    totals: dict[int, Tensor] = {}
    count = tokens = 0
    for text in texts:
        if text.dim() != 1 or not len(text):
            raise ValueError(f"texts must be token ids [length], one or more, got {list(text.shape)}")
        cache = DynamicCache(config=config)
        observed = {i: _Observed() for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
        cache.layers = [observed.get(i, layer) for i, layer in enumerate(cache.layers)]
        model(text[None].to(model.device), **as_argument(cache), logits_to_keep=1)
        for i, layer in observed.items():
            scores = layer.scores().cpu()
            totals[i] = totals[i] + scores if i in totals else scores
        count, tokens = count + 1, tokens + len(text)
        on_progress(len(text))
    if not totals:
        raise ValueError(f"texts must be at least one, and model must have full attention; got {count} texts")
    return Calibration({i: total / count for i, total in totals.items()}, fingerprint(config), tokens)
