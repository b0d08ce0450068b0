"""H2O (arXiv 2306.14048): the tokens that got most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..attention.call import AttentionCall
from ..attention.view import View
from ..attention.weights import attention_weights
from .layers.base import Baseline
from .layers.evicting import EvictingLayer
from .registry import method


@method("h2o")
@dataclass(frozen=True)
class H2O(Baseline):
    """The greedy eviction of H2O's Algorithm 1 with the split into heavy hitters and recent tokens of section 5.1.

    A token's score is the attention that it has got from all queries since it came, summed over the query heads that
    share its KV head. Each row and KV head keeps its ``recent`` newest tokens and, of the others, the ``heavy`` ones
    with the highest scores; what is forgotten never comes back. The paper sets both to a share of the sequence.

    Args:
        heavy: heavy hitters kept.
        recent: newest tokens kept.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    heavy: int = 128
    recent: int = 128

    def __post_init__(self) -> None:
        self.need(self.heavy >= 0, "heavy", "a whole number of tokens, 0 or more")
        self.need(self.recent >= 1, "recent", "a positive whole number")

    def layer(self, config: PreTrainedConfig) -> H2OLayer:
        return H2OLayer(self)


class H2OLayer(EvictingLayer):
    """Keys and values of one layer under :class:`H2O`, with the tokens' ``scores``, float32 ``[B, H, held]``."""

    def __init__(self, settings: H2O) -> None:
        super().__init__()
        self.settings = settings

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.scores = key_states.new_zeros(*key_states.shape[:2], 0, dtype=torch.float32)

    def evict(self, view: View, call: AttentionCall) -> None:
        scores = torch.nn.functional.pad(self.scores, (0, view.new))
        for weights in attention_weights(call, view.keys, view.new):
            scores = scores + weights.sum(2)
        heavy, recent = self.settings.heavy, self.settings.recent
        if self.held > heavy + recent:
            older = scores.shape[2] - recent
            kept = scores[:, :, :older].topk(heavy, -1).indices.sort(-1).values
            newest = torch.arange(older, older + recent, device=kept.device).expand(*kept.shape[:2], -1)
            index = torch.cat([kept, newest], -1)
            scores = scores.gather(2, index)
            self.keys, self.values = (
                x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.keys, self.values)
            )
        self.scores = scores
