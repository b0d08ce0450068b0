"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..attention.call import AttentionCall
from ..attention.view import View
from .layers.base import Baseline
from .layers.evicting import EvictingLayer
from .registry import method

# Models whose RoPE pairs neighbouring channels instead of halves of a head.
_INTERLEAVED = ("blt", "codegen", "cohere", "deepseek_v4", "ernie4_5", "glm", "gptj", "helium", "moonshine")


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


def rope_frequencies(config: PreTrainedConfig) -> tuple[float, ...] | None:
    """By what angle, in radians, RoPE rotates each pair of channels from one position to the next.

    Args:
        config: of the decoder.

    Returns:
        One for each pair, or None for a model without RoPE.

    Raises:
        ValueError: a kind of RoPE for which keys cannot be moved.
    """
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if rope and "full_attention" in rope:  # by type of layer
        rope = rope["full_attention"]
    if not rope:
        return None
    kind = rope.get("rope_type", "default")
    if config.model_type.startswith(_INTERLEAVED) or kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"the streaming cache cannot move keys with the RoPE of {config.model_type!r} ({kind})")
    if kind != "default":
        return tuple(ROPE_INIT_FUNCTIONS[kind](config)[0].tolist())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return tuple(rope["rope_theta"] ** -(i / dim) for i in range(0, dim, 2))


def move_keys(keys: Tensor, frequencies: Sequence[float], positions: int) -> Tensor:
    """Keys ``[..., D]`` as RoPE would have made them ``positions`` later."""
    angle = positions * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = (x.to(keys.device, torch.float32) for x in (angle.cos(), angle.sin()))
    low, high, rest = keys.split([len(angle), len(angle), keys.shape[-1] - 2 * len(angle)], -1)
    moved = low.float() * cos - high.float() * sin, high.float() * cos + low.float() * sin
    return torch.cat([*(x.to(keys.dtype) for x in moved), rest], -1)


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
