"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..attention.call import AttentionCall
from ..attention.view import View
from .layers.base import Baseline
from .layers.evicting import EvictingLayer
from .layers.rope import move_keys, rope_frequencies
from .registry import method


@method("streaming")
@dataclass(frozen=True)
class Streaming(Baseline):
    """StreamingLLM's section 3.2: the first tokens and the newest ones, at positions counted within the cache.

    Sinks keep their distance to the window however much was forgotten between: their keys are rotated (RoPE) by as
    many positions. Models without RoPE keep the positions their keys were made with.

    Args:
        sinks: first tokens, 4 in the paper.
        recent: newest tokens.

    Raises:
        ValueError: naming the field, what it was and what it must be.
    """

    sinks: int = 4
    recent: int = 1020

    def __post_init__(self) -> None:
        self.need(self.sinks >= 0, "sinks", "a whole number of tokens, 0 or more")
        self.need(self.recent >= 1, "recent", "a positive whole number")

    def layer(self, config: PreTrainedConfig) -> StreamingLayer:
        return StreamingLayer(self, rope_frequencies(config))


class StreamingLayer(EvictingLayer):
    """Keys and values of one layer under :class:`Streaming`.

    Args:
        settings: the rule.
        frequencies: of RoPE (:func:`rope_frequencies`).
    """

    def __init__(self, settings: Streaming, frequencies: Sequence[float] | None) -> None:
        super().__init__()
        self.settings, self.frequencies = settings, frequencies

    def visible_keys(self) -> Tensor:
        sinks, forgotten = self.settings.sinks, self.tokens - self.held
        if self.frequencies is None or not forgotten or not sinks:
            return super().visible_keys()
        moved = move_keys(self.keys[:, :, :sinks], self.frequencies, forgotten)
        return torch.cat([moved, self.keys[:, :, sinks:]], 2)

    def evict(self, view: View, call: AttentionCall) -> None:
        sinks, recent = self.settings.sinks, self.settings.recent
        if self.held > sinks + recent:
            self.keys, self.values = (
                torch.cat([x[:, :, :sinks], x[:, :, -recent:]], 2) for x in (self.keys, self.values)
            )
