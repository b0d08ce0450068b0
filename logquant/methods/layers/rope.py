"""Keys at other positions than those that RoPE made them for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Models whose RoPE pairs neighbouring channels instead of halves of a head.
_INTERLEAVED = ("blt", "codegen", "cohere", "deepseek_v4", "ernie4_5", "glm", "gptj", "helium", "moonshine")


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
        raise ValueError(f"the cache cannot move keys with the RoPE of {config.model_type!r} ({kind})")
    if kind != "default":
        return tuple(ROPE_INIT_FUNCTIONS[kind](config)[0].tolist())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return tuple(rope["rope_theta"] ** -(i / dim) for i in range(0, dim, 2))


def move_keys(keys: Tensor, frequencies: Sequence[float], positions: int | Tensor) -> Tensor:
    """Keys ``[..., n, D]`` as RoPE would have made them ``positions`` later, a number or one each, ``[n, 1]``."""
    angle = positions * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = (x.to(keys.device, torch.float32) for x in (angle.cos(), angle.sin()))
    pairs = len(frequencies)
    low, high, rest = keys.split([pairs, pairs, keys.shape[-1] - 2 * pairs], -1)
    moved = low.float() * cos - high.float() * sin, high.float() * cos + low.float() * sin
    return torch.cat([*(x.to(keys.dtype) for x in moved), rest], -1)
